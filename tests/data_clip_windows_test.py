"""Every clip is evaluated once, whatever the size of a batch."""

import numpy as np
import pytest
from ramps import Ramps

from audiomosaic_jax.data import audio_io, clip_windows, wrappers

CLIP = 16


def evaluate(source, **changes):
  arguments = dict(
    batch_size=4, clip_samples=CLIP, hop_samples=8, max_windows=None, pad="pad"
  )
  return list(clip_windows.batches(source, **{**arguments, **changes}))


def test_evaluation_sees_every_sample_of_every_clip_once_per_window():
  lengths = [40, 5, 16, 17, 33]
  batches = evaluate(Ramps(lengths))
  assert {b["waveform"].shape for b in batches} == {(4, CLIP)}
  assert {b["waveform"].dtype for b in batches} == {np.dtype(np.int16)}
  joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  valid = joined["valid"]
  count = valid.sum()
  assert valid[:count].all() and not joined["waveform"][count:].any()
  clips = joined["clip"][:count]
  assert (np.diff(clips) >= 0).all() and set(clips) == set(range(5))
  np.testing.assert_array_equal(joined["label"][:count], clips % 2)
  for index, length in enumerate(lengths):
    seen = joined["waveform"][:count][clips == index]
    seen = set(seen.ravel().tolist()) - {0}
    first = 1000 * index + 1
    assert seen == set(range(first, first + length))


def test_windows_cover_the_end_and_can_be_thinned_out():
  def starts(length, max_windows=None):
    return clip_windows.starts(
      length, clip_samples=16, hop_samples=8, max_windows=max_windows
    ).tolist()

  assert starts(5) == starts(16) == [0]
  assert starts(17) == [0, 1]
  assert starts(32) == [0, 8, 16]
  assert starts(41) == [0, 8, 16, 24, 25]
  assert starts(41, 3) == [0, 16, 25]
  assert starts(41, 1) == [0]


def test_evaluation_does_not_depend_on_the_batch_size():
  def rows(batch_size):
    return [
      (int(clip), row.tolist())
      for batch in evaluate(Ramps([40, 5, 30]), batch_size=batch_size)
      for clip, row, valid in zip(
        batch["clip"], batch["waveform"], batch["valid"], strict=True
      )
      if valid
    ]

  assert rows(1) == rows(4) == rows(64)


def test_evaluation_stops_at_a_bad_clip_or_leaves_it_out():
  source = Ramps([16] * 4, bad=[1])
  with pytest.raises(audio_io.BadClipError, match="1: silent"):
    evaluate(source)
  (batch,) = evaluate(
    wrappers.TolerantSource(source, max_bad_fraction=0.5, report_path=None)
  )
  assert batch["clip"][batch["valid"]].tolist() == [0, 2, 3]
