"""Mixup by its laws: convex, labels as sounds, partners from the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from audiomosaic_jax import mixup

PUBLISHED = {"alpha": 10.0, "beta": 10.0}
# With unit vectors for clips and for labels, the result is its own recipe.
EYE = jnp.eye(16)


def mix(seed=0, *, p, waveform=EYE, targets=EYE):
  return mixup.mixup(jax.random.key(seed), waveform, targets, p=p, **PUBLISHED)


def test_waveform_and_targets_are_mixed_in_the_same_shares():
  waveform, targets = mix(p=1.0)
  np.testing.assert_array_equal(waveform, targets)
  np.testing.assert_allclose(waveform.sum(1), 1.0, atol=1e-6)
  assert (np.count_nonzero(waveform, axis=1) == 2).all()


def test_probability_counts_the_clips_that_are_mixed():
  mixed = [np.diag(mix(seed, p=0.8)[0]) < 1 for seed in range(60)]
  assert np.mean(mixed) == pytest.approx(0.8, abs=0.04)
  np.testing.assert_array_equal(mix(p=0.0)[0], EYE)


def test_shares_have_the_moments_of_their_beta_distribution():
  shares = np.concatenate([np.diag(mix(s, p=1.0)[0]) for s in range(60)])
  assert shares.mean() == pytest.approx(0.5, abs=0.01)
  assert shares.var() == pytest.approx(0.25 / 21, rel=0.15)


def test_every_other_clip_of_the_batch_can_be_the_partner():
  partners = set()
  for seed in range(120):
    row = np.array(mix(seed, p=1.0)[0][0])
    row[0] = 0
    partners.add(int(row.argmax()))
  assert partners == set(range(1, 16))


def test_labels_that_both_clips_have_add_up():
  targets = jnp.ones((16, 3))
  np.testing.assert_allclose(mix(p=1.0, targets=targets)[1], 1.0, atol=1e-6)


def test_eight_devices_mix_the_same_partners_as_one():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  expected, _ = jax.jit(lambda x: mix(3, p=0.8, waveform=x))(EYE)
  result, _ = jax.jit(lambda x: mix(3, p=0.8, waveform=x))(
    jax.device_put(EYE, rows)
  )
  np.testing.assert_array_equal(result, expected)


def test_a_batch_of_one_has_nobody_to_mix_with():
  one = jnp.ones((1, 4))
  np.testing.assert_array_equal(mix(p=1.0, waveform=one, targets=one)[0], one)
