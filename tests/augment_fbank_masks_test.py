"""SpecAugment and the noise of Speech Commands, by their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import augment_fbank

FBANK = jnp.asarray(
  np.random.default_rng(0).normal(-5, 1, (512, 40, 24)), jnp.float32
)
KEY = jax.random.key(0)


def hidden(name, max_width, axis):
  """Returns [B, length], where the whole line of an example was zeroed."""
  masked = augment_fbank.AUGMENTATIONS[name](KEY, FBANK, max_width=max_width)
  zero = np.asarray(masked == 0)
  lines = zero.all(axis=3 - axis)
  # Nothing but whole lines is touched, and the rest is as it was.
  np.testing.assert_array_equal(zero.any(axis=3 - axis), lines)
  np.testing.assert_array_equal(np.where(zero, FBANK, masked), FBANK)
  return lines


@pytest.mark.parametrize(
  ("name", "axis"), [("time_mask", 1), ("frequency_mask", 2)]
)
def test_a_mask_is_one_range_with_the_widths_of_torchaudio(name, axis):
  lines = hidden(name, 12, axis)
  widths = lines.sum(1)
  # floor(12 u): every width from 0 to 11 alike.
  assert set(widths) == set(range(12))
  assert widths.mean() == pytest.approx(5.5, abs=0.5)
  edges = np.abs(np.diff(np.pad(lines, ((0, 0), (1, 1))).astype(int), axis=1))
  assert set(edges.sum(1)) <= {0, 2}
  # No position is favoured but for the ends, which fewer ranges reach.
  share = lines.mean(0)
  assert share[12:-12].std() < 0.1 if axis == 1 else share.max() < 0.45
  assert share[0] > 0


@pytest.mark.parametrize("name", ["time_mask", "frequency_mask"])
def test_a_mask_of_width_zero_changes_nothing(name):
  result = augment_fbank.AUGMENTATIONS[name](KEY, FBANK, max_width=0)
  np.testing.assert_array_equal(result, FBANK)


def test_a_mask_wider_than_its_axis_is_refused():
  with pytest.raises(ValueError, match=r"max_width 25 .* axis of 24"):
    augment_fbank.frequency_mask(KEY, FBANK, max_width=25)


def test_masks_are_zero_before_and_loud_after_standardisation():
  order = {"order": ("frequency_mask", "time_mask")}
  masked = augment_fbank.augment_fbank(
    KEY,
    FBANK,
    low_freq_hz=20.0,
    high_freq_hz=8_000.0,
    frequency_mask={"max_width": 8},
    time_mask={"max_width": 8},
    **order,
  )
  assert float((masked == 0).mean()) == pytest.approx(
    1 - (1 - 3.5 / 24) * (1 - 3.5 / 40), abs=0.02
  )


def test_noise_is_positive_and_as_loud_as_its_example_drew():
  noise = augment_fbank.uniform_noise(KEY, FBANK, max_scale=0.1) - FBANK
  noise = np.asarray(noise)
  assert noise.min() > -1e-6 and noise.max() < 0.1
  loudest = noise.reshape(512, -1).max(1)
  assert loudest.mean() == pytest.approx(0.05, abs=0.005)
  np.testing.assert_allclose(
    noise.reshape(512, -1).mean(1), loudest / 2, atol=4e-3
  )


def test_frames_roll_by_every_number_from_minus_to_plus_exclusive():
  ramp = jnp.broadcast_to(jnp.arange(40.0)[:, None], (512, 40, 24))
  rolled = augment_fbank.roll_frames(KEY, ramp, max_shift=10)
  first = np.asarray(rolled)[:, 0, 0]
  shifts = np.where(first > 20, 40 - first, -first)
  assert set(shifts) == set(range(-10, 10))
  np.testing.assert_array_equal(np.sort(rolled, axis=1), ramp)
