"""Tests of augment_fbank.py: laws on tones and clicks, and who draws what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import augment_fbank, features
from configs import common

RATE = 16_000
FBANK = common.fbank().to_dict()
EDGES = {name: FBANK[name] for name in ("low_freq_hz", "high_freq_hz")}
KEY = jax.random.key(3)


def fbank_of(waveform):
  return features.log_mel_fbank(np.asarray(waveform, np.float32), **FBANK)


def tone(hz):
  return 0.3 * np.sin(2 * np.pi * hz * np.arange(RATE) / RATE)


def move(fbank, *, semitones=0.0, rate=1.0, p=1.0):
  """Moves every example by exactly this much."""
  return augment_fbank.pitch_and_tempo(
    KEY,
    jnp.asarray(fbank),
    **EDGES,
    p=p,
    min_semitones=semitones,
    max_semitones=semitones,
    min_rate=rate,
    max_rate=rate,
  )


def loudest_band(fbank):
  return np.argmax(np.asarray(fbank).mean(axis=1), axis=-1)


@pytest.mark.parametrize("semitones", [-12.0, -7.0, 4.0, 12.0])
def test_a_tone_moves_to_the_band_of_the_tone_at_the_new_pitch(semitones):
  hz = np.array([440.0, 1000.0, 2500.0])
  moved = move(fbank_of([tone(f) for f in hz]), semitones=semitones)
  expected = fbank_of([tone(f * 2 ** (semitones / 12)) for f in hz])
  np.testing.assert_allclose(
    loudest_band(moved), loudest_band(expected), atol=1
  )


@pytest.mark.parametrize("rate", [0.7, 1.4])
def test_a_click_moves_to_its_time_over_the_rate(rate):
  waveform = np.zeros(RATE)
  waveform[6_400] = 1.0
  energy = np.asarray(move(fbank_of([waveform]), rate=rate))[0].mean(axis=1)
  # A frame is centred 12.5 ms after its start; the click is at 0.4 s.
  assert np.argmax(energy) == pytest.approx((40 - 1.25) / rate, abs=1.5)


def test_a_faster_clip_starts_again_after_its_end():
  fbank = np.arange(10, dtype=np.float32)[None, :, None] + np.zeros((1, 1, 4))
  moved = np.asarray(move(fbank.astype(np.float32), rate=2.0))[0, :, 0]
  np.testing.assert_allclose(moved, [0, 2, 4, 6, 8, 0, 2, 4, 6, 8], atol=1e-5)


def test_what_would_come_from_above_the_last_band_is_the_floor_of_the_clip():
  fbank = fbank_of([tone(440.0) + 0.01 * tone(7_500.0)])
  moved = np.asarray(move(fbank, semitones=-12.0))
  # 8 kHz moves to 4 kHz, which is band 94 of 128; nothing is above it.
  np.testing.assert_array_equal(moved[:, :, 98:], np.min(fbank))


def test_no_shift_and_rate_one_return_the_spectrogram():
  fbank = fbank_of([tone(440.0)])
  np.testing.assert_allclose(move(fbank), fbank, atol=2e-3)


def test_probability_zero_changes_nothing():
  fbank = fbank_of([tone(440.0)])
  np.testing.assert_array_equal(
    move(fbank, semitones=5.0, rate=1.3, p=0.0), fbank
  )


def test_every_example_draws_its_own_pitch_within_the_limits():
  fbank = jnp.tile(fbank_of(tone(1000.0))[None], (64, 1, 1))
  moved = augment_fbank.augment_fbank(
    KEY,
    fbank,
    **EDGES,
    order=("pitch_and_tempo",),
    pitch_and_tempo={
      "p": 1.0,
      "min_semitones": -5.0,
      "max_semitones": 5.0,
      "min_rate": 0.9,
      "max_rate": 1.1,
    },
  )
  bands = loudest_band(moved)
  low, high = loudest_band(
    fbank_of([tone(1000.0 * 2 ** (n / 12)) for n in (-5, 5)])
  )
  assert len(set(bands)) > 8
  assert bands.min() >= low - 1 and bands.max() <= high + 1


def test_a_gradient_is_finite():
  fbank = jnp.asarray(fbank_of([np.zeros(RATE)]))
  grad = jax.grad(lambda x: move(x, semitones=3.0, rate=0.8).sum())(fbank)
  assert np.isfinite(grad).all()
