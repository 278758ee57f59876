"""Compiles the full pretraining step for TPUs, on a machine without one.

  pip install 'libtpu==0.0.42.*'
  python -m benchmarks.tpu_aot --topologies=v5e:2x4,v4:2x2x1
  python -m benchmarks.tpu_aot --topologies=v5e:2x4 --batch_per_device=128 \
    --config.model.encoder.remat=full --markdown=table.md

The TPU compiler itself says what one step needs: memory per device against
the size of the device's memory, and the collectives with their bytes. It also
estimates cycles. Nothing is executed, so nothing here is a measured speed.
Without --batch_per_device the largest batch is searched: powers of two until
one does not fit, then one between. A compile takes minutes.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import re
import shlex
import sys
import time

import jax
import ml_collections
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from audiomosaic_jax import contrastive, experiment
from benchmarks import hlo, train_step, weak_scaling

ConfigDict = ml_collections.ConfigDict

GIB = 2**30
# Memory per device that a program can use. For v4 and v5e what the compiler
# says when it refuses a program, of 32 and 16; for others the whole memory.
HBM_GIB = {
  "TPU v4": 30.75,
  "TPU v5 lite": 15.75,
  "TPU v5": 95,
  "TPU v6 lite": 32,
}


# Roles of collectives that may be all-gathers.
GATHERED = ("embeddings", "parameters", "views", "activations")


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler says about one topology and batch.

  Attributes:
    topology: name of the topology.
    device_kind: name of the device.
    num_devices: devices of the topology.
    batch_per_device: clips per device.
    tensor_devices: devices that share an encoder.
    flops_per_step: of the encoder, on one device.
    compile_s: time of the compilation.
    memory: bytes by kind, of `train_step.memory_bytes`; None if too much.
    refusal: the compiler's words when it is too much.
    collectives: role -> its collectives.
    cycles: part of the step -> estimated cycles.
  """

  topology: str
  device_kind: str
  num_devices: int
  batch_per_device: int
  tensor_devices: int
  flops_per_step: float
  compile_s: float = 0.0
  memory: dict[str, int] | None = None
  refusal: str = ""
  collectives: dict[str, list[hlo.Collective]] = dataclasses.field(
    default_factory=dict
  )
  cycles: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def fits(self) -> bool:
    """Whether it compiled and what it plans is not more than the HBM."""
    hbm = HBM_GIB.get(self.device_kind, float("inf")) * GIB
    return self.memory is not None and self.memory["total"] <= hbm


def topology_devices(name: str) -> list[jax.Device]:
  """Returns the devices of a TPU topology that is not there.

  Args:
    name: such as "v5e:2x4" or "v4:2x2x1".

  Raises:
    RuntimeError: libtpu is missing or does not know the topology.
  """
  # Keep libtpu from asking a metadata server and from locking a device.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  # On these chips JAX runs both cores as one device; here it must be asked to.
  megacore = name.startswith(("v4", "v5p"))
  options = {"chip_config_name": "megacore"} if megacore else {}
  try:
    return topologies.get_topology_desc(name, "tpu", **options).devices
  except Exception as error:
    raise RuntimeError(
      f"no compiler for topology {name!r} ({error}); install libtpu with "
      "pip install 'libtpu==0.0.42.*' and name it like v5e:2x4 or v4:2x2x1"
    ) from error


def compile_step(
  config: ConfigDict, topology: str, batch_per_device: int, hlo_dir: str
) -> Report:
  """Compiles the step of `config` for a topology and reads the result."""
  devices = topology_devices(topology)
  config = config.copy_and_resolve_references()
  config.batch_size = batch_per_device * len(devices)
  mesh = contrastive.make_mesh(config, devices)
  setup = train_step.build(config, mesh)
  lowered = setup.step.lower(*setup.shapes)
  report = Report(
    topology=topology,
    device_kind=devices[0].device_kind,
    num_devices=len(devices),
    batch_per_device=batch_per_device,
    tensor_devices=config.tensor_devices,
    flops_per_step=experiment.flops_per_pair(config) * batch_per_device,
  )
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return dataclasses.replace(
      report,
      compile_s=time.perf_counter() - start,
      refusal=out_of_memory(str(error)),
    )
  seconds = time.perf_counter() - start
  text = compiled.as_text()
  if hlo_dir:
    name = f"{topology.replace(':', '_')}_{batch_per_device}.hlo"
    pathlib.Path(hlo_dir).mkdir(parents=True, exist_ok=True)
    (pathlib.Path(hlo_dir) / name).write_text(text)
  roles = hlo.roles(text, config, train_step.parameter_shapes(setup))
  return dataclasses.replace(
    report,
    compile_s=seconds,
    memory=train_step.memory_bytes(compiled),
    collectives=roles,
    cycles=hlo.cycles(text, hlo.part),
  )


def out_of_memory(message: str) -> str:
  """Returns the part of the compiler's error that holds the sizes."""
  found = re.search(r"Used \S+ of \S+ hbm|total memory [^|\n]{0,140}", message)
  return found[0] if found else message.splitlines()[0][:120]


def search(compile_at, start: int) -> list:
  """Compiles powers of two until one does not fit, then one between.

  Args:
    compile_at: batch per device -> Report.
    start: first batch per device, halved until one fits.

  Returns:
    All reports, in the order in which they were made.
  """
  reports = [compile_at(start)]
  step = 2.0 if reports[0].fits else 0.5
  while batch := int(reports[-1].batch_per_device * step):
    reports.append(compile_at(batch))
    if reports[-1].fits == (step == 0.5):
      break
  fits = [r.batch_per_device for r in reports if r.fits]
  fails = [r.batch_per_device for r in reports if not r.fits]
  if fits and fails:
    between = (max(fits) + min(fails)) // 2
    if between not in (*fits, *fails):
      reports.append(compile_at(between))
  return reports


def verdicts(report: Report) -> list[str]:
  """Returns what was expected of the collectives, and whether it holds."""
  roles = report.collectives
  kinds = {c.kind for found in roles.values() for c in found}
  gradients = roles.get("gradients", [])
  runs = sum(c.times for c in gradients)
  checks = {
    "no all-to-all": not kinds & {"all-to-all", "ragged-all-to-all"},
    "no collective-permute": "collective-permute" not in kinds,
    "all-gathers of embeddings only, or of what devices share": all(
      name in GATHERED or c.kind != "all-gather"
      for name, found in roles.items()
      for c in found
    ),
    "no all-reduce in a loop of random length": (
      "scalars of a random loop" not in roles
    ),
    "nothing unexpected": "unexpected" not in roles,
    f"no gradient summed more than once ({len(gradients)} instructions, "
    f"{runs} runs)": len(gradients) == runs,
    "gradients summed in float32": all(
      dtype == "f32" for c in gradients for dtype, _ in c.shapes
    ),
  }
  return [f"{'yes' if ok else 'NO '}  {text}" for text, ok in checks.items()]


def collective_rows(report: Report) -> list[str]:
  """Returns a line per role: instructions, runs, bytes, types and shapes."""
  rows = []
  for name, found in report.collectives.items():
    kinds = sorted({c.kind for c in found})
    types = sorted({dtype for c in found for dtype, _ in c.shapes})
    runs = sum(c.times for c in found)
    sure = "" if all(c.counted for c in found) else " or more"
    megabytes = sum(c.num_bytes for c in found) / 1e6
    rows.append(
      f"| {name} | {', '.join(kinds)} | {len(found)} | {runs}{sure} | "
      f"{megabytes:.3f} | {', '.join(types)} |"
    )
  return rows


def memory_row(report: Report) -> str:
  """Returns the line of the table of memory and compile time."""
  r, hbm = report, HBM_GIB.get(report.device_kind)
  cells = [r.topology, r.num_devices, r.batch_per_device]
  cells.append(r.num_devices * r.batch_per_device)
  if r.memory:
    kinds = ("argument", "output", "alias", "temp", "code", "total")
    cells += [f"{r.memory[kind] / GIB:.2f}" for kind in kinds]
    result = "fits" if r.fits else "compiled, but plans more than the HBM"
    cells += [f"{hbm or '?'}", result]
  else:
    cells += ["-"] * 6 + [f"{hbm or '?'}", f"out of memory: {r.refusal}"]
  cells.append(f"{r.compile_s:.0f}")
  return f"| {' | '.join(map(str, cells))} |"


def versions() -> str:
  """Returns what compiled the step: names and versions of the packages."""
  return ", ".join(
    f"{name} {importlib.metadata.version(name)}"
    for name in ("jax", "flax", "libtpu")
  )


def page(reports: list[Report], command: str, versions: str) -> str:
  """Returns the report in Markdown; details for the largest batch that fits."""
  lines = [
    "# The pretraining step, compiled ahead of time for TPUs",
    "",
    "Compiled by the TPU compiler on a machine without a TPU; nothing was "
    "executed. Cycles are the compiler's own estimates.",
    "",
    f"{datetime.date.today()}, {versions}",
    "",
    f"```\n{command}\n```",
    "",
    "Per device, GiB. The total is argument + output - alias + temp + code.",
    "",
    "| topology | devices | batch per device | global batch | argument | "
    "output | alias | temp | code | total | HBM | result | compile s |",
    "|" + "---|" * 13,
    *map(memory_row, reports),
  ]
  for name in dict.fromkeys(r.topology for r in reports):
    fits = [r for r in reports if r.topology == name and r.fits]
    if fits:
      lines += details(max(fits, key=lambda r: r.batch_per_device))
  return "\n".join(lines) + "\n"


def details(report: Report) -> list[str]:
  """Returns collectives, scaling and estimated cycles of one compilation."""
  total = sum(report.cycles.values())
  lines = [
    "",
    f"## {report.topology}, {report.batch_per_device} clips per device",
    "",
    "```",
    *verdicts(report),
    "```",
    "",
    "| collectives | kind | instructions | runs per step | MB per device | "
    "types |",
    "|" + "---|" * 6,
    *collective_rows(report),
    "",
    "More devices at this batch per device, modelled as "
    "`benchmarks/weak_scaling.py` says:",
    "",
    weak_scaling.HEADER,
    "|" + "---|" * 6,
    *weak_scaling.rows(
      report.collectives,
      device_kind=report.device_kind,
      num_devices=report.num_devices,
      batch_per_device=report.batch_per_device,
      cycles=total,
      counts=tuple(report.num_devices * 4**i for i in range(4)),
      tensor_devices=report.tensor_devices,
    ),
    "",
    f"Estimated cycles: {total / 1e6:.0f} million for "
    f"{report.flops_per_step / 1e12:.1f} TFLOP of the encoder.",
    "",
    "| part | million cycles | share |",
    "|" + "---|" * 3,
  ]
  lines += [
    f"| {name} | {count / 1e6:.1f} | {100 * count / total:.1f} % |"
    for name, count in report.cycles.items()
  ]
  return lines


def main(argv: list[str]) -> None:
  """Prints the page after each topology, so that a long run can be read."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  jax.config.update("jax_platforms", "cpu")
  reports = []

  def compile_at(topology, batch):
    print(f"compiling {topology}, {batch} per device", flush=True)
    report = compile_step(CONFIG.value, topology, batch, HLO_DIR.value)
    reports.append(report)
    print(memory_row(report), flush=True)
    return report

  command = shlex.join(["python", "-m", "benchmarks.tpu_aot", *sys.argv[1:]])
  for topology in TOPOLOGIES.value:
    if BATCH_PER_DEVICE.value:
      for batch in BATCH_PER_DEVICE.value:
        compile_at(topology, int(batch))
    else:
      search(lambda batch, t=topology: compile_at(t, batch), START.value)
    text = page(reports, command, versions())
    print(text, flush=True)
    if MARKDOWN.value:
      pathlib.Path(MARKDOWN.value).write_text(text)


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/pretrain.py", "The experiment.", lock_config=True
  )
  TOPOLOGIES = flags.DEFINE_list(
    "topologies", "v5e:2x4,v4:2x2x1", "TPU topologies to compile for."
  )
  BATCH_PER_DEVICE = flags.DEFINE_list(
    "batch_per_device", "", "Clips per device; empty searches the largest."
  )
  START = flags.DEFINE_integer("start", 64, "Where the search starts.")
  MARKDOWN = flags.DEFINE_string("markdown", "", "File to write the page to.")
  HLO_DIR = flags.DEFINE_string("hlo_dir", "", "Folder for the programs' text.")
  app.run(main)
