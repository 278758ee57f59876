"""From audio files to trained pairs: what people run now against this package.

  python -m benchmarks.whole_path --device=cpu --rounds=3 \
    --config=configs/pretrain.py:variant=micro,batch_size=8
  python -m benchmarks.whole_path --device=cuda --workers=16 --turn_steps=32 \
    --config=configs/pretrain.py:batch_size=256 --json=whole_path.json

Theirs: worker processes of a PyTorch DataLoader decode, augment twice with
audiomentations and make Kaldi filter banks (torchaudio; numpy where it is not
installed); then the PyTorch step. Ours: threads decode 16-bit samples, and the
jitted step augments, makes the filter banks and trains. Both read the same wav
files, train the same model and keep as many tokens. Each is a process with its
own workers, and they take turns. A turn starts with empty queues and ends when
all it read is trained on, as a short epoch does.

"host CPU" is from turns that make batches and do not train: the CPU time of
all processes and threads per pair. Where the device is the CPU too, training
adds to it. Ours reads ahead, so it pays for up to `prefetch_size` + 1 batches,
and what its threads have begun, that its turn does not use.
"""

import contextlib
import functools
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from audiomosaic_jax import experiment, sharding
from audiomosaic_jax.data import datasets, pipeline
from benchmarks import (
  host_pairs,
  input_pipeline,
  report,
  train_step,
  turns,
  versus_torch,
)
from configs import pretrain

ConfigDict = ml_collections.ConfigDict
Figures = dict[str, Any]

OURS, THEIRS = "ours", "host + torch"


def make_ours(config: ConfigDict, folder: str) -> Callable:
  """Returns our turn: (steps, train) -> figures."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  setup, key = train_step.build(config, mesh), jax.random.key(0)
  source = datasets.guard(
    datasets.make_dataset(
      **config.data.source, sample_rate_hz=config.fbank.sample_rate_hz
    ),
    **config.data.guard,
    report_path=pathlib.Path(folder) / "bad_clips.jsonl",
  )
  batches = pipeline.train_iterator(
    source,
    seed=0,
    batch_size=config.batch_size,
    process_index=0,
    process_count=1,
    weights=None,
    **config.data.pipeline,
  )
  split = sharding.batch_sharded(mesh)
  step, state, done = setup.compile(), [setup.init(key)], [0]

  def run(steps: int, train: bool) -> None:
    for _ in range(steps):
      batch = {"waveform": next(batches)["waveform"]}
      batch = sharding.put_batch(batch, split)
      if train:
        state[0], _, _ = step(state[0], batch, key)
    jax.block_until_ready((state, batch))
    done[0] += steps
    # Ends reading ahead; the next turn goes on from here.
    pipeline.set_step(batches, done[0])

  run(1, True)
  return functools.partial(_turn, run, config.batch_size)


def make_theirs(
  config: ConfigDict,
  folder: str,
  ids: list[np.ndarray],
  device: str,
  workers: int,
  compiled: bool,
) -> Callable:
  """Returns the turn of what people run now: (steps, train) -> figures.

  Args:
    config: the experiment.
    folder: of wav files of one clip each.
    ids: [B, K] tokens to keep of each view; drawing them costs nothing here.
    device: "cpu" or "cuda".
    workers: processes of the DataLoader.
    compiled: use `torch.compile`.
  """
  import torch

  from benchmarks import torch_model

  torch.set_float32_matmul_precision("high")
  model = torch_model.AudioMosaic(config, experiment.token_grid(config))
  step = torch_model.make_step(model.to(device), config, compiled=compiled)
  dtype = getattr(torch, config.model.encoder.dtype)
  placed = [torch.tensor(x, device=device).long() for x in ids]
  paths = sorted(str(path) for path in pathlib.Path(folder).glob("*.wav"))
  _, fbank = host_pairs.host_fbank(config)
  pairs, rng = (
    host_pairs.HostPairs(paths, config, fbank),
    np.random.default_rng(0),
  )
  pairs[0]  # What is imported late is imported before the workers fork.

  def run(steps: int, train: bool) -> None:
    count = steps * config.batch_size
    loader = torch.utils.data.DataLoader(
      pairs,
      batch_size=config.batch_size,
      sampler=rng.integers(len(paths), size=count).tolist(),
      num_workers=workers,
      # PyTorch's way on Linux; a spawned process would spawn its own.
      multiprocessing_context="fork",
      pin_memory=device == "cuda",
    )
    for batch in loader:
      batch = batch.to(device, dtype, non_blocking=True)
      if train:
        loss = step(batch.unbind(1), placed, config.schedule.base_lr)
    if train:
      float(loss)  # Waits for the device.

  run(1, True)
  return functools.partial(_turn, run, config.batch_size)


def _turn(run: Callable, batch_size: int, steps: int, train: bool) -> Figures:
  """Returns pairs/s and CPU seconds per pair of some steps."""
  start, cpu = time.perf_counter(), _cpu_seconds()
  run(steps, train)
  seconds, pairs = time.perf_counter() - start, steps * batch_size
  return {
    "pairs_per_s": pairs / seconds,
    "cpu_s_per_pair": (_cpu_seconds() - cpu) / pairs,
  }


def _cpu_seconds() -> float:
  """Returns CPU time of this process and of its ended children."""
  usages = map(
    resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def summarize(
  trained: dict[str, list[Figures]], read: dict[str, list[Figures]]
) -> dict[str, Figures]:
  """Returns medians over the rounds, and ratios between the two programs.

  Args:
    trained: what `turns.play` returned of whole turns.
    read: the same of turns that do not train.
  """

  def values(said, name, key):
    return [turn[key] for turn in said[name]]

  found = {}
  for name in (THEIRS, OURS):
    speed = values(trained, name, "pairs_per_s")
    found[name] = {
      "pairs_per_s": statistics.median(speed),
      "all_pairs_per_s": speed,
      "cpu_s_per_pair": statistics.median(
        values(trained, name, "cpu_s_per_pair")
      ),
      "host_cpu_s_per_pair": statistics.median(
        values(read, name, "cpu_s_per_pair")
      ),
      "host_pairs_per_s": statistics.median(values(read, name, "pairs_per_s")),
    }
  speeds = [values(trained, name, "pairs_per_s") for name in (OURS, THEIRS)]
  host = [values(read, name, "cpu_s_per_pair") for name in (THEIRS, OURS)]
  found["ratio"] = {
    "pairs_per_s": _median_ratio(*speeds),
    "host_cpu": _median_ratio(*host),
  }
  return found


def _median_ratio(above: list[float], below: list[float]) -> float:
  return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(figures: Figures) -> str:
  """Returns the figures of a run as text."""
  programs, ratio = figures["programs"], figures["programs"]["ratio"]
  rows = [
    [
      name,
      f"{programs[name]['pairs_per_s']:.2f}",
      f"{1e3 * programs[name]['cpu_s_per_pair']:.1f}",
      f"{programs[name]['host_pairs_per_s']:.1f}",
      f"{1e3 * programs[name]['host_cpu_s_per_pair']:.2f}",
    ]
    for name in (THEIRS, OURS)
  ]
  text = report.table_text(
    f"from wav files to trained pairs, batch {figures['batch_size']}, "
    f"{figures['workers']} workers, {figures['dtype']}, fbank of theirs: "
    f"{figures['fbank']}, on {figures['device']}",
    [
      "program",
      "pairs/s",
      "CPU ms per pair",
      "input alone pairs/s",
      "host CPU ms per pair",
    ],
    rows,
  )
  return (
    f"{text}\n{ratio['pairs_per_s']:.2f} times the pairs/s; "
    f"{ratio['host_cpu']:.1f} times less host CPU per pair (medians of ratios "
    "per round)"
  )


def run(
  config: ConfigDict,
  folder: str,
  *,
  device: str,
  workers: int,
  rounds: int,
  turn_steps: int,
  compiled: bool,
) -> dict[str, Figures]:
  """Returns the figures of both programs.

  Args:
    config: the experiment.
    folder: of wav files of one clip each.
    device: "cpu" or "cuda".
    workers: threads of ours, processes of theirs.
    rounds: turns of each, with and without training.
    turn_steps: batches of a turn.
    compiled: use `torch.compile`.
  """
  with config.unlocked():
    pretrain.folder(config)
  config.data.source.data_dir = folder
  config.data.pipeline.num_threads = workers
  ids = versus_torch.keep_ids(config)
  # A GPU is shared: nobody may take all of its memory.
  environment = {
    "JAX_PLATFORMS": device,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  theirs = (config, folder, ids, device, workers, compiled)
  programs = [
    (OURS, make_ours, (config, folder), environment),
    (THEIRS, make_theirs, theirs, environment | {"JAX_PLATFORMS": "cpu"}),
  ]
  keep = config.runtime.keep_freed_memory
  with contextlib.ExitStack() as stack:
    players = [
      stack.enter_context(turns.Player(*program, keep)) for program in programs
    ]
    trained, read = (
      turns.play(players, rounds, turn_steps, train) for train in (True, False)
    )
  return summarize(trained, read)


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  workers = WORKERS.value
  turn_steps = TURN_STEPS.value or max(8, workers)
  if turn_steps < workers:
    raise app.UsageError(
      "a worker of PyTorch makes whole batches: with --turn_steps="
      f"{turn_steps} only so many of --workers={workers} would work; give at "
      "least as many steps"
    )
  # This process computes little, and no GPU is to be busy with it.
  jax.config.update("jax_platforms", "cpu")
  config = CONFIG.value
  with tempfile.TemporaryDirectory() as folder:
    samples = config.data.pipeline.clip_samples
    host_pairs.write_clips(folder, AUDIO_DIR.value, FILES.value, samples)
    programs = run(
      config,
      folder,
      device=DEVICE.value,
      workers=workers,
      rounds=ROUNDS.value,
      turn_steps=turn_steps,
      compiled=COMPILE.value,
    )
  figures = {
    "device": DEVICE.value,
    "batch_size": config.batch_size,
    "workers": workers,
    "dtype": config.model.encoder.dtype,
    "fbank": host_pairs.host_fbank(config)[0],
    "compiled": COMPILE.value,
    "config": config.to_dict(),
    "programs": programs,
  }
  print(table(figures))
  report.write_json(JSON.value, figures, DEVICE.value)


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file(
    "config",
    "configs/pretrain.py:variant=micro,batch_size=8",
    "The experiment.",
    lock_config=True,
  )
  DEVICE = flags.DEFINE_enum("device", "cpu", ("cpu", "cuda"), "Where.")
  AUDIO_DIR = flags.DEFINE_string(
    "audio_dir", str(input_pipeline.PACKAGED), "What the clips are cut from."
  )
  FILES = flags.DEFINE_integer("files", 64, "Wav files.", lower_bound=1)
  WORKERS = flags.DEFINE_integer(
    "workers", len(os.sched_getaffinity(0)), "Of each.", lower_bound=1
  )
  ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each.", lower_bound=1)
  TURN_STEPS = flags.DEFINE_integer(
    "turn_steps",
    None,
    "Batches of each turn; default: 8, or one per worker if that is more.",
    lower_bound=1,
  )
  COMPILE = flags.DEFINE_bool("compile", True, "Use torch.compile.")
  JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
  app.run(main)
