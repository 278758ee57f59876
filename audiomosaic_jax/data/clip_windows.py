"""Clips cut into windows, in order, for evaluation.

The training stream is in `pipeline`; here every clip comes exactly once.
"""

from collections.abc import Iterator

import grain
import numpy as np

from audiomosaic_jax.data import audio_io
from audiomosaic_jax.data.sources import Source

# Clips decoded ahead; has no effect on the results.
NUM_THREADS = 8


def starts(
  length: int, *, clip_samples: int, hop_samples: int, max_windows: int | None
) -> np.ndarray:
  """Where to cut windows so that every sample of a clip is in one.

  Args:
    length: samples of the clip.
    clip_samples: samples of a window.
    hop_samples: distance of two windows; the last one ends with the clip.
    max_windows: at most so many, spread evenly; None is all.

  Returns:
    int64 [W], [0] for a clip of one window or less.
  """
  last = max(length - clip_samples, 0)
  starts = np.append(np.arange(0, last, hop_samples), last)
  if max_windows is not None and len(starts) > max_windows:
    chosen = np.linspace(0, len(starts) - 1, max_windows)
    starts = starts[np.rint(chosen).astype(np.int64)]
  return starts


def batches(
  source: Source,
  *,
  batch_size: int,
  clip_samples: int,
  hop_samples: int,
  max_windows: int | None,
  pad: str,
) -> Iterator[dict[str, np.ndarray]]:
  """Every clip exactly once, in order, cut into windows, in fixed shapes.

  A clip that a `TolerantSource` replaced is left out: counting its
  replacement twice would change the result. In several processes, give each
  a `SubsetSource` of its own.

  Args:
    source: clips.
    batch_size: windows per batch.
    clip_samples: samples per window.
    hop_samples: distance of two windows of a clip.
    max_windows: windows per clip at most, spread evenly; None is no limit.
    pad: what fills a clip shorter than a window: "pad" zeros, "repeat".

  Yields:
    {"waveform": int16 [B, clip_samples], "clip": int32 [B] index into the
    source, "label": [B] or [B, C], "valid": bool [B]}. The last batch is
    filled up with zeros, clip 0 and valid False. Average what the model says
    of the windows of a clip over "clip" where "valid".
  """
  clips = grain.MapDataset.source(source).to_iter_dataset(
    grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=NUM_THREADS)
  )
  rows = []
  for index, element in enumerate(clips):
    if int(element["id"]) != index:
      continue
    waveform = audio_io.as_pcm16(element["waveform"])
    for start in starts(
      len(waveform),
      clip_samples=clip_samples,
      hop_samples=hop_samples,
      max_windows=max_windows,
    ):
      window = audio_io.fit_length(
        waveform, clip_samples, mode=pad, offset=int(start)
      )
      rows.append((window, index, element["label"]))
      if len(rows) == batch_size:
        yield _batch(rows, batch_size)
        rows = []
  if rows:
    yield _batch(rows, batch_size)


def _batch(rows: list, batch_size: int) -> dict[str, np.ndarray]:
  """Stacks windows and fills the batch up."""
  waveforms, clips, labels = zip(*rows, strict=True)
  missing = batch_size - len(rows)

  def stack(values, dtype):
    values = np.stack(values).astype(dtype)
    return np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)])

  return {
    "waveform": stack(waveforms, np.int16),
    "clip": stack(clips, np.int32),
    "label": stack(labels, np.asarray(labels[0]).dtype),
    "valid": np.arange(batch_size) < len(rows),
  }
