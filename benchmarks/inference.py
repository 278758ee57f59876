"""Clips per second of the encoder, and how long its program compiles.

  python -m benchmarks.inference --variants=tiny,small --batches=1,8
  python -m benchmarks.inference --dtype=bfloat16 --json=inference.json

What is timed is `Encoder.embed_batch`: clips of noise in memory go in as
waveforms, embeddings and frames come out as arrays of the host. The weights
are random. Two processes share one folder of compiled programs: the first,
which finds it empty, gives the speed and the compile time "cold"; the second
gives the compile time "cached". Compile time is what JAX says it took to trace,
lower and compile, or to read from the folder.

A cell whose call is expected to take more than --budget_s, from the FLOPs and
the speed of the cells before it, is not run, and says so.
"""

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm
from absl import app, flags

from audiomosaic_jax import encoder, experiment
from benchmarks import report, turns
from configs import common, pretrain

ConfigDict = ml_collections.ConfigDict
Figures = dict[str, Any]

COLD, CACHED = "cold", "cached"
COMPILE_EVENTS = "/jax/core/compile/"


class Settings(NamedTuple):
  """What is timed.

  Attributes:
    clip_s: length of a clip in seconds.
    dtype: of matrix products.
    repeats: calls that are timed after the first, at most.
    budget_s: seconds that a cell may take, compiling aside.
  """

  clip_s: float
  dtype: str
  repeats: int
  budget_s: float


def make_config(variant: str) -> ConfigDict:
  """Returns the published experiment with an encoder of some size."""
  return pretrain.get_config(f"variant={variant}")


def call_flops(variant: str, clips: int, clip_s: float) -> float:
  """Returns the FLOPs of a call, clips of one window each."""
  config = make_config(variant)
  window_s = config.spectrogram.num_frames * config.fbank.frame_shift_ms / 1e3
  windows = np.ceil(clip_s / window_s)
  tokens = experiment.num_tokens(config)
  return clips * windows * experiment.encoder_flops(config, tokens)


def make_measure(settings: Settings, cache: str) -> Callable:
  """Returns the turn: (variant, clips) -> seconds of each call."""
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  compile_s = []

  def listen(event: str, seconds: float, **_: Any) -> None:
    if event.startswith(COMPILE_EVENTS):
      compile_s.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)

  @functools.lru_cache(maxsize=1)
  def variables_of(variant: str) -> dict[str, Any]:
    config = make_config(variant)
    model = experiment.build_model(config)
    init = functools.partial(experiment.init_variables, model, config)
    return jax.device_get(jax.jit(init)(jax.random.key(0)))

  def measure(variant: str, clips: int) -> Figures:
    config = make_config(variant)
    embedding = encoder.Encoder(
      config,
      variables_of(variant),
      (),
      dtype=settings.dtype,
      batch_size=clips,
    )
    rate = embedding.sample_rate_hz
    rng = np.random.default_rng(0)
    samples = (clips, int(settings.clip_s * rate))
    waveforms = list(0.1 * rng.standard_normal(samples, np.float32))

    def call() -> float:
      start = time.perf_counter()
      embedding.embed_batch(waveforms, rate)
      return time.perf_counter() - start

    compile_s.clear()
    call()
    figures = {"compile_s": sum(compile_s), "seconds": []}
    for _ in range(settings.repeats):
      seconds = figures["seconds"]
      if seconds and sum(seconds) + seconds[-1] > settings.budget_s:
        break
      seconds.append(call())
    return figures

  return measure


def cells(
  measure: Callable, variants: list[str], batches: list[int], settings: Settings
) -> Iterator[Figures]:
  """Yields the figures of every cell, or why there are none.

  Args:
    measure: (variant, clips) -> process -> what `make_measure` returns.
    variants: sizes of the encoder, the small ones first.
    batches: clips per call, the few first.
    settings: what is timed.
  """
  rate = 0.0  # FLOP/s of the fastest cell so far: what is refused is slow.
  for variant in variants:
    for clips in batches:
      flops = call_flops(variant, clips, settings.clip_s)
      cell = {"variant": variant, "clips": clips, "flops": flops}
      expected = flops / rate if rate else 0.0
      if expected > settings.budget_s:
        yield cell | {"expected_s": expected}
        continue
      said = measure(variant, clips)
      median = statistics.median(said[COLD]["seconds"])
      rate = max(rate, flops / median)
      yield cell | {
        "seconds": median,
        "calls": len(said[COLD]["seconds"]),
        "clips_per_s": clips / median,
        "flops_per_s": flops / median,
        "compile_s": {name: each["compile_s"] for name, each in said.items()},
      }


def table(figures: Figures) -> str:
  """Returns the figures of a run as text."""
  rows = []
  for cell in figures["cells"]:
    row = [cell["variant"], str(cell["clips"])]
    if "expected_s" in cell:
      words = f"over budget: {cell['expected_s']:.0f} s expected"
      rows.append([*row, words, "-", "-", "-", "-"])
      continue
    rows.append(
      [
        *row,
        f"{cell['clips_per_s']:.2f}",
        f"{1e3 * cell['seconds'] / cell['clips']:.1f}",
        f"{cell['flops_per_s'] / 1e9:.0f}",
        f"{cell['compile_s'][COLD]:.1f}",
        f"{cell['compile_s'][CACHED]:.1f}",
      ]
    )
  return report.table_text(
    f"clips of {figures['clip_s']:g} s to embeddings, {figures['dtype']}, on "
    f"{figures['device']}; median of up to {figures['repeats']} calls",
    [
      "variant",
      "clips per call",
      "clips/s",
      "ms per clip",
      "GFLOP/s",
      "compile s, cold",
      "compile s, cached",
    ],
    rows,
  )


def run(
  variants: list[str],
  batches: list[int],
  device: str,
  settings: Settings,
  *,
  keep_freed_memory: bool,
) -> Figures:
  """Returns the figures of all cells, measured in two processes.

  Args:
    variants: sizes of the encoder.
    batches: clips per call.
    device: JAX's name of the platform.
    settings: what is timed.
    keep_freed_memory: as `embed` does, if not told otherwise.
  """
  environment = {
    "JAX_PLATFORMS": device,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  # Speed is timed in the first; the second only has to compile.
  each = {COLD: settings, CACHED: settings._replace(repeats=0)}
  with contextlib.ExitStack() as stack:
    cache = stack.enter_context(tempfile.TemporaryDirectory())
    players = {
      name: stack.enter_context(
        turns.Player(
          name, make_measure, (own, cache), environment, keep_freed_memory
        )
      )
      for name, own in each.items()
    }

    def measure(variant: str, clips: int) -> dict[str, Figures]:
      return {name: p.act(variant, clips) for name, p in players.items()}

    found = list(
      tqdm.tqdm(
        cells(measure, variants, sorted(batches), settings),
        total=len(variants) * len(batches),
        unit="cell",
      )
    )
  return settings._asdict() | {
    "device": device,
    "keep_freed_memory": keep_freed_memory,
    "cells": found,
  }


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  # The processes that compute are started with a platform of their own.
  jax.config.update("jax_platforms", "cpu")
  for variant in VARIANTS.value:
    common.choose("variant", variant, common.VIT_SIZES)
  settings = Settings(
    clip_s=CLIP_S.value,
    dtype=DTYPE.value,
    repeats=REPEATS.value,
    budget_s=BUDGET_S.value,
  )
  batches = [int(clips) for clips in BATCHES.value]
  figures = run(
    VARIANTS.value,
    batches,
    DEVICE.value,
    settings,
    keep_freed_memory=KEEP_FREED_MEMORY.value,
  )
  print(table(figures))
  report.write_json(JSON.value, figures, DEVICE.value)


if __name__ == "__main__":
  VARIANTS = flags.DEFINE_list(
    "variants", ["tiny", "small", "base", "large"], "Sizes of the encoder."
  )
  BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Clips per call.")
  CLIP_S = flags.DEFINE_float("clip_s", 10.0, "Length of a clip in seconds.")
  DTYPE = flags.DEFINE_string("dtype", "float32", "Of matrix products.")
  DEVICE = flags.DEFINE_enum("device", "cpu", ("cpu", "cuda", "tpu"), "Where.")
  REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed calls per cell, at most.", lower_bound=1
  )
  BUDGET_S = flags.DEFINE_float("budget_s", 60.0, "Seconds of a cell, at most.")
  KEEP_FREED_MEMORY = flags.DEFINE_bool(
    "keep_freed_memory", True, "As of embed; matters on a CPU."
  )
  JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
  app.run(main)
