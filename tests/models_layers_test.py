"""The layers of every token have the numbers of the ones they stand for."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

from audiomosaic_jax.models import layers


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("level", [0.0, 1000.0])
def test_the_norm_and_its_gradients_are_those_that_jax_derives(level):
  x = normal(2, 5, 16) + level
  params = {"scale": normal(16, seed=1), "bias": normal(16, seed=2)}
  towards = normal(2, 5, 16, seed=3)
  theirs = nn.LayerNorm(epsilon=layers.NORM_EPS, use_fast_variance=False)
  ours = layers.LayerNorm(dtype="float32")

  def loss(norm, params, x):
    return (norm.apply({"params": params}, x) * towards).sum()

  found, expected = (
    jax.value_and_grad(loss, argnums=(1, 2))(norm, params, x)
    for norm in (ours, theirs)
  )
  # float32 knows 1000 to 6e-5, and neither way is nearer.
  chex.assert_trees_all_close(found, expected, atol=1e-4 if level else 1e-5)


def test_the_gradients_of_the_norm_are_those_of_finite_differences():
  scale, bias = normal(8, seed=1), normal(8, seed=2)
  towards = normal(3, 8, seed=3)
  check_grads(
    lambda *args: layers.layer_norm(*map(jnp.asarray, args)) * towards,
    (normal(3, 8), scale, bias),
    order=1,
    modes=("rev",),
    atol=1e-2,
    rtol=1e-2,
  )


def test_gelu_rounds_once():
  x = jnp.linspace(-6, 6, 1001)
  exact = np.asarray(x) * scipy.special.ndtr(np.asarray(x, np.float64))
  np.testing.assert_allclose(layers.gelu(x), exact, atol=1e-6)
  half = x.astype(jnp.bfloat16)
  chex.assert_trees_all_equal(
    layers.gelu(half), layers.gelu(half.astype(jnp.float32)).astype(half.dtype)
  )


def test_the_gradient_of_gelu_is_exact():
  x = np.linspace(-6, 6, 1001)
  density = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
  exact = scipy.special.ndtr(x) + x * density
  slope = jax.vmap(jax.grad(layers.gelu))
  np.testing.assert_allclose(slope(jnp.float32(x)), exact, atol=1e-6)
  half = jnp.bfloat16(x)
  chex.assert_trees_all_equal(
    slope(half), slope(half.astype(jnp.float32)).astype(half.dtype)
  )


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_dense_layer_of_rows_is_that_of_flax(use_bias):
  x = normal(2, 3, 8)
  ours = layers.Dense(5, use_bias, "float32")
  params = ours.init(jax.random.key(0), x)
  theirs = nn.Dense(5, use_bias)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    params, theirs.init(jax.random.key(0), x)
  )
  chex.assert_trees_all_close(
    ours.apply(params, x), theirs.apply(params, x), atol=1e-6
  )


def test_queries_keys_and_values_are_parts_of_one_kernel():
  x = normal(2, 3, 8)
  layer = layers.HeadsDense(num_heads=2, use_bias=True, dtype="float32")
  params = layer.init(jax.random.key(0), x)
  params["params"]["bias"] = normal(24, seed=1)
  whole = nn.Dense(24).apply(params, x).reshape(2, 3, 3, 2, 4)
  parts = [whole[:, :, i] for i in range(3)]
  chex.assert_trees_all_close(list(layer.apply(params, x)), parts, atol=1e-6)
