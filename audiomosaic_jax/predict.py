"""What a model says of whole clips: windows in, one row per clip out.

Clips are cut into windows, a model gives a row per window, and the rows of a
clip are averaged. A clip that cannot be decoded has no row.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from audiomosaic_jax import features, files, per_device, scores, sharding
from audiomosaic_jax.data import clip_windows, supervised
from audiomosaic_jax.data.sources import Source

ConfigDict = ml_collections.ConfigDict


class Windows(NamedTuple):
  """Rows of windows.

  Attributes:
    rows: [W, ...] what was computed of each window.
    clip: [W] the clip that each was cut out of.
  """

  rows: np.ndarray
  clip: np.ndarray


def clip_means(windows: Windows, num_clips: int) -> tuple[np.ndarray, ...]:
  """Averages the windows of each clip.

  Returns:
    ([K, ...] means, [K] indices of the clips that have a window).
  """
  rows, clip = windows
  total = np.zeros((num_clips, *rows.shape[1:]))
  np.add.at(total, clip, rows)
  counts = np.bincount(clip, minlength=num_clips)
  found = np.flatnonzero(counts)
  shape = (-1,) + (1,) * (rows.ndim - 1)
  return total[found] / counts[found].reshape(shape), found


def evaluation(
  windows: Windows, source: Source
) -> tuple[scores.Evaluation, np.ndarray]:
  """Returns (mean logits of clips and their labels, indices of the clips)."""
  logits, found = clip_means(windows, len(source))
  labels = source.labels[found]
  if labels.ndim == 1:
    labels = np.eye(len(source.class_names))[labels]
  return scores.Evaluation(logits, labels.astype(np.float64)), found


def spectrogram_fn(config: ConfigDict) -> Callable:
  """Returns the function from a waveform to the encoder's input."""

  def spectrogram(waveform):
    fbank = features.log_mel_fbank(waveform, **config.fbank)
    return features.standardize(fbank, **config.spectrogram)

  return spectrogram


def make_window_fn(model, config: ConfigDict, method: str) -> Callable:
  """Returns `(variables, source) -> Windows` of a method of the model.

  Nothing is masked or augmented, and the model is in evaluation mode. Each
  process computes all clips on its own devices.

  Args:
    model: a classifier of `models.heads`.
    config: the experiment.
    method: "__call__" for logits or "features".
  """
  mesh = sharding.make_mesh(jax.local_devices())
  rows = sharding.batch_sharded(mesh)
  spectrogram = spectrogram_fn(config)

  @jax.jit
  def compute(variables, pcm):
    waveform = features.pcm_to_float(pcm)
    fbank = per_device.map_examples(spectrogram, mesh)(waveform)
    return model.apply(variables, fbank, None, train=False, method=method)

  def windows(variables, source: Source) -> Windows:
    variables = jax.device_put(
      jax.device_get(variables), sharding.replicated(mesh)
    )
    outputs, pending, valid, clip = [], None, [], []
    for batch in window_batches(source, config):
      pcm = jax.device_put(batch["waveform"], rows)
      # The device has one batch while the one before is fetched.
      before, pending = pending, compute(variables, pcm)
      if before is not None:
        outputs.append(jax.device_get(before))
      valid.append(batch["valid"])
      clip.append(batch["clip"])
    if pending is None:
      raise ValueError(f"{source!r}: no clip can be decoded")
    outputs.append(jax.device_get(pending))
    chosen = np.concatenate(valid)
    return Windows(
      np.concatenate(outputs)[chosen], np.concatenate(clip)[chosen]
    )

  return windows


def window_batches(source: Source, config: ConfigDict) -> Iterator[dict]:
  """Yields the windows of all clips, as `clip_windows.batches` does."""
  window = config.data.pipeline.clip_samples
  return clip_windows.batches(
    source,
    batch_size=for_all_devices(config.evaluation.batch_size),
    clip_samples=window,
    hop_samples=window,
    max_windows=config.evaluation.max_windows,
    pad=config.data.pipeline.pad,
  )


def for_all_devices(batch_size: int) -> int:
  """Returns the size, rounded up to as many rows for each local device."""
  devices = len(jax.local_devices())
  return -(-batch_size // devices) * devices


def make_readout_fn(model, batch_size: int) -> Callable:
  """Returns `(variables, Windows of features) -> Windows of logits`."""

  @jax.jit
  def compute(variables, rows):
    return model.apply(variables, rows, method="readout")

  def readout(variables, windows: Windows) -> Windows:
    rows = windows.rows
    missing = -len(rows) % batch_size
    padded = np.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
    parts = padded.reshape(-1, batch_size, *rows.shape[1:])
    logits = [compute(variables, part) for part in parts]
    logits = np.concatenate(jax.device_get(logits))
    return Windows(logits[: len(rows)], windows.clip)

  return readout


def cached_features(
  compute: Callable,
  params: Any,
  source: Source,
  config: ConfigDict,
  folder: pathlib.Path,
) -> Windows:
  """Returns the features of all windows, from disk if they are there.

  The name of the file is a hash of all that the features depend on: the
  settings, every byte of the encoder, and the names, sizes and times of
  change of the clips. The file appears under that name when it is complete.

  Args:
    compute: from `make_window_fn(..., "features")`.
    params: of the encoder, {"encoder": ...}.
    source: clips.
    config: the experiment.
    folder: of the cache.
  """
  path = folder / f"{_fingerprint(params, source, config)}.npz"
  if path.exists():
    with np.load(path) as stored:
      return Windows(stored["rows"], stored["clip"])
  windows = compute({"params": params}, source)
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_arrays(path, windows._asdict(), compress=False)
  return windows


def feature_bytes(
  model, params: Any, source: Source, config: ConfigDict
) -> int:
  """Returns the memory of the features of all windows of each clip.

  A clip of unknown length counts as one window, or as many as it may have.
  """
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  shape = jax.eval_shape(
    lambda params: model.apply(
      {"params": params},
      jax.numpy.zeros((1, frames, bins)),
      None,
      train=False,
      method="features",
    ),
    params,
  )
  return 4 * shape.size * _num_windows(source, config)


def _num_windows(source: Source, config: ConfigDict) -> int:
  """Returns how many windows `window_batches` makes of all clips, at most."""
  max_windows = config.evaluation.max_windows
  if max_windows == 1:
    return len(source)
  window = config.data.pipeline.clip_samples
  count = 0
  for length_s in supervised.lengths_s(source):
    if np.isnan(length_s):
      count += max_windows or 1
      continue
    starts = clip_windows.starts(
      round(length_s * config.fbank.sample_rate_hz),
      clip_samples=window,
      hop_samples=window,
      max_windows=max_windows,
    )
    count += len(starts)
  return count


def _fingerprint(params: Any, source: Source, config: ConfigDict) -> str:
  settings = config.to_dict()
  model = {k: v for k, v in settings["model"].items() if k not in NOT_FEATURES}
  encoder = model["encoder"]
  model["encoder"] = {k: v for k, v in encoder.items() if k not in NOT_VALUES}
  described = {
    "model": model,
    "fbank": settings["fbank"],
    "spectrogram": settings["spectrogram"],
    "clip_samples": settings["data"]["pipeline"]["clip_samples"],
    "pad": settings["data"]["pipeline"]["pad"],
    "max_windows": settings["evaluation"]["max_windows"],
    "clips": [_describe(source, i) for i in range(len(source))],
  }
  digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
  for name, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(name).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:24]


def _describe(source: Source, index: int) -> list:
  path = source.path(index)
  if path is None or not os.path.exists(path):
    return [source.ids[index]]
  stat = os.stat(path)
  return [source.ids[index], stat.st_size, stat.st_mtime_ns]


# What is learned from features, or read from them, and not in them.
NOT_FEATURES = ("layer", "num_queries", "num_prototypes")
# How the encoder is trained or laid out in memory.
NOT_VALUES = ("drop_path", "attention", "remat", "scan_unroll", "pos_layout")
