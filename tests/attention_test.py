"""The weights are those that the encoder itself works with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder

from audiomosaic_jax import attention
from audiomosaic_jax.models import layers

GRID = (8, 2)


@functools.cache
def prepare(**overrides):
  """Returns an encoder, its parameters and a spectrogram."""
  made = tiny_encoder.encoder(**overrides)
  fbank = np.random.default_rng(0).normal(size=(128, 32)).astype(np.float32)
  params = made.variables["params"]["encoder"]
  return made.model.encoder, params, jnp.asarray(fbank)


@functools.partial(jax.jit, static_argnums=0)
def block_output(encoder, params, weights, x):
  """A block written out, with given weights: one clip, [N, D] to [N, D]."""

  def dense(name, x):
    leaf = params[name[0]][name[1]]
    return x @ leaf["kernel"] + leaf["bias"]

  def norm(name, x):
    made = layers.NORMS[encoder.norm](dtype=encoder.dtype)
    return made.apply({"params": params[name]}, x)

  qkv = dense(("attn", "qkv"), norm("norm1", x))
  values = qkv[:, 2 * x.shape[1] :].reshape(len(x), encoder.num_heads, -1)
  mixed = jnp.einsum("hqk,khd->qhd", weights, values).reshape(x.shape)
  x = x + dense(("attn", "proj"), mixed)
  hidden = dense(("mlp", "fc1"), norm("norm2", x))
  hidden = layers.ACTIVATIONS[encoder.activation](hidden)
  return x + dense(("mlp", "fc2"), hidden)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_blocks_with_these_weights_give_the_output_of_the_encoder(qk_norm):
  encoder, params, fbank = prepare(**{"model.encoder.qk_norm": qk_norm})
  weights = attention.attention_weights(encoder, params, fbank)
  assert weights.shape == (2, 2, 17, 17) and weights.dtype == jnp.float32
  apply = jax.jit(encoder.apply, static_argnames=("train", "return_layers"))
  _, layers = apply(
    {"params": params}, fbank[None], None, train=False, return_layers=True
  )
  second = jax.tree.map(lambda leaf: leaf[1], params["blocks"])
  found = block_output(encoder, second, weights[1], layers[0, 0])
  np.testing.assert_allclose(found, layers[1, 0], atol=1e-5)
  # The weights of another block do not.
  other = block_output(encoder, second, weights[0], layers[0, 0])
  assert np.abs(other - layers[1, 0]).max() > 1e-3


def test_every_query_shares_out_all_of_its_attention():
  weights = attention.attention_weights(*prepare())
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  assert weights.min() >= 0


def test_without_a_class_token_all_tokens_are_patches():
  overrides = {"model.encoder.class_token": False}
  weights = attention.attention_weights(*prepare(**overrides))
  assert weights.shape == (2, 2, 16, 16)
  assert attention.over_patches(weights, GRID).shape == (2, 2, 16, 8, 2)


def test_patches_are_laid_out_by_time_then_frequency():
  tokens = jnp.arange(17.0)  # The class token is 0.
  patches = attention.over_patches(tokens, GRID)
  assert patches.shape == GRID
  np.testing.assert_array_equal(patches[3], [7, 8])
