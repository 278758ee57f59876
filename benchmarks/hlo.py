"""Reads what a compiled program does from its HLO text.

Which collectives run between devices, how often and on how many bytes, and how
many cycles the TPU compiler expects each part to take. An instruction inside a
loop counts once per turn; loops whose length depends on data count as one turn
and are marked.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

import ml_collections

from audiomosaic_jax import experiment

ConfigDict = ml_collections.ConfigDict

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "collective-permute",
  "all-to-all",
  "ragged-all-to-all",
  "collective-broadcast",
)

Shape = tuple[str, tuple[int, ...]]

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction that moves data between devices.

  Attributes:
    kind: a name in KINDS.
    shapes: (dtype, dimensions) of the results on one device.
    times: how often it runs in a step.
    counted: False if a loop around it has a length that depends on data;
      `times` then counts one turn of it.
    op_name: where in the traced program it comes from.
  """

  kind: str
  shapes: tuple[Shape, ...]
  times: int
  counted: bool
  op_name: str

  @property
  def num_bytes(self) -> int:
    """Bytes of the results on one device, of all the times it runs."""
    sizes = (math.prod(dims) * _width(dtype) for dtype, dims in self.shapes)
    return self.times * sum(sizes)


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program, in program order."""
  found = []
  for line, times, counted in instructions(text, inside_fusions=True):
    match = _COLLECTIVE.search(line)
    if not match:
      continue
    result, kind, start = match.groups()
    shapes = tuple(
      (dtype, tuple(int(d) for d in dims.split(",") if d))
      for dtype, dims in _SHAPE.findall(result)
    )
    if start and kind != "all-reduce":
      # A started gather or permute returns its operands first.
      shapes = shapes[len(shapes) // 2 :]
    found.append(Collective(kind, shapes, times, counted, _op_name(line)))
  return found


def cycles(text: str, part: Callable[[str], str]) -> dict[str, int]:
  """Adds up the TPU compiler's estimates of cycles, by part of the program.

  Args:
    text: HLO text of a program compiled for TPU.
    part: from an instruction's op name to the part it belongs to. What the
      compiler made itself carries no name; it takes that of its loop.

  Returns:
    part -> cycles on one device, largest first. An estimate, not a measurement.
  """
  total = collections.Counter()
  for line, times, _ in instructions(text, inside_fusions=False):
    estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
    if estimate:
      total[part(_op_name(line))] += times * int(estimate[1])
  return dict(total.most_common())


def roles(
  text: str, config: ConfigDict, shapes: Iterable[tuple[int, ...]]
) -> dict[str, list[Collective]]:
  """Returns role -> the collectives of a compiled program that play it."""
  found, shapes = {}, set(shapes)
  for collective in collectives(text):
    found.setdefault(role(collective, config, shapes), []).append(collective)
  return found


def role(
  collective: Collective, config: ConfigDict, shapes: Iterable[tuple[int, ...]]
) -> str:
  """Says what a collective is for, from its kind and shapes.

  Args:
    collective: the instruction.
    config: the experiment, with the global batch size.
    shapes: shapes of all parameters, and of their parts on the tensor axis.

  Returns:
    "embeddings" (or a number for each), "embedding gradients", "parameters",
    "BatchNorm statistics", "scalars", "scalars of a random loop", "gradients",
    "activations" and "views" (of devices that share an encoder), or
    "unexpected".
  """
  projector = config.model.projector
  embedding = (config.batch_size, projector.out_features)
  dims = {shape for _, shape in collective.shapes}
  if config.tensor_devices > 1:
    if all(_is_activation(shape, config) for shape in dims):
      return "activations"
    if all(_is_view(shape, config) for shape in dims):
      return "views"
  if collective.kind == "all-gather":
    if dims <= {embedding, (config.batch_size,)}:
      return "embeddings"
    shared = config.tensor_devices > 1
    known = set(shapes) | (_qkv(config) if shared else set())
    divided = config.split_state or shared
    return "parameters" if divided and dims <= known else "unexpected"
  if collective.kind == "reduce-scatter" and config.split_state:
    return "gradients"
  if collective.kind != "all-reduce":
    return "unexpected"
  if dims == {(config.batch_size,)}:
    # On a pod gathers become sums, of rows that are zero but for their own.
    return "embeddings"
  if dims == {()}:
    return "scalars" if collective.counted else "scalars of a random loop"
  statistics = {(projector.hidden_features,), (projector.out_features,)}
  if dims <= statistics:
    return "BatchNorm statistics"
  # Some statistics may have been combined with them.
  if dims - statistics == {embedding}:
    return "embedding gradients"
  # A loop over stacked blocks would reduce one block at a time, [1, ...]. The
  # compiler may compute the gradient of a matrix transposed, and reduce that
  # of the positions without the class token's.
  tokens = math.prod(experiment.token_grid(config))
  known = {(), (tokens, config.model.encoder.width)}
  known |= {_squeezed(shape[i:]) for shape in shapes for i in (0, 1)}
  # Biases of channels that devices share out are whole, their gradients not.
  parts = config.tensor_devices
  known |= {(*shape[:-1], shape[-1] // parts) for shape in known if shape}
  known |= {shape[::-1] for shape in known if len(shape) == 2}
  return "gradients" if set(map(_squeezed, dims)) <= known else "unexpected"


def _is_activation(shape: tuple[int, ...], config: ConfigDict) -> bool:
  """Whether it is tokens of some clips, that blocks hand on, or their means."""
  tokens = experiment.tokens_per_view(config).values()
  width = config.model.encoder.width
  known = {(width,)} | {(count, width) for count in tokens}
  return _squeezed(shape)[1:] in known


def _qkv(config: ConfigDict) -> set[tuple[int, ...]]:
  """Returns the shapes of q, k and v's kernel and bias, one beside another."""
  width = config.model.encoder.width
  return {(3, width), (width, 3, width)}


def _is_view(shape: tuple[int, ...], config: ConfigDict) -> bool:
  """Whether it is what an encoder takes of some clips: spectrograms, ids."""
  tokens = experiment.tokens_per_view(config).values()
  kept = {(count - config.model.encoder.class_token,) for count in tokens}
  frames, bands = config.spectrogram.num_frames, config.fbank.num_mel_bins
  return _squeezed(shape)[1:] in {(frames, bands)} | kept


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(size for size in shape if size != 1)


def part(op_name: str) -> str:
  """Names the part of the step that an instruction belongs to."""
  for pattern, name in PARTS.items():
    if re.search(pattern, op_name):
      return name
  return "rest: filters, fbank, masks, optimiser, copies"


# First match wins; op names are those that JAX gives to traced functions.
PARTS = {
  r"transpose\(jvp\(.*(AudioMosaic|shard_map)": "model backward",
  r"jvp\(.*(AudioMosaic|shard_map)": "model forward",
  r"be,ne->bn": "loss",
  r"jit\(fft\)": "Fourier transforms",
  r"_roll_dynamic": "roll",
  r"_beta": "random gain",
  r"take_along_axis": "phase vocoder: gather",
  r"shard_map/vmap\(augment\)/.*while": "phase vocoder: scan",
}


def instructions(
  text: str, *, inside_fusions: bool
) -> Iterator[tuple[str, int, bool]]:
  """Yields (line, times it runs, whether that number is certain).

  Args:
    text: HLO text of a compiled program.
    inside_fusions: also yield what a fusion computes. Its time is stated once
      for the whole, but a collective can be hidden in it.
  """
  bodies, entry = _computations(text)

  def walk(name, times, counted, outer):
    for line in bodies[name]:
      op_name = _op_name(line) or outer
      yield _named(line, op_name), times, counted
      turns, certain = 1, True
      if " while(" in line:
        condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
        length = _loop_length(bodies[condition])
        turns, certain = length or 1, length is not None
      if " fusion(" in line and not inside_fusions:
        continue
      called = _CALLED.findall(line)
      for names in _BRANCHES.findall(line):
        called += [n.strip().lstrip("%") for n in names.split(",")]
      for child in called:
        if child in bodies:
          yield from walk(child, times * turns, counted and certain, op_name)

  yield from walk(entry, 1, True, "")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns computation name -> its lines, and the name of the entry."""
  bodies, name, entry = {}, None, None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name = header[2]
      bodies[name] = []
      entry = name if header[1] else entry
    elif name and line.startswith("  "):
      bodies[name].append(line)
  if entry is None:
    raise ValueError("no ENTRY computation; pass the text of compiled HLO")
  return bodies, entry


def _loop_length(condition: list[str]) -> int | None:
  """Returns n of a condition `i < n` with constant n, else None."""
  root = next(line for line in condition if line.lstrip().startswith("ROOT"))
  limits = [
    int(value)
    for line in condition
    for value in re.findall(r"= s32\[\]\S* constant\((\d+)\)", line)
  ]
  plain = " compare(" in root and "direction=LT" in root and len(limits) == 1
  return limits[0] if plain else None


def _op_name(line: str) -> str:
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ""


def _named(line: str, op_name: str) -> str:
  """Gives an instruction without a name that of what surrounds it."""
  if not op_name or "op_name=" in line:
    return line
  return f'{line} op_name="{op_name}"'


def _width(dtype: str) -> int:
  """Returns the bytes of one element."""
  bits = re.search(r"\d+", dtype)
  return max(int(bits[0]) // 8, 1) if bits else 1
