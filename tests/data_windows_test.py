"""Windows lie on one grid of columns, however a recording arrives."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import features
from audiomosaic_jax.data import windows

# Frames of 5 samples, 2 apart; columns of 4 frames; windows of 3 columns.
SMALL = windows.Geometry(1_000, 5, 2, 4, 3)
AUDIO = windows.Geometry(16_000, 400, 160, 16, 64)


def cut(samples, *, hop_columns=3, offsets=(0,), sizes=None):
  blocks = [samples] if sizes is None else np.split(samples, np.cumsum(sizes))
  return list(
    windows.cut(blocks, SMALL, hop_columns=hop_columns, offsets=offsets)
  )


@pytest.mark.parametrize("num_samples", [399, 400, 559, 560, 160_000])
def test_frames_are_those_of_the_filter_bank(num_samples):
  expected = 0
  if num_samples >= 400:
    fbank = features.log_mel_fbank(
      jnp.zeros(num_samples),
      sample_rate_hz=16_000,
      frame_length_ms=25.0,
      frame_shift_ms=10.0,
      num_mel_bins=8,
      low_freq_hz=20.0,
      high_freq_hz=8_000.0,
      preemphasis=0.97,
    )
    expected = len(fbank)
  assert AUDIO.num_frames(num_samples) == expected


def test_ten_seconds_have_63_columns_of_160_ms():
  assert AUDIO.num_columns(AUDIO.num_frames(160_000)) == 63
  assert AUDIO.column_samples == 2_560
  # 16 frames, 10 ms apart, the last of 25 ms.
  assert AUDIO.span(1) == 15 * 160 + 400
  assert AUDIO.timestamp_s(0, 0) == pytest.approx(0.0875)
  assert AUDIO.timestamp_s(10, 640) == pytest.approx(0.0875 + 1.6 + 0.04)


@pytest.mark.parametrize("hop_columns", [1, 2, 3])
@pytest.mark.parametrize("offsets", [(0,), (0, 4), (0, 2, 4, 6)])
def test_every_window_is_the_part_of_the_recording_that_it_claims(
  hop_columns, offsets
):
  rng = np.random.default_rng(0)
  for num_samples in [*range(5, 60), 200]:
    samples = rng.normal(size=num_samples)
    found = cut(samples, hop_columns=hop_columns, offsets=offsets)
    seen = {offset: set() for offset in offsets}
    for window in found:
      start = window.offset + window.column * SMALL.column_samples
      expected = samples[start : start + SMALL.span(3)]
      assert window.num_frames == SMALL.num_frames(len(expected)) > 0
      # Less than a shift at the end is in no frame.
      assert 0 <= len(expected) - len(window.samples) < SMALL.shift
      expected = expected[: len(window.samples)]
      np.testing.assert_array_equal(window.samples, expected)
      columns = SMALL.num_columns(window.num_frames)
      seen[window.offset] |= set(range(window.column, window.column + columns))
    for offset, columns in seen.items():
      total = SMALL.num_columns(SMALL.num_frames(num_samples - offset))
      assert columns == set(range(total)), (num_samples, offset)
    first = [w for w in found if w.offset == 0]
    # No window repeats what the one before it has seen to its end.
    for before, window in itertools.pairwise(first):
      end = before.column + SMALL.num_columns(before.num_frames)
      stop = window.column + SMALL.num_columns(window.num_frames)
      assert window.column == before.column + hop_columns and stop > end


def test_blocks_of_any_length_give_the_windows_of_the_whole():
  rng = np.random.default_rng(1)
  samples = rng.normal(size=333)
  whole = cut(samples, hop_columns=2, offsets=(0, 4))
  for _ in range(20):
    sizes = rng.integers(0, 40, size=12)
    parts = cut(samples, hop_columns=2, offsets=(0, 4), sizes=sizes)
    assert len(parts) == len(whole) > 10
    for one, other in zip(parts, whole, strict=True):
      assert one[:2] == other[:2] and one.num_frames == other.num_frames
      np.testing.assert_array_equal(one.samples, other.samples)


def test_a_window_is_given_as_soon_as_it_is_complete():
  received = []

  def blocks():
    for i in range(40):
      received.append(i)
      yield np.zeros(10)

  stream = windows.cut(blocks(), SMALL, hop_columns=3, offsets=(0,))
  next(stream)
  # 27 samples are three columns.
  assert len(received) == 3


def test_a_recording_shorter_than_a_frame_is_refused():
  with pytest.raises(ValueError, match=r"4 samples.*one frame of 5.*silence"):
    cut(np.zeros(4))
