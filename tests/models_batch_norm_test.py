import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from audiomosaic_jax.models import batch_norm


def test_batch_norm_has_unbiased_running_and_biased_batch_variance():
  x = jnp.asarray(np.random.default_rng(3).normal(2, 3, (6, 5)), jnp.float32)
  norm = batch_norm.BatchNorm(momentum=0.9, epsilon=1e-5, trainable_bias=True)
  variables = norm.init(jax.random.key(0), x, train=True)
  stats = variables["batch_stats"]
  np.testing.assert_array_equal(stats["mean"], 0)  # init records nothing
  y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
  np.testing.assert_allclose(y.var(0), 1, atol=1e-5)
  stats = updated["batch_stats"]
  np.testing.assert_allclose(stats["mean"], 0.1 * x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(
    stats["var"], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5
  )


def test_batch_norm_in_evaluation_equals_the_one_of_flax():
  x = jnp.asarray(np.random.default_rng(3).normal(2, 3, (6, 5)), jnp.float32)
  ours = batch_norm.BatchNorm(momentum=0.9, epsilon=1e-5, trainable_bias=True)
  theirs = nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_running_average=True)
  variables = jax.tree.map(
    lambda s: jnp.linspace(0.5, 1.5, s.size),
    ours.init(jax.random.key(0), x, train=False),
  )
  np.testing.assert_allclose(
    ours.apply(variables, x, train=False),
    theirs.apply(variables, x),
    rtol=1e-5,
    atol=1e-6,
  )


def test_every_axis_but_the_last_is_batch():
  x = jnp.asarray(np.random.default_rng(4).normal(2, 3, (3, 4, 2, 5)))
  x = x.astype(jnp.float32)
  norm = batch_norm.BatchNorm(momentum=0.9, epsilon=1e-5, trainable_bias=True)
  variables = norm.init(jax.random.key(0), x, train=True)
  image, flat = (
    norm.apply(variables, y, train=True, mutable=["batch_stats"])
    for y in (x, x.reshape(-1, 5))
  )
  np.testing.assert_allclose(image[0].reshape(-1, 5), flat[0], atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), image[1], flat[1]
  )
