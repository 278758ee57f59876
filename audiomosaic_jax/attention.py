"""Where the attention of an encoder goes, block by block and head by head.

  A = softmax(q k^T / sqrt(d))        [heads, queries, keys] of every block

The blocks run in one scan, which gives out nothing from inside: their inputs
are taken from the encoder's layers, and q and k computed again by the same
modules from the same parameters.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from audiomosaic_jax.models import kernels, layers, vit


@functools.partial(jax.jit, static_argnames="encoder")
def attention_weights(
  encoder: vit.ViT, params: dict[str, Any], fbank: Float[Array, "T F"]
) -> Float[Array, "depth H N N"]:
  """Returns how much each token of a window attends to each other one.

  Args:
    encoder: the Vision Transformer, `Encoder.model.encoder`.
    params: its own, `Encoder.variables["params"]["encoder"]`.
    fbank: standardised log-mel spectrogram, as long as the grid.

  Returns:
    float32, rows of queries that sum to one. The class token comes first if
    there is one, then the patches, row-major over (time, freq).

  Reference: softmax(q k^T / sqrt(d)) of `models.vit.Attention`; with these
  weights every block gives the encoder's own output to 1e-5.
  """
  (_, layers), state = encoder.apply(
    {"params": params},
    fbank[None],
    None,
    train=False,
    return_layers=True,
    capture_intermediates=_named("norm_pre"),
  )
  (first,) = state["intermediates"]["norm_pre"]["__call__"]
  inputs = jnp.concatenate([first[None], layers[:-1]])
  return jax.vmap(_block_weights, in_axes=(None, 0, 0))(
    encoder, params["blocks"], inputs
  )[:, 0]


def over_patches(
  weights: Float[Array, "*B N"], grid: tuple[int, int]
) -> Float[Array, "*B T F"]:
  """Returns weights of tokens as pictures of patches, without a class token.

  Args:
    weights: of all tokens, on the last axis.
    grid: (time, freq) patches.
  """
  patches = weights[..., -grid[0] * grid[1] :]
  return patches.reshape(*weights.shape[:-1], *grid)


def _block_weights(
  encoder: vit.ViT, block: dict[str, Any], x: Float[Array, "B N D"]
) -> Float[Array, "B H N N"]:
  """Returns the attention of one block, given its input."""
  norm = layers.NORMS[encoder.norm](dtype=encoder.dtype)
  attention = vit.Attention(
    num_heads=encoder.num_heads,
    norm=encoder.norm,
    qk_norm=encoder.qk_norm,
    qkv_bias=encoder.qkv_bias,
    proj_bias=encoder.proj_bias,
    kernel="xla",
    length=x.shape[1],
    dtype=encoder.dtype,
  )
  _, state = attention.apply(
    {"params": block["attn"]},
    norm.apply({"params": block["norm1"]}, x),
    None,
    capture_intermediates=_named("qkv", "q_norm", "k_norm"),
  )
  found = {
    name: calls["__call__"][0] for name, calls in state["intermediates"].items()
  }
  query, key, _ = found["qkv"]
  if encoder.qk_norm:
    query, key = found["q_norm"], found["k_norm"]
  return kernels.attention_weights(query, key, None)


def _named(*names: str):
  """Returns a filter that takes the outputs of modules of those names."""
  return lambda module, _method: module.name in names
