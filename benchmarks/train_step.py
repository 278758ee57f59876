"""Times the training step that a config describes, whole and in pieces.

  python -m benchmarks.train_step --config=configs/pretrain.py:demo
  python -m benchmarks.train_step --config=configs/pretrain.py \
    --config.batch_size=512 --json=step.json

The batch is synthetic and on the device already, so this is what the devices
do and not what the host reads (benchmarks/input_pipeline.py). The pieces are
jitted on their own and timed in the same process; together they differ from
the whole, in which the compiler fuses across them.
"""

import functools
import json
import pathlib
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
  augment_fbank,
  augment_waveform,
  experiment,
  features,
  losses,
  masking,
  optimizer,
  pretrain,
  sharding,
  throughput,
  train_state,
)

ConfigDict = ml_collections.ConfigDict
PyTree = Any
# The schedule needs an end; its length changes no figure.
TOTAL_STEPS, WARMUP_STEPS = 1000, 100
# The forward pass alone is shown, but is part of the line after it.
SHOWN_TWICE = "encoder forward"


class Setup(NamedTuple):
  """A model with its compiled-to-be step, as `pretrain.build_job` makes them.

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

  def init(key):
    return train_state.create(init_model(key), tx)

  everywhere, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
  samples = (config.batch_size, config.data.pipeline.clip_samples)
  waveform = jax.ShapeDtypeStruct(samples, jnp.int16, sharding=split)

  def place(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

  state = jax.tree.map(place, jax.eval_shape(init, key))
  return Setup(
    model=model,
    tx=tx,
    init=jax.jit(init, out_shardings=everywhere),
    step=pretrain.jit_train_step(model, tx, config, mesh),
    shapes=(state, {"waveform": waveform}, place(key)),
  )


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


def view_functions(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Callable, Callable, Callable]:
  """Returns what makes both views: augment, filter bank, ids to keep.

  Example by example, as in `view.make`.
  """
  rate = config.fbank.sample_rate_hz

  def augment_one(key, waveform):
    waveform = augment_waveform.augment_waveform(
      key, waveform[None], sample_rate_hz=rate, **config.augment_waveform
    )
    return waveform[0]

  def fbank_one(key, waveform):
    fbank = augment_fbank.augment_fbank(
      key,
      features.log_mel_fbank(waveform[None], **config.fbank),
      low_freq_hz=config.fbank.low_freq_hz,
      high_freq_hz=config.fbank.high_freq_hz,
      **config.augment_fbank,
    )
    return features.standardize(fbank, **config.spectrogram)[0]

  def augmented(keys, pcm):
    waveform = features.pcm_to_float(pcm)
    change = sharding.map_examples(augment_one, mesh)
    return [change(jax.random.split(k, len(pcm)), waveform) for k in keys]

  def fbanks(keys, waveforms):
    change = sharding.map_examples(fbank_one, mesh)
    return [
      change(jax.random.split(key, len(waveform)), waveform)
      for key, waveform in zip(keys, waveforms, strict=True)
    ]

  def masks(keys):
    return [
      masking.keep_ids(
        key,
        config.batch_size,
        grid=experiment.token_grid(config),
        layout=config.masking.layout,
        **config.masking[view],
      )
      for key, view in zip(keys, experiment.VIEWS, strict=True)
    ]

  return augmented, fbanks, masks


def model_functions(
  setup: Setup, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Callable, Callable, Callable]:
  """Returns encoder of both views, its gradient, and loss with gradient."""
  model = setup.model
  encode_views = pretrain.encode_views(model, mesh)

  def encode(params, fbanks, ids, key):
    keys = jax.random.split(key, (2, config.batch_size))
    return encode_views(params, list(zip(fbanks, ids, keys, strict=True)))

  def summed(*args):
    return sum(jnp.sum(pooled) for pooled in encode(*args))

  def compare(params, batch_stats, pooled):
    project = functools.partial(
      model.apply, train=True, mutable="batch_stats", method="project"
    )
    variables = {"params": params, "batch_stats": batch_stats}
    projected = [project(variables, view)[0] for view in pooled]
    scale = 1 / config.model.temperature
    return losses.nt_xent(*projected, logit_scale=scale, logit_bias=0.0)[0]

  return encode, jax.grad(summed), jax.value_and_grad(compare, argnums=(0, 2))


def pieces(
  setup: Setup, config: ConfigDict, state, batch, key
) -> dict[str, tuple[Callable, tuple]]:
  """Returns name -> (jitted function, arguments) of the parts of a step.

  Both views are in every part. The arguments are computed here, so that each
  part is timed on what the part before it made.
  """
  mesh = batch["waveform"].sharding.mesh
  augmented, fbanks, masks = map(jax.jit, view_functions(config, mesh))
  encode, encode_grad, compare = map(
    jax.jit, model_functions(setup, config, mesh)
  )

  def update(grads, opt_state, params):
    updates, opt_state = setup.tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  keys = jax.random.split(key)
  waveforms = augmented(keys, batch["waveform"])
  encoder_args = (state.params, fbanks(keys, waveforms), masks(keys), key)
  pooled = encode(*encoder_args)
  params = state.params
  return {
    "augment": (augmented, (keys, batch["waveform"])),
    "fbank": (fbanks, (keys, waveforms)),
    "masks": (masks, (keys,)),
    SHOWN_TWICE: (encode, encoder_args),
    "encoder forward + backward": (encode_grad, encoder_args),
    "projector + loss": (compare, (params, state.batch_stats, pooled)),
    "optimiser": (jax.jit(update), (params, state.opt_state, params)),
  }


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
  config: ConfigDict, mesh: jax.sharding.Mesh, repeats: int, breakdown: bool
) -> dict:
  """Compiles and times the step on the devices of a mesh.

  Args:
    config: the experiment.
    mesh: from `sharding.make_mesh`.
    repeats: timed calls of the step and of every piece.
    breakdown: also time the pieces.

  Returns:
    The figures that `table` prints.
  """
  setup = build(config, mesh)
  device = mesh.devices.flat[0]
  start = time.perf_counter()
  compiled = setup.step.lower(*setup.shapes).compile()
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
  if breakdown:
    parts = pieces(setup, config, carry[0], batch, key)
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
    rest = whole - sum(ms for n, ms in parts.items() if n != SHOWN_TWICE)
    rows = [*parts.items(), ("whole minus pieces", rest), ("whole step", whole)]
    lines += ["", "piece, both views           |       ms | % of step"]
    lines += [
      f"{name:27} | {ms:8.1f} | {100 * ms / whole:9.1f}" for name, ms in rows
    ]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  mesh = sharding.make_mesh()
  figures = measure(CONFIG.value, mesh, REPEATS.value, BREAKDOWN.value)
  print(table(figures))
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/pretrain.py:demo", "The experiment.", lock_config=True
  )
  REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls.", lower_bound=1)
  BREAKDOWN = flags.DEFINE_bool("breakdown", True, "Time the pieces as well.")
  JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
  app.run(main)
