"""Times the training step that a config describes, whole and in pieces.

  python -m benchmarks.train_step --config=configs/pretrain.py:demo
  python -m benchmarks.train_step --config=configs/pretrain.py \
    --config.batch_size=512 --json=step.json
  python -m benchmarks.train_step --profile=runs/profile

The batch is synthetic and on the device already, so this is what the devices
do and not what the host reads (benchmarks/input_pipeline.py). The pieces are
jitted on their own and timed in the same process; together they differ from
the whole, in which the compiler fuses across them. --profile writes a trace of
`jax.profiler` and shows the longest operations and what bounds each.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from audiomosaic_jax import (
  contrastive,
  experiment,
  optimizer,
  sharding,
  throughput,
)
from benchmarks import profile_table, report, step_pieces

ConfigDict = ml_collections.ConfigDict
PyTree = Any
# The schedule needs an end; its length changes no figure.
TOTAL_STEPS, WARMUP_STEPS = 1000, 100
SHOWN_OPERATIONS = 25


class Setup(NamedTuple):
  """A model with its compiled-to-be step, as `pretrain.build_job` makes it.

  Attributes:
    model: the AudioMosaic module.
    tx: its optimiser.
    init: key -> TrainState.
    step: jitted (state, batch, key) -> (state, scalars, views).
    shapes: shapes and shardings of (state, batch, key).
  """

  model: Any
  tx: optax.GradientTransformation
  init: Callable
  step: Callable
  shapes: tuple

  def compile(self) -> jax.stages.Compiled:
    """Returns the compiled step; a persistent cache serves all who ask."""
    return self.step.lower(*self.shapes).compile()


def build(config: ConfigDict, mesh: jax.sharding.Mesh) -> Setup:
  """Builds the step for a mesh, which need not exist on this machine.

  Args:
    config: the experiment.
    mesh: from `sharding.make_mesh`.

  Raises:
    ValueError: the batch does not divide evenly over the devices.
  """
  sharding.local_batch_size(config.batch_size, mesh)
  model = experiment.build_model(config)
  init_model = functools.partial(experiment.init_variables, model, config)
  key = jax.eval_shape(lambda: jax.random.key(0))
  schedule = optimizer.make_schedule(
    **config.schedule, warmup_steps=WARMUP_STEPS, total_steps=TOTAL_STEPS
  )
  params = jax.eval_shape(init_model, key)["params"]
  tx = optimizer.make_optimizer(params, schedule=schedule, **config.optimizer)

  init, step = contrastive.jit_init_and_step(model, tx, config, mesh)
  samples = (config.batch_size, config.data.pipeline.clip_samples)
  rows = sharding.batch_sharded(mesh)
  waveform = jax.ShapeDtypeStruct(samples, jnp.int16, sharding=rows)

  everywhere = sharding.replicated(mesh)
  return Setup(
    model=model,
    tx=tx,
    init=init,
    step=step,
    shapes=(
      # With the shardings that `init` gives its results.
      jax.eval_shape(init, key),
      {"waveform": waveform},
      jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
    ),
  )


def parameter_shapes(setup: Setup) -> set[tuple[int, ...]]:
  """Returns the shapes of the parameters, and of parts on the tensor axis.

  A step that splits the state on the data axis gathers it before its use.
  """
  params = setup.shapes[0].params
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  gathered = sharding.state_sharding(params, mesh, split=False)
  leaves, places = map(jax.tree.leaves, (params, gathered))
  parts = {
    place.shard_shape(leaf.shape)
    for leaf, place in zip(leaves, places, strict=True)
  }
  return {leaf.shape for leaf in leaves} | parts


def synthetic_batch(shape: jax.ShapeDtypeStruct) -> dict[str, jax.Array]:
  """Returns noise in the shape and on the devices of a batch."""
  rng = np.random.default_rng(0)
  pcm = rng.integers(-8192, 8192, shape.shape, np.int16)
  return {"waveform": jax.device_put(pcm, shape.sharding)}


def memory_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns what the compiler has planned per device.

  Args:
    compiled: an executable.

  Returns:
    Bytes of "argument", "output", "alias" (outputs that reuse arguments),
    "temp" and "code", and "total", what has to fit at once.
  """
  plan = compiled.memory_analysis()
  kinds = ("argument", "output", "alias", "temp", "generated_code")
  sizes = {kind: getattr(plan, f"{kind}_size_in_bytes") for kind in kinds}
  sizes["code"] = sizes.pop("generated_code")
  sizes["total"] = sum(sizes.values()) - 2 * sizes["alias"]
  return sizes


def time_ms(function: Callable, repeats: int) -> list[float]:
  """Returns milliseconds of each call, after one that is not counted."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(1e3 * (time.perf_counter() - start))
  return times


def measure(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  repeats: int,
  breakdown: bool,
  profile: str,
) -> dict:
  """Compiles and times the step on the devices of a mesh.

  Args:
    config: the experiment.
    mesh: from `sharding.make_mesh`.
    repeats: timed calls of the step and of every piece.
    breakdown: also time the pieces.
    profile: folder for a trace of so many steps more; "" for none.

  Returns:
    The figures that `table` prints.
  """
  setup = build(config, mesh)
  device = mesh.devices.flat[0]
  start = time.perf_counter()
  compiled = setup.compile()
  compile_s = time.perf_counter() - start
  key = jax.random.key(0)
  batch = synthetic_batch(setup.shapes[1]["waveform"])
  carry = [setup.init(key)]

  def step():
    carry[0], scalars, _ = compiled(carry[0], batch, key)
    return scalars

  times = time_ms(step, repeats)
  # Before the pieces run: they hold more at once than the step does.
  stats = device.memory_stats() or {}
  planned = memory_bytes(compiled)["total"]
  median_ms = statistics.median(times)
  pairs_per_s = 1e3 * config.batch_size / median_ms
  flops_per_pair = experiment.flops_per_pair(config)
  peak = throughput.peak_flops(device, config.runtime.peak_flops_per_device)
  figures = {
    "device": f"{mesh.devices.size} x {device.device_kind}",
    "batch_size": config.batch_size,
    "step_ms_median": median_ms,
    "step_ms_min": min(times),
    "repeats": repeats,
    "pairs_per_s": pairs_per_s,
    "flops_per_pair": flops_per_pair,
    "mfu": pairs_per_s * flops_per_pair / (peak * mesh.devices.size),
    "memory_bytes_per_device": stats.get("peak_bytes_in_use", planned),
    "memory_source": "measured" if stats else "planned by the compiler",
    "compile_s": compile_s,
  }
  if profile:
    profile_table.record(step, profile, repeats)
    figures["operations"] = profile_table.describe(
      profile_table.operations(compiled.as_text(), profile, repeats),
      peak_flops=peak,
      bandwidth=profile_table.timed_bandwidth(device),
    )
  if breakdown:
    parts = step_pieces.pieces(setup, config, carry[0], batch, key)
    figures["pieces_ms"] = {
      name: statistics.median(
        time_ms(functools.partial(function, *args), repeats)
      )
      for name, (function, args) in parts.items()
    }
  return figures


def table(figures: dict) -> str:
  """Returns the figures of `measure` as text."""
  lines = [
    f"device              {figures['device']}",
    f"batch size          {figures['batch_size']}",
    f"step                {figures['step_ms_median']:.1f} ms median, "
    f"{figures['step_ms_min']:.1f} ms min of {figures['repeats']}",
    f"pairs/s             {figures['pairs_per_s']:.1f}",
    f"GFLOP per pair      {figures['flops_per_pair'] / 1e9:.2f} "
    "(encoder, forward and backward)",
    f"MFU                 {100 * figures['mfu']:.1f} %",
    f"memory per device   {figures['memory_bytes_per_device'] / 2**20:.0f} MiB "
    f"({figures['memory_source']})",
    f"compile             {figures['compile_s']:.1f} s",
  ]
  if parts := figures.get("pieces_ms"):
    whole = figures["step_ms_median"]
    rest = whole - sum(
      ms for n, ms in parts.items() if n != step_pieces.SHOWN_TWICE
    )
    rows = [*parts.items(), ("whole minus pieces", rest), ("whole step", whole)]
    lines += ["", "piece, both views           |       ms | % of step"]
    lines += [
      f"{name:27} | {ms:8.1f} | {100 * ms / whole:9.1f}" for name, ms in rows
    ]
  if operations := figures.get("operations"):
    lines += ["", profile_table.table(operations, SHOWN_OPERATIONS)]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  mesh = sharding.make_mesh()
  if COMPILE_ONLY.value:
    build(CONFIG.value, mesh).compile()
    return
  figures = measure(
    CONFIG.value, mesh, REPEATS.value, BREAKDOWN.value, PROFILE.value
  )
  print(table(figures))
  report.write_json(JSON.value, figures, figures["device"])


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/pretrain.py:demo", "The experiment.", lock_config=True
  )
  REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls.", lower_bound=1)
  BREAKDOWN = flags.DEFINE_bool("breakdown", True, "Time the pieces as well.")
  PROFILE = flags.DEFINE_string("profile", "", "Folder to write a trace to.")
  COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Only leave the program in JAX's cache."
  )
  JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
  app.run(main)
