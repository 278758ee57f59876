"""Compares augment_waveform.py with audiomentations, on the same clips.

Both draw at random, so what is compared are distributions of what a transform
does: the change of level, of spectral centroid and of the level of six bands.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import augment_waveform, features

audiomentations = pytest.importorskip("audiomentations")

RATE = 16_000
SAMPLES = 2 * RATE
DRAWS = 40  # per clip
BANDS_HZ = (50, 200, 500, 1_000, 2_000, 4_000, 8_000)
CASES = {
  "polarity_inversion": ("PolarityInversion", {}),
  "time_stretch": ("TimeStretch", {"min_rate": 0.7, "max_rate": 1.3}),
  "gaussian_snr": ("AddGaussianSNR", {"min_snr_db": 5.0, "max_snr_db": 40.0}),
  "gain": ("Gain", {"min_gain_db": -12.0, "max_gain_db": 12.0}),
  "high_pass": (
    "HighPassFilter",
    {
      "min_cutoff_freq": 20.0,
      "max_cutoff_freq": 2_400.0,
      "min_rolloff": 12,
      "max_rolloff": 24,
    },
  ),
  "band_stop": (
    "BandStopFilter",
    {
      "min_center_freq": 200.0,
      "max_center_freq": 4_000.0,
      "min_bandwidth_fraction": 0.5,
      "max_bandwidth_fraction": 1.99,
      "min_rolloff": 12,
      "max_rolloff": 24,
    },
  ),
  "pitch_shift": (
    "PitchShift",
    {"min_semitones": -4.0, "max_semitones": 4.0},
  ),
}


@pytest.fixture
def clips(golden):
  """Three excerpts like speech, noise with a gap, and gliding harmonics."""
  stored = golden("fbank.npz")
  speech = stored["wav_02"]
  gap = np.tile(stored["wav_00"], 2)
  gap[RATE // 2 : RATE] = 0.0
  times = np.arange(SAMPLES) / RATE
  phase = 2 * np.pi * (150 * times + 40 * times**2)
  harmonics = sum(np.sin(n * phase) / n for n in range(1, 12))
  excerpts = [speech[i : i + SAMPLES] for i in (0, 50_000, 120_000)]
  excerpts += [gap, 0.1 * harmonics * np.exp(-times)]
  return np.stack(excerpts).astype(np.float32)


def ours(name, clips, **parameters):
  """Returns DRAWS independent versions of each clip."""
  clips = jnp.repeat(jnp.asarray(clips), DRAWS, axis=0)

  @jax.jit
  def run(key, waveform):
    return augment_waveform.augment_waveform(
      key,
      waveform,
      sample_rate_hz=RATE,
      order=(name,),
      **{name: parameters},
    )

  return np.asarray(run(jax.random.key(7), clips))


def theirs(name, clips, **parameters):
  """The same, by audiomentations."""
  transform = getattr(audiomentations, CASES[name][0])(**parameters)
  random.seed(3)
  np.random.seed(3)
  return np.stack([transform(x, RATE) for x in clips for _ in range(DRAWS)])


def describe(waveform):
  """Level in dB, centroid in octaves, six band levels in dB; a row each."""
  power = np.abs(np.fft.rfft(waveform * np.hanning(SAMPLES))) ** 2
  hz = np.fft.rfftfreq(SAMPLES, 1 / RATE)
  total = power.sum(axis=1)
  edges = np.searchsorted(hz, BANDS_HZ)
  bands = np.add.reduceat(power, edges[:-1], axis=1)
  # A floor 50 dB down: what lies below does not matter and varies wildly.
  bands = np.maximum(bands / total[:, None], 1e-5)
  rows = np.concatenate(
    [
      10 * np.log10(total)[:, None],
      np.log2(power @ hz / total)[:, None],
      10 * np.log10(bands),
    ],
    axis=1,
  )
  return rows


def effects(augmented, clips):
  before = np.repeat(describe(clips), DRAWS, axis=0)
  return describe(augmented) - before


@pytest.mark.parametrize("name", CASES)
def test_the_effects_are_distributed_as_those_of_audiomentations(name, clips):
  parameters = {**CASES[name][1], "p": 1.0}
  actual = effects(ours(name, clips, **parameters), clips)
  expected = effects(theirs(name, clips, **parameters), clips)
  # Means and standard deviations over 200 draws; four standard errors of the
  # difference of two means, plus what a different vocoder may do.
  allowance = np.array([0.8, 0.05] + [0.8] * 6)
  error = 4 * expected.std(axis=0) * np.sqrt(2 / len(expected))
  difference = np.abs(actual.mean(axis=0) - expected.mean(axis=0))
  assert (difference <= error + allowance).all()
  spread = np.abs(actual.std(axis=0) - expected.std(axis=0))
  assert (spread <= 0.25 * expected.std(axis=0) + 0.5 * allowance).all()


FIXED = [
  ("time_stretch", {"min_rate": 0.8, "max_rate": 0.8}, 0.6),
  ("time_stretch", {"min_rate": 1.25, "max_rate": 1.25}, 0.6),
  ("pitch_shift", {"min_semitones": -3.0, "max_semitones": -3.0}, 0.7),
  ("pitch_shift", {"min_semitones": 3.0, "max_semitones": 3.0}, 0.7),
  ("gain", {"min_gain_db": -7.0, "max_gain_db": -7.0}, 0.01),
  ("high_pass", {"min_cutoff_freq": 600.0, "max_cutoff_freq": 600.0}, 0.03),
  (
    "band_stop",
    {
      "min_center_freq": 1_000.0,
      "max_center_freq": 1_000.0,
      "min_bandwidth_fraction": 1.0,
      "max_bandwidth_fraction": 1.0,
    },
    0.05,
  ),
]


@pytest.mark.parametrize(("name", "parameters", "tolerance"), FIXED)
def test_with_the_same_setting_the_filter_banks_agree(
  name, parameters, tolerance, clips
):
  parameters = {**parameters, "p": 1.0}
  if name in ("high_pass", "band_stop"):
    parameters |= {"min_rolloff": 18, "max_rolloff": 18}
  settings = {
    "sample_rate_hz": RATE,
    "frame_length_ms": 25.0,
    "frame_shift_ms": 10.0,
    "num_mel_bins": 128,
    "low_freq_hz": 20.0,
    "high_freq_hz": 8_000.0,
    "preemphasis": 0.97,
  }
  actual, expected = (
    np.maximum(
      features.log_mel_fbank(f(name, clips, **parameters)[::DRAWS], **settings),
      -10.0,
    )
    for f in (ours, theirs)
  )
  end = int(expected.shape[1] / max(1.0, parameters.get("max_rate", 1.0))) - 10
  difference = np.abs(actual - expected)[:, :end].mean()
  assert difference < tolerance
