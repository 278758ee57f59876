"""The model step against the same step in PyTorch, on the same device.

  python -m benchmarks.versus_torch --device=cpu --rounds=5 \
    --config=configs/pretrain.py:variant=tiny,batch_size=8
  python -m benchmarks.versus_torch --device=cuda --turn_steps=10 \
    --config=configs/pretrain.py:batch_size=256 --json=versus.json

One step is the forward pass of both views, the backward pass and AdamW, on
spectrograms and ids of kept tokens that are on the device already: the same
batch, tokens, sizes and number type. Each program has a process of its own and
they take turns, so neither runs while another is timed. The last columns are
the ratio of their times in the same round, its median and its range: above 1
ours is faster.

Memory is the most that a process held while it trained: on a GPU of the
frameworks' own count, on a CPU of the process, libraries included; "libraries"
is what it held there before there was a model.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from audiomosaic_jax import contrastive, experiment, sharding, view
from benchmarks import report, train_step, turns

ConfigDict = ml_collections.ConfigDict
Figures = dict[str, Any]

OURS = "ours"
COMPILED, EAGER = "torch.compile", "torch eager"
MIB = 2**20


def keep_ids(config: ConfigDict) -> list[np.ndarray]:
  """Returns ids [B, K] of the tokens that each view keeps, drawn once."""
  keys = jax.random.split(jax.random.key(0))
  return [
    np.asarray(view.keep_ids(key, name, config))
    for key, name in zip(keys, experiment.VIEWS, strict=True)
  ]


def noise_fbanks(config: ConfigDict) -> list[np.ndarray]:
  """Returns noise in the shape [B, T, F] of each view."""
  rng = np.random.default_rng(0)
  shape = config.spectrogram.num_frames, config.fbank.num_mel_bins
  return [
    rng.standard_normal((config.batch_size, *shape), np.float32)
    for _ in experiment.VIEWS
  ]


def model_step(
  setup: train_step.Setup, config: ConfigDict, mesh: jax.sharding.Mesh
) -> Callable:
  """Returns our step without views, jitted, its state donated.

  It is (state, fbanks, ids, key) -> (state, loss).
  """
  update = contrastive.make_update(setup.model, setup.tx, config, mesh)

  def step(state, fbanks, ids, key):
    keys = jax.random.split(
      jax.random.fold_in(key, state.step), (2, config.batch_size)
    )
    inputs = list(zip(fbanks, ids, keys, strict=True))
    state, scalars, _ = update(state, inputs)
    return state, scalars["loss"]

  options = sharding.compiler_options(mesh)
  return jax.jit(step, donate_argnums=0, compiler_options=options)


def make_ours(config: ConfigDict, ids: list[np.ndarray]) -> Callable:
  """Returns the turn of our program: steps -> figures."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  libraries = turns.peak_memory()
  setup = train_step.build(config, mesh)
  step, key = model_step(setup, config, mesh), jax.random.key(0)
  rows = sharding.batch_sharded(mesh)
  dtype = config.model.encoder.dtype
  fbanks = [jnp.asarray(x, dtype) for x in noise_fbanks(config)]
  fbanks, placed = jax.device_put((fbanks, ids), rows)
  carry = [setup.init(key)]

  def train(steps: int) -> float:
    for _ in range(steps):
      carry[0], loss = step(carry[0], fbanks, placed, key)
    jax.block_until_ready(carry)
    return float(loss)

  device = mesh.devices.flat[0]
  if device.memory_stats():
    # It has no reset: what compiling and the first step took counts, too.
    return _turn(
      train,
      peak=lambda: device.memory_stats()["peak_bytes_in_use"],
      reset=lambda: None,
      libraries=0,
    )
  return _turn(train, turns.peak_memory, turns.reset_peak_memory, libraries)


def make_theirs(
  config: ConfigDict, ids: list[np.ndarray], device: str, compiled: bool
) -> Callable:
  """Returns the turn of PyTorch: steps -> figures."""
  import torch

  from benchmarks import torch_model

  torch.manual_seed(0)
  # On a GPU JAX multiplies float32 matrices in TF32 too.
  torch.set_float32_matmul_precision("high")
  libraries = turns.peak_memory()
  model = torch_model.AudioMosaic(config, experiment.token_grid(config))
  step = torch_model.make_step(model.to(device), config, compiled=compiled)
  dtype = getattr(torch, config.model.encoder.dtype)
  fbanks = [torch.from_numpy(x).to(device, dtype) for x in noise_fbanks(config)]
  placed = [torch.tensor(x, device=device).long() for x in ids]

  def train(steps: int) -> float:
    for _ in range(steps):
      loss = step(fbanks, placed, config.schedule.base_lr)
    return float(loss)  # Waits for the device.

  if device == "cuda":
    cuda = torch.cuda
    peak, reset = cuda.max_memory_allocated, cuda.reset_peak_memory_stats
    return _turn(train, peak, reset, 0)
  return _turn(train, turns.peak_memory, turns.reset_peak_memory, libraries)


def _turn(
  train: Callable, peak: Callable, reset: Callable, libraries: int
) -> Callable:
  """Returns the turn of a program, after its first step.

  Args:
    train: number of steps -> the last loss, when all is done.
    peak: returns the most bytes of memory held since `reset`.
    reset: forgets the memory that compiling took.
    libraries: bytes held before there was a model.
  """
  start = time.perf_counter()
  first_loss = train(1)
  first_s = time.perf_counter() - start
  reset()

  def turn(steps: int) -> Figures:
    start = time.perf_counter()
    train(steps)
    return {
      "step_s": (time.perf_counter() - start) / steps,
      "first_loss": first_loss,
      "first_step_s": first_s,
      "peak_bytes": peak(),
      "libraries_bytes": libraries,
    }

  return turn


def players(
  config: ConfigDict, device: str, theirs: list[str], stack
) -> list[turns.Player]:
  """Starts our program and PyTorch's, each in a process of its own.

  Args:
    config: the experiment.
    device: "cpu" or "cuda".
    theirs: of COMPILED and EAGER.
    stack: `contextlib.ExitStack` that ends the processes.
  """
  ids = keep_ids(config)
  # A GPU is shared: nobody may take all of its memory.
  environment = {
    "JAX_PLATFORMS": device,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  start = functools.partial(
    turns.Player,
    environment=environment,
    keep_freed_memory=config.runtime.keep_freed_memory,
  )
  ours = start(OURS, make_ours, (config, ids))
  found = [stack.enter_context(ours)]
  # What JAX computes for PyTorch's inputs is no work for the GPU.
  environment["JAX_PLATFORMS"] = "cpu"
  for name in theirs:
    arguments = (config, ids, device, name == COMPILED)
    found.append(stack.enter_context(start(name, make_theirs, arguments)))
  return found


def summarize(
  said: dict[str, list[Figures]], batch_size: int
) -> dict[str, Figures]:
  """Returns the figures of each program over all rounds.

  Args:
    said: name -> what `turns.play` returned.
    batch_size: pairs per step.
  """
  ours = [turn["step_s"] for turn in said[OURS]]
  found = {}
  for name, played in said.items():
    seconds = [turn["step_s"] for turn in played]
    ratios = [t / o for t, o in zip(seconds, ours, strict=True)]
    found[name] = played[-1] | {
      "step_s": statistics.median(seconds),
      "all_step_s": seconds,
      "pairs_per_s": batch_size / statistics.median(seconds),
      "ratio": statistics.median(ratios),
      "ratios": ratios,
    }
  return found


def table(figures: Figures) -> str:
  """Returns the figures of a run as text."""
  rows = [
    [
      name,
      f"{1e3 * row['step_s']:.1f}",
      f"{1e3 * min(row['all_step_s']):.1f}",
      f"{row['pairs_per_s']:.2f}",
      f"{row['peak_bytes'] / MIB:.0f}",
      f"{row['libraries_bytes'] / MIB:.0f}",
      f"{row['first_step_s']:.1f}",
      f"{row['first_loss']:.3f}",
      f"{row['ratio']:.2f}",
      f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}",
    ]
    for name, row in figures["programs"].items()
  ]
  return report.table_text(
    f"model step of {figures['batch_size']} pairs, {figures['tokens']} tokens, "
    f"{figures['dtype']}, on {figures['device']}",
    [
      "program",
      "ms median",
      "ms min",
      "pairs/s",
      "peak MiB",
      "libraries MiB",
      "first step s",
      "first loss",
      "its time / ours",
      "range",
    ],
    rows,
  )


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  # This process computes little, and no GPU is to be busy with it.
  jax.config.update("jax_platforms", "cpu")
  config = CONFIG.value
  with contextlib.ExitStack() as stack:
    playing = players(config, DEVICE.value, TORCH.value, stack)
    said = turns.play(playing, ROUNDS.value, TURN_STEPS.value)
  tokens = experiment.tokens_per_view(config)
  figures = {
    "device": DEVICE.value,
    "batch_size": config.batch_size,
    "tokens": " + ".join(str(count) for count in tokens.values()),
    "dtype": config.model.encoder.dtype,
    "config": config.to_dict(),
    "programs": summarize(said, config.batch_size),
  }
  print(table(figures))
  report.write_json(JSON.value, figures, DEVICE.value)


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file(
    "config",
    "configs/pretrain.py:variant=tiny,batch_size=8",
    "The experiment.",
    lock_config=True,
  )
  DEVICE = flags.DEFINE_enum("device", "cpu", ("cpu", "cuda"), "Where.")
  TORCH = flags.DEFINE_multi_enum(
    "torch", [COMPILED, EAGER], (COMPILED, EAGER), "Ways to run PyTorch."
  )
  ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each.", lower_bound=1)
  TURN_STEPS = flags.DEFINE_integer(
    "turn_steps", 1, "Steps of each turn.", lower_bound=1
  )
  JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
  app.run(main)
