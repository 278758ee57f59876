"""Tests of features.py: Kaldi's numbers, then laws of the filter bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import features

KALDI = {
  "sample_rate_hz": 16_000,
  "frame_length_ms": 25.0,
  "frame_shift_ms": 10.0,
  "num_mel_bins": 128,
  "low_freq_hz": 20.0,
  "high_freq_hz": 8_000.0,
  "preemphasis": 0.97,
}
BANK = {
  "sample_rate_hz": 16_000,
  "fft_length": 512,
  "num_mel_bins": 128,
  "low_freq_hz": 20.0,
  "high_freq_hz": 8_000.0,
}
CLIPS = [f"{i:02d}" for i in range(10)]
LOG_EPSILON = np.log(features.EPSILON)


def fbank(waveform, **changes):
  return features.log_mel_fbank(waveform, **{**KALDI, **changes})


def noise(*shape, seed=0):
  return 0.1 * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("clip", CLIPS)
def test_fbank_equals_kaldi(golden, clip):
  stored = golden("fbank.npz")
  if stored[f"raises_{clip}"]:
    with pytest.raises(ValueError, match=r"399 samples .* needs 400"):
      fbank(stored[f"wav_{clip}"])
    return
  error = np.abs(fbank(stored[f"wav_{clip}"]) - stored[f"fbank64_{clip}"])
  # Kaldi itself, in float32, is 1.8e-4 from float64 on the chirp, whose
  # quiet filters see nothing but rounding errors.
  assert error.mean() <= max(1e-5, stored[f"f64absdiff_mean_{clip}"])
  assert error.max() <= 4 * stored[f"f64absdiff_{clip}"]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dataset", [0, 1, 2])
def test_standardised_fbank_equals_the_reference(golden, clip, dataset):
  stored = golden("fbank.npz")
  if stored[f"raises_{clip}"]:
    pytest.skip("shorter than one frame")
  name = stored["stats_names"][dataset]
  actual = features.standardize(
    stored[f"fbank_{clip}"],
    num_frames=int(stored["stats_target_length"][dataset]),
    mean=float(stored["stats_mean"][dataset]),
    std=float(stored["stats_std"][dataset]),
  )
  np.testing.assert_allclose(actual, stored[f"norm_{name}_{clip}"], atol=1e-5)


def test_mel_filters_equal_kaldi(golden):
  actual = features.mel_filter_bank(**BANK)
  np.testing.assert_array_equal(actual.T, golden("fbank.npz")["mel_banks"])
  assert not actual[:, 3].any(), "filter 3 falls between two FFT bins"


def test_mel_filters_beyond_nyquist_are_refused():
  with pytest.raises(ValueError, match=r"9000 .* <= 8000"):
    features.mel_filter_bank(**{**BANK, "high_freq_hz": 9_000.0})


@pytest.mark.parametrize("hz", [300.0, 1_000.0, 2_500.0, 6_000.0])
def test_a_tone_peaks_in_the_filter_centred_on_it(golden, hz):
  waveform = jnp.sin(2 * jnp.pi * hz * jnp.arange(8_000) / 16_000)
  peak = jnp.argmax(fbank(waveform).mean(axis=0))
  centers = golden("fbank.npz")["mel_center_hz"]
  # FFT bins are 31.25 Hz apart, filters below 1 kHz closer than that.
  assert abs(centers[peak] - hz) < max(31.25, 0.03 * hz)


def test_ten_times_the_amplitude_adds_20_db():
  waveform = noise(4_000)
  difference = fbank(10 * waveform) - fbank(waveform)
  audible = fbank(waveform) > LOG_EPSILON + 1
  np.testing.assert_allclose(difference[audible], np.log(100.0), atol=1e-4)


def test_a_constant_offset_has_no_effect():
  waveform = noise(4_000)
  np.testing.assert_allclose(fbank(waveform + 0.5), fbank(waveform), atol=2e-3)


def test_a_delay_of_one_shift_moves_the_fbank_by_one_frame():
  waveform = noise(4_000)
  np.testing.assert_allclose(
    fbank(waveform[160:]), fbank(waveform)[1:], atol=1e-5
  )


@pytest.mark.parametrize(
  ("samples", "frames"),
  [(400, 1), (559, 1), (560, 2), (16_000, 98), (163_840, 1022)],
)
def test_frames_that_do_not_fit_are_dropped(samples, frames):
  shape = jax.eval_shape(fbank, jax.ShapeDtypeStruct((2, samples), jnp.float32))
  assert shape.shape == (2, frames, 128)


@pytest.mark.parametrize("shift_ms", [5.0, 10.0, 12.5, 25.0, 30.0])
def test_every_frame_is_the_fbank_of_its_own_samples(shift_ms):
  waveform = noise(2_500)
  whole = fbank(waveform, frame_shift_ms=shift_ms)
  shift = int(16 * shift_ms)
  for i in (0, 1, len(whole) - 1):
    alone = fbank(waveform[i * shift : i * shift + 400])
    np.testing.assert_allclose(whole[i], alone[0], atol=1e-4)


def test_a_batch_gives_what_its_clips_give_alone():
  waveform = noise(2, 3, 2_000)
  batched = fbank(waveform)
  for i, j in np.ndindex(2, 3):
    np.testing.assert_allclose(batched[i, j], fbank(waveform[i, j]), atol=1e-4)


def test_jit_changes_nothing_but_the_rounding():
  waveform = noise(2, 4_000)
  error = jnp.abs(jax.jit(fbank)(waveform) - fbank(waveform))
  assert error.mean() < 1e-5
  # The lowest filters are 60 dB below the others.
  assert error.max() < 2e-3


def test_the_gradient_is_the_finite_difference():
  waveform, direction = noise(1_200), noise(1_200, seed=1)

  def mean(x):
    return fbank(x).mean()

  slope = jnp.vdot(jax.grad(mean)(waveform), direction)
  step = 1e-2
  expected = mean(waveform + step * direction) - mean(
    waveform - step * direction
  )
  np.testing.assert_allclose(slope, expected / (2 * step), rtol=1e-2)


@pytest.mark.parametrize("value", [0.0, 0.5, 1e-20])
def test_silence_is_finite_and_has_a_zero_gradient(value):
  waveform = jnp.full((2, 1_200), value)
  np.testing.assert_allclose(fbank(waveform), LOG_EPSILON, rtol=1e-5)
  gradient = jax.grad(lambda x: fbank(x).sum())(waveform)
  np.testing.assert_array_equal(gradient, 0.0)


def test_digital_zeros_inside_a_clip_keep_the_gradient_finite():
  waveform = noise(2_000).at[500:1_500].set(0.0)
  assert jnp.isfinite(jax.grad(lambda x: fbank(x).sum())(waveform)).all()


def test_pcm_covers_the_half_open_unit_interval():
  pcm = np.array([[-32768, 0, 32767]], np.int16)
  expected = [[-1.0, 0.0, 32767 / 32768]]
  np.testing.assert_array_equal(features.pcm_to_float(pcm), expected)
  np.testing.assert_array_equal(
    features.pcm_to_float(jnp.asarray(pcm)), expected
  )


def test_floating_point_samples_pass_unchanged():
  waveform = np.array([0.25, -1.5], np.float32)
  np.testing.assert_array_equal(features.pcm_to_float(waveform), waveform)


CHECKS = {
  "sample_rate_hz": 16_000,
  "expected_sample_rate_hz": 16_000,
  "min_samples": 400,
}


@pytest.mark.parametrize(
  ("waveform", "changes", "message"),
  [
    (np.zeros(400), {"sample_rate_hz": 44_100}, "44100 Hz .* 16000 Hz"),
    (np.zeros(399), {}, "399 samples .* 400"),
    (np.r_[np.zeros(399), np.nan], {}, "1 NaN or infinite of 400"),
    (np.r_[np.zeros(399), np.inf], {}, "1 NaN or infinite of 400"),
  ],
)
def test_unusable_audio_is_refused_with_the_reason(waveform, changes, message):
  with pytest.raises(ValueError, match=message):
    features.check_waveform(waveform, **{**CHECKS, **changes})


def test_usable_audio_is_accepted():
  features.check_waveform(np.zeros((3, 400), np.int16), **CHECKS)
