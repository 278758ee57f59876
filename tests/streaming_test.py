"""A stream says of each window what the encoder says of it offline."""

import numpy as np
import pytest
import soxr
import tiny_encoder as tiny

from audiomosaic_jax import streaming

RATE_HZ = tiny.RATE_HZ


@pytest.fixture(scope="module")
def encoder():
  return tiny.encoder()


def push_all(stream, samples, sizes):
  moments, start = [], 0
  for size in sizes:
    moments += stream.push(samples[start : start + size])
    start += size
  return moments + stream.push(samples[start:]) + stream.finish()


def assert_offline(encoder, moments, samples, atol=2e-5):
  for moment in moments:
    window = samples[
      round(moment.start_s * RATE_HZ) : round(moment.end_s * RATE_HZ)
    ]
    expected = encoder.embed(window, RATE_HZ).embedding
    np.testing.assert_allclose(moment.embedding, expected, atol=atol)


def test_chunks_of_any_size_give_the_moments_of_offline_windows(encoder):
  samples = tiny.noise(4.1)
  rng = np.random.default_rng(0)
  for trial in range(3):
    stream = encoder.stream(sample_rate_hz=RATE_HZ, hop_s=0.5)
    sizes = rng.integers(0, (300, 9_000, 40_000)[trial], size=40)
    moments = push_all(stream, samples, sizes)
    ends = [moment.end_s for moment in moments]
    assert ends == pytest.approx([0.5 * i for i in range(1, 9)] + [4.1])
    longest = max(m.end_s - m.start_s for m in moments)
    assert longest == pytest.approx(encoder.window_s, abs=1e-3)
    assert_offline(encoder, moments, samples)


def test_a_moment_is_there_as_soon_as_its_hop_is_complete(encoder):
  stream = streaming.Stream(encoder, sample_rate_hz=RATE_HZ, hop_s=0.25)
  assert stream.latency_s == 0.25
  samples = tiny.noise(1.0)
  assert stream.push(samples[:3_999]) == []
  [moment] = stream.push(samples[3_999:4_000])
  assert moment.end_s == 0.25 and moment.start_s == 0


def test_another_rate_is_resampled_without_a_seam(encoder):
  samples = tiny.noise(3.0)
  fast = soxr.resample(samples, RATE_HZ, 48_000)
  stream = streaming.Stream(encoder, sample_rate_hz=48_000, hop_s=0.5)
  # The resampler holds back 21 ms.
  assert stream.latency_s == pytest.approx(0.5213, abs=1e-3)
  moments = push_all(stream, fast, [777] * 150)
  assert [m.end_s for m in moments] == pytest.approx(np.arange(1, 7) * 0.5)
  offline = soxr.resample(fast, 48_000, RATE_HZ)
  assert_offline(encoder, moments, offline, atol=1e-3)


def test_the_gate_passes_over_silence_and_keeps_the_time(encoder):
  samples = np.concatenate(
    [tiny.noise(1.0), np.zeros(3 * RATE_HZ, np.float32), tiny.noise(1.0, 1)]
  )
  stream = streaming.Stream(
    encoder, sample_rate_hz=RATE_HZ, hop_s=0.5, window_s=0.5, gate_db=-60.0
  )
  moments = push_all(stream, samples, [4_000] * 20)
  heard = [moment.embedding is not None for moment in moments]
  assert heard == [True] * 2 + [False] * 6 + [True] * 2
  assert moments[5].level_db < -100 and moments[0].level_db > -30
  assert_offline(encoder, [moments[-1]], samples)


def test_integers_are_scaled_and_bad_chunks_are_not_taken(encoder):
  samples = tiny.noise(0.5)
  stream = streaming.Stream(encoder, sample_rate_hz=RATE_HZ, hop_s=0.5)
  with pytest.raises(ValueError, match="NaN"):
    stream.push(np.full(100, np.nan))
  [moment] = stream.push(np.int16(np.rint(samples * 32_768)))
  expected = encoder.embed(samples, RATE_HZ).embedding
  np.testing.assert_allclose(moment.embedding, expected, atol=1e-2)


@pytest.mark.parametrize(
  "hop_s, window_s", [(0.01, 1.0), (1.5, 1.0), (2, None)]
)
def test_a_hop_that_leaves_something_out_is_refused(encoder, hop_s, window_s):
  with pytest.raises(ValueError, match=f"hop_s is {hop_s:g}; use at least"):
    streaming.Stream(
      encoder, sample_rate_hz=RATE_HZ, hop_s=hop_s, window_s=window_s
    )
