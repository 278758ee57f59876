"""Tests of augment_waveform.py: who draws what, and what happens to whom.

What a filter or a stretch does for given parameters is in dsp_test.py.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from audiomosaic_jax import augment_waveform

RATE = 16_000
PARAMETERS = {
  "roll_and_scale": {"alpha": 10.0, "beta": 10.0, "offset": 0.5},
  "polarity_inversion": {"p": 0.5},
  "time_stretch": {"p": 0.7, "min_rate": 0.7, "max_rate": 1.3},
  "gaussian_snr": {"p": 0.5, "min_snr_db": 5.0, "max_snr_db": 40.0},
  "gain": {"p": 0.3, "min_gain_db": -12.0, "max_gain_db": 12.0},
  "high_pass": {
    "p": 0.3,
    "min_cutoff_freq": 20.0,
    "max_cutoff_freq": 2_400.0,
    "min_rolloff": 12,
    "max_rolloff": 24,
  },
  "band_stop": {
    "p": 0.5,
    "min_center_freq": 200.0,
    "max_center_freq": 4_000.0,
    "min_bandwidth_fraction": 0.5,
    "max_bandwidth_fraction": 1.99,
    "min_rolloff": 12,
    "max_rolloff": 24,
  },
  "pitch_shift": {"p": 0.6, "min_semitones": -4.0, "max_semitones": 4.0},
}
NAMES = tuple(augment_waveform.AUGMENTATIONS)
WITH_PROBABILITY = tuple(name for name in NAMES if "p" in PARAMETERS[name])
KEY = jax.random.key(1)


def noise(batch=8, samples=2_000, seed=0):
  return 0.1 * jax.random.normal(jax.random.key(seed), (batch, samples))


@functools.partial(jax.jit, static_argnames=("order", "p"))
def apply(order, waveform, key=KEY, p=None):
  """Augments with PARAMETERS, or with all probabilities replaced by p."""
  parameters = {name: dict(PARAMETERS[name]) for name in NAMES}
  for name in WITH_PROBABILITY if p is not None else ():
    parameters[name]["p"] = p
  return augment_waveform.augment_waveform(
    key, waveform, sample_rate_hz=RATE, order=order, **parameters
  )


def changed(waveform, reference):
  return np.asarray(jnp.any(waveform != reference, axis=1))


def test_every_augmentation_has_parameters_here_that_match_its_signature():
  assert set(PARAMETERS) == set(NAMES)
  for name, function in augment_waveform.AUGMENTATIONS.items():
    accepted = set(inspect.signature(function).parameters)
    given = set(PARAMETERS[name]) | {"key", "waveform"}
    assert accepted - {"sample_rate_hz"} == given


@pytest.mark.parametrize("name", WITH_PROBABILITY)
def test_probability_zero_is_the_identity(name):
  waveform = noise()
  np.testing.assert_array_equal(apply((name,), waveform, p=0.0), waveform)


@pytest.mark.parametrize("name", NAMES)
def test_probability_one_changes_every_example(name):
  waveform = noise()
  assert changed(apply((name,), waveform, p=1.0), waveform).all()


@pytest.mark.parametrize("name", WITH_PROBABILITY)
def test_the_share_of_changed_examples_is_the_probability(name):
  waveform = noise(batch=256, samples=64)
  share = changed(apply((name,), waveform), waveform).mean()
  p = PARAMETERS[name]["p"]
  assert share == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 256))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"polarity_inversion"}))
def test_examples_draw_different_parameters(name):
  same = jnp.tile(noise(batch=1), (4, 1))
  result = np.asarray(apply((name,), same, p=1.0))
  for i in range(3):
    assert np.abs(result[i] - result[3]).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_type_are_kept_and_values_stay_finite(name):
  waveform = noise().at[0].set(0.0)
  result = apply((name,), waveform, p=1.0)
  assert (result.shape, result.dtype) == (waveform.shape, waveform.dtype)
  assert jnp.isfinite(result).all()
  np.testing.assert_array_equal(result[0], 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_does_not_depend_on_its_batch_mates(name):
  waveform = noise()
  others = noise(seed=5).at[2].set(waveform[2])
  np.testing.assert_array_equal(
    apply((name,), waveform)[2], apply((name,), others)[2]
  )


def test_the_same_key_gives_the_same_result_and_another_key_another():
  waveform = noise()
  first = apply(NAMES, waveform)
  np.testing.assert_array_equal(first, apply(NAMES, waveform))
  other = apply(NAMES, waveform, key=jax.random.key(2))
  assert changed(first, other).all()


@pytest.mark.parametrize("name", NAMES)
def test_jit_changes_nothing_but_the_rounding(name):
  waveform = noise(batch=4)
  eager = augment_waveform.augment_waveform(
    KEY, waveform, sample_rate_hz=RATE, order=(name,), **PARAMETERS
  )
  np.testing.assert_allclose(apply((name,), waveform), eager, atol=1e-4)


def test_the_order_is_respected():
  waveform = noise()
  forwards = apply(("gaussian_snr", "high_pass"), waveform, p=1.0)
  backwards = apply(("high_pass", "gaussian_snr"), waveform, p=1.0)
  low = np.s_[:, 1:5]  # below 40 Hz, where only unfiltered noise is left

  def rumble(x):
    return np.abs(np.fft.rfft(x))[low].mean()

  assert rumble(backwards) > 2 * rumble(forwards)


def test_an_order_is_the_composition_of_its_steps():
  waveform = noise()
  gain, flip = (
    augment_waveform.AUGMENTATIONS[n] for n in ("gain", "polarity_inversion")
  )
  step = gain(jax.random.fold_in(KEY, 0), waveform, **PARAMETERS["gain"])
  step = flip(jax.random.fold_in(KEY, 1), step, p=0.5)
  order = ("gain", "polarity_inversion")
  np.testing.assert_allclose(apply(order, waveform), step, rtol=1e-6)


def test_an_empty_order_returns_the_waveform():
  waveform = noise()
  np.testing.assert_array_equal(apply((), waveform), waveform)


def test_an_unknown_name_in_the_order_is_refused():
  with pytest.raises(ValueError, match=r"'reverb'; choose from band_stop, "):
    augment_waveform.augment_waveform(
      KEY, noise(), sample_rate_hz=RATE, order=("reverb",)
    )


def test_parameters_of_an_unknown_name_are_refused():
  with pytest.raises(ValueError, match=r"unknown augmentation 'gian'"):
    augment_waveform.augment_waveform(
      KEY, noise(), sample_rate_hz=RATE, order=(), gian={}
    )


def test_a_name_without_parameters_is_refused():
  with pytest.raises(ValueError, match=r"'gain'.*got parameters of band_stop"):
    augment_waveform.augment_waveform(
      KEY, noise(), sample_rate_hz=RATE, order=("gain",), band_stop={}
    )


def test_rolling_keeps_the_samples_and_scales_them_by_half_to_one_and_a_half():
  waveform = noise(batch=64, samples=500)
  result = apply(("roll_and_scale",), waveform)
  scale = np.linalg.norm(result, axis=1) / np.linalg.norm(waveform, axis=1)
  assert scale.min() > 0.5
  assert scale.max() < 1.5
  # Beta(10, 10) has mean 1/2 and standard deviation 0.109.
  assert scale.mean() == pytest.approx(1.0, abs=0.06)
  assert scale.std() == pytest.approx(0.109, abs=0.04)
  np.testing.assert_allclose(
    np.sort(result / scale[:, None]), np.sort(waveform), atol=1e-5
  )


def test_every_offset_of_a_roll_occurs():
  click = jnp.zeros((256, 8)).at[:, 0].set(1.0)
  offsets = np.argmax(apply(("roll_and_scale",), click), axis=1)
  assert set(offsets.tolist()) == set(range(8))


@pytest.mark.parametrize("snr_db", [5.0, 20.0, 40.0])
def test_the_signal_to_noise_ratio_is_the_one_asked_for(snr_db):
  waveform = noise(batch=4, samples=20_000)
  result = augment_waveform.gaussian_snr(
    KEY, waveform, p=1.0, min_snr_db=snr_db, max_snr_db=snr_db
  )
  added = result - waveform
  measured = 10 * jnp.log10(jnp.mean(waveform**2, 1) / jnp.mean(added**2, 1))
  np.testing.assert_allclose(measured, snr_db, atol=0.2)
  spread = jnp.abs(added / added.std(axis=1, keepdims=True))
  assert jnp.mean(spread < 1.0) == pytest.approx(0.683, abs=0.01)


def test_gains_are_uniform_in_decibels():
  waveform = jnp.ones((512, 1))
  result = apply(("gain",), waveform, p=1.0)
  db = np.sort(20 * np.log10(np.asarray(result)[:, 0]))
  np.testing.assert_allclose(db, np.linspace(-12, 12, 512), atol=2.0)


def test_filters_of_every_order_between_the_slopes_occur():
  orders = augment_waveform._filter_order(KEY, 256, 12, 24)
  assert set(orders.tolist()) == {2, 3, 4}


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("high_pass", {"min_rolloff": 10}, r"min_rolloff=10 .* multiples of 6"),
    ("band_stop", {"min_rolloff": 30}, r"min_rolloff=30 and max_rolloff=24"),
    ("band_stop", {"max_bandwidth_fraction": 2.0}, r"=2.0 .* below 0 Hz"),
  ],
)
def test_impossible_filters_are_refused(name, changes, message):
  with pytest.raises(ValueError, match=message):
    augment_waveform.AUGMENTATIONS[name](
      KEY, noise(), sample_rate_hz=RATE, **{**PARAMETERS[name], **changes}
    )


def test_the_parameters_may_be_a_locked_configuration():
  waveform = noise()
  config = ml_collections.ConfigDict({"order": ("gain",), **PARAMETERS}).lock()
  result = augment_waveform.augment_waveform(
    KEY, waveform, sample_rate_hz=RATE, **config
  )
  np.testing.assert_allclose(result, apply(("gain",), waveform), rtol=1e-6)


def test_the_whole_chain_accepts_ten_second_clips():
  shape = jax.ShapeDtypeStruct((4, 160_000), jnp.float32)
  result = jax.eval_shape(lambda x: apply(NAMES, x), shape)
  assert (result.shape, result.dtype) == (shape.shape, shape.dtype)
