"""The operations that a step spends its time in, and what bounds each.

`jax.profiler` records when each operation of the compiled program ran; the
program's text tells how much each computes and moves. On a machine of P FLOP/s
and W bytes/s an operation takes at least

  limit = max(FLOPs / P, bytes / W)

and is bound by whichever is larger. One that takes ten times its limit or more
is bound by neither: it waits, runs on one of many cores, or is too small.
The bytes are of operands and results, as if no cache kept any of them.
"""

import collections
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import report

# Operations whose time is that of the operations inside them.
CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")
SLICES = ("dynamic-slice", "slice", "gather")
NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
FAR_FROM_LIMIT = 0.1
PART_LETTERS = 50
# Scopes of the training step, the first that a path names.
SCOPES = ("augment", "fbank", "masks", "encode", "loss", "optimiser")
COLUMNS = (
  "operation",
  "ms",
  "% of all",
  "runs",
  "GFLOP",
  "MB",
  "bound by",
  "% of limit",
  "from",
)

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)(.*)$"
)
# Of an instruction, and of a parameter.
_OPERAND = (r"%([\w.\-]+)", r"\d+")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")


class Instruction(NamedTuple):
  """A line of a program's text.

  Attributes:
    name: unique in the program.
    opcode: such as "fusion" or "dot".
    shape: text of the result's shape.
    operands: names; of a parameter its number.
    rest: attributes, text.
    is_root: whether its computation returns it.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool


class Operation(NamedTuple):
  """What operations of one kind and place cost, such as those of all layers.

  Attributes:
    name: of their instructions, without its number.
    part: where in the traced program it comes from.
    flops: per step.
    num_bytes: moved per step.
    seconds: per step, of all threads or streams together.
    times: how often they run in a step.
  """

  name: str
  part: str
  flops: float
  num_bytes: float
  seconds: float
  times: float


class Program:
  """The text of a compiled program, taken apart."""

  def __init__(self, text: str):
    """Reads what `Compiled.as_text` returns."""
    self.instructions: dict[str, Instruction] = {}
    self.computations = collections.defaultdict(list)
    current = ""
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = header[1]
      elif match := _INSTRUCTION.match(line):
        root, name, shape, opcode, operands, rest = match.groups()
        found = Instruction(
          name,
          opcode,
          shape,
          tuple(re.findall(_OPERAND[opcode == "parameter"], operands)),
          rest,
          bool(root),
        )
        self.instructions[name] = found
        self.computations[current].append(found)

  def part(self, name: str) -> str:
    """Returns the end of the path of an operation in the traced program."""
    path = re.search(r'op_name="([^"]*)"', self.instructions[name].rest)
    steps = [] if path is None else path[1].split("/")[1:]
    return "/".join(step for step in steps if step != "closed_call")

  def flops(self, name: str) -> float:
    """Returns the floating-point operations of one run of an instruction."""
    found = self.instructions[name]
    count = _elements(found.shape)
    if found.opcode in NOTHING:
      return 0
    if inside := self._inside(found):
      return sum(self.flops(each.name) for each in inside)
    if found.opcode == "dot":
      axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", found.rest)[1]
      dims = _dims(self.instructions[found.operands[0]].shape)
      return 2 * count * math.prod(dims[int(i)] for i in axes.split(",") if i)
    if found.opcode == "custom-call" and re.search("gemm|matmul", found.rest):
      return self._product_flops(found)
    if found.opcode == "custom-call" and "__cudnn$fmha" in found.rest:
      return self._attention_flops(found)
    if found.opcode == "fft":
      length = re.search(r"fft_length=\{(\d+)\}", found.rest)
      return 5 * count * math.log2(int(length[1]))
    return count

  def num_bytes(self, name: str) -> float:
    """Returns the bytes that one run of an instruction reads and writes."""
    found = self.instructions[name]
    if found.opcode in SLICES:
      return 2 * _bytes(found.shape)
    inside = self._inside(found)
    result = _bytes(found.shape)
    operands = [
      _bytes(self.instructions[operand].shape) for operand in found.operands
    ]
    for each in inside:
      if each.opcode == "parameter":
        index = int(each.operands[0])
        users = [user for user in inside if each.name in user.operands]
        sliced = [
          user
          for user in users
          if user.opcode in SLICES and user.operands[0] == each.name
        ]
        if sliced and len(sliced) == len(users):
          operands[index] = sum(_bytes(user.shape) for user in sliced)
      if each.is_root and each.opcode == "dynamic-update-slice":
        update = _bytes(self.instructions[each.operands[1]].shape)
        # The rest of the result stays where it is.
        return sum(x for x in operands if x != result) + update
    return sum(operands) + result

  def _inside(self, found: Instruction) -> list[Instruction]:
    called = re.search(r"calls=%?([\w.\-]+)", found.rest)
    return self.computations[called[1]] if called else []

  def _product_flops(self, found: Instruction) -> float:
    """Returns 2 b m n k of a product [b, m, k] [b, k, n] from its sizes."""
    left, right = (self.instructions[x].shape for x in found.operands[:2])
    out = found.shape[1:] if found.shape.startswith("(") else found.shape
    batch = math.prod(_dims(out)[:-2])
    sizes = math.prod(map(_elements, (left, right, out)))
    return 2 * batch * math.sqrt(sizes / batch**3)

  def _attention_flops(self, found: Instruction) -> float:
    """Returns the products of cuDNN's attention over [b, heads, n, c].

    Two forward, 2 b heads n^2 c each, and five backward.
    """
    sizes = _dims(found.shape)
    products = 5 if "Backward" in found.rest else 2
    return 2 * products * math.prod(sizes) * sizes[2]


def record(step: Callable, folder: str, repeats: int) -> None:
  """Records some steps into a folder, for `operations` and for viewers.

  Args:
    step: makes one step and returns its arrays; has run before.
    folder: receives the trace; its file *.xplane.pb opens in XProf.
    repeats: steps.
  """
  with jax.profiler.trace(folder):
    for _ in range(repeats):
      jax.block_until_ready(step())


def operations(text: str, folder: str, repeats: int) -> list[Operation]:
  """Returns the operations of the recorded steps, the longest first.

  Args:
    text: of the compiled program.
    folder: that `record` wrote into.
    repeats: how many steps it recorded.

  Raises:
    FileNotFoundError: there is no trace.
  """
  program = Program(text)
  seconds = collections.defaultdict(collections.Counter)
  runs = collections.defaultdict(collections.Counter)
  for name, kernel, event_s in _events(folder):
    found = program.instructions.get(name)
    if found is not None and found.opcode not in CONTAINERS:
      seconds[name][kernel] += event_s / repeats
      runs[name][kernel] += 1 / repeats
  kinds = {}
  for name in seconds:
    part = program.part(name)
    kind = re.sub(r"[.\d]+$", "", name), part
    # Of several kernels, one at least runs once each time.
    times = min(runs[name].values())
    costs = (
      times * program.flops(name),
      times * program.num_bytes(name),
      sum(seconds[name].values()),
      times,
    )
    kinds[kind] = [
      x + y for x, y in zip(kinds.get(kind, (0,) * 4), costs, strict=True)
    ]
  found = [Operation(*kind, *costs) for kind, costs in kinds.items()]
  return sorted(found, key=lambda operation: -operation.seconds)


def bound(
  operation: Operation, *, peak_flops: float, bandwidth: float
) -> tuple[str, float]:
  """Returns what bounds an operation, and its limit over its time."""
  compute = operation.flops / peak_flops
  memory = operation.num_bytes / bandwidth
  share = max(compute, memory) / operation.seconds
  if share < FAR_FROM_LIMIT:
    return "neither", share
  return ("compute" if compute > memory else "memory"), share


def describe(
  found: list[Operation], *, peak_flops: float, bandwidth: float
) -> dict[str, Any]:
  """Returns operations with what bounds each, as figures for `table`.

  Args:
    found: of `operations`.
    peak_flops: FLOP/s of the machine.
    bandwidth: its bytes/s.
  """
  peaks = {"peak_flops": peak_flops, "bandwidth": bandwidth}
  rows = []
  for operation in found:
    bound_by, share = bound(operation, **peaks)
    rows.append(
      operation._asdict() | {"bound_by": bound_by, "share_of_limit": share}
    )
  total = sum(operation.seconds for operation in found)
  return peaks | {"seconds_per_step": total, "rows": rows}


def table(figures: dict[str, Any], count: int) -> str:
  """Returns the longest operations of `describe` as text.

  Args:
    figures: of `describe`.
    count: rows at most.
  """
  total = figures["seconds_per_step"]
  rows = [
    [
      row["name"],
      f"{1e3 * row['seconds']:.2f}",
      f"{100 * row['seconds'] / total:.1f}",
      f"{row['times']:g}",
      f"{row['flops'] / 1e9:.2f}",
      f"{row['num_bytes'] / 1e6:.1f}",
      row["bound_by"],
      f"{100 * row['share_of_limit']:.0f}",
      row["part"][-PART_LETTERS:],
    ]
    for row in figures["rows"][:count]
  ]
  bounds = _shares(figures, lambda row: row["bound_by"])
  scopes = _shares(figures, lambda row: scope(row["part"]))
  return report.table_text(
    f"the {len(rows)} longest of {len(figures['rows'])} operations, "
    f"{1e3 * total:.1f} ms per step, all threads together\n"
    f"limits: {figures['peak_flops'] / 1e9:.4g} GFLOP/s, "
    f"{figures['bandwidth'] / 1e9:.4g} GB/s; time bound by: {bounds}\n"
    f"time of: {scopes}",
    COLUMNS,
    rows,
  )


def scope(part: str) -> str:
  """Returns which of SCOPES an operation is from, by its path, or "rest"."""
  return next((name for name in SCOPES if name in part), "rest")


def _shares(figures: dict[str, Any], group: Callable[[dict], str]) -> str:
  """Returns the groups of rows and their shares of the time as text."""
  seconds = collections.Counter()
  for row in figures["rows"]:
    seconds[group(row)] += row["seconds"]
  total = sum(seconds.values())
  return ", ".join(
    f"{name} {100 * x / total:.0f} %" for name, x in seconds.most_common()
  )


def timed_bandwidth(device: jax.Device) -> float:
  """Returns the best of five timed changes in place, bytes/s.

  Of 256 MiB, and on an accelerator, which is told what to do while it waits,
  of 2 GiB.
  """
  size = 2**26 if device.platform == "cpu" else 2**29
  array = jax.device_put(jnp.ones(size, jnp.float32), device)
  # In place, or a CPU would spend the time on getting new pages.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  seconds = []
  for _ in range(6):
    start = time.perf_counter()
    array = jax.block_until_ready(add(array))
    seconds.append(time.perf_counter() - start)
  return 2 * array.nbytes / min(seconds[1:])


def _events(folder: str) -> Iterator[tuple[str, str, float]]:
  """Yields (instruction, kernel, seconds) of the newest trace in a folder."""
  paths = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
  if not paths:
    raise FileNotFoundError(f"{folder} holds no *.xplane.pb; record one first")
  newest = max(paths, key=lambda path: path.stat().st_mtime)
  planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
  # With an accelerator, the host's events are of handing out work; a plugin
  # without one may show an empty device.
  devices = [plane for plane in planes if plane.name.startswith("/device:")]
  yield from list(_operation_events(devices)) or _operation_events(planes)


def _operation_events(planes: list[Any]) -> Iterator[tuple[str, str, float]]:
  """Yields (instruction, kernel, seconds) of what runs an operation."""
  for plane in planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name is not None:
          yield str(name), event.name, event.duration_ns / 1e9


def _dims(shape: str) -> list[int]:
  """Returns the dimensions of the first array of a shape."""
  found = _SHAPE.search(shape)
  return [int(d) for d in found[2].split(",") if d] if found else []


def _elements(shape: str) -> int:
  """Returns the number of elements of the first array of a shape."""
  return math.prod(_dims(shape))


def _bytes(shape: str) -> float:
  """Returns the bytes of all arrays of a shape."""
  total = 0.0
  for dtype, dims in _SHAPE.findall(shape):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
  return total
