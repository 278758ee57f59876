"""The spectrogram encoder: a Vision Transformer over the patches that stay.

  kept  = patches(fbank)[keep_ids]                 removed, not blanked
  x     = LayerNorm(kept W + b) + pos[keep_ids]
  x     = norm_pre([cls + pos_cls; x])
  x     = x + Attention(norm1(x));  x = x + MLP(norm2(x))     depth times
  tokens = norm(x)

Patches are gathered before they are embedded, so masking saves work from the
first matrix product on. The blocks run in one `lax.scan`: their parameters are
stacked on axis 0 and the program compiles once, whatever the depth.

Numbers: parameters, normalisations and softmax are float32; matrix products
and the residual stream are `dtype`.

Reference: Dosovitskiy et al. 2021 in timm's form with a pre-norm, as the
PyTorch release of AudioMosaic uses it; equal to 2e-5 block by block.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from audiomosaic_jax.models.kernels import KERNELS, attend
from audiomosaic_jax.models.positions import sincos_table

# timm truncates its normal at +-2, which is 100 standard deviations.
DENSE_INIT = nn.initializers.normal(0.02)
NORM_EPS = 1e-6


def patchify(
  fbank: Float[Array, "B T F"], patch_size: int
) -> Float[Array, "B L P"]:
  """Cuts spectrograms into square patches, row-major in (time, freq).

  Args:
    fbank: spectrograms, time first.
    patch_size: side of a patch, in frames and in bands.

  Returns:
    Flat patches, time the slower axis inside a patch: the order in which a
    convolution kernel [time, freq] flattens.
  """
  batch, frames, bands = fbank.shape
  t, f = frames // patch_size, bands // patch_size
  x = fbank.reshape(batch, t, patch_size, f, patch_size)
  return x.transpose(0, 1, 3, 2, 4).reshape(batch, t * f, patch_size**2)


class PatchEmbed(nn.Module):
  """Linear map of each patch (a convolution with stride = size), then a norm.

  Reference: timm PatchEmbed with its norm layer.
  """

  width: int
  norm: str
  dtype: str

  @nn.compact
  def __call__(self, patches: Float[Array, "B K P"]) -> Float[Array, "B K D"]:
    x = _dense(self.width, True, self.dtype, "proj")(patches)
    return NORMS[self.norm](dtype=self.dtype, name="norm")(x)


class HeadsDense(nn.Module):
  """Dense layer to q, k and v of every head, stored as one flat kernel.

  The product sees the heads as an axis, so that devices can share them out.
  """

  num_heads: int
  use_bias: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N 3 H C"]:
    width = x.shape[-1]
    heads = (3, self.num_heads, width // self.num_heads)
    kernel = self.param("kernel", DENSE_INIT, (width, 3 * width))
    kernel = jnp.asarray(kernel, self.dtype).reshape(width, *heads)
    y = jnp.einsum("bnd,dshc->bnshc", jnp.asarray(x, self.dtype), kernel)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (3 * width,))
      y += jnp.asarray(bias, self.dtype).reshape(heads)
    return y


class Attention(nn.Module):
  """Multi-head self-attention; the fused qkv is laid out [q|k|v][head][dim].

  Reference: timm Attention, with its optional norms of q and k per head.
  """

  num_heads: int
  norm: str
  qk_norm: bool
  qkv_bias: bool
  proj_bias: bool
  kernel: str
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"] | None
  ) -> Float[Array, "B N D"]:
    batch, length, width = x.shape
    qkv = HeadsDense(self.num_heads, self.qkv_bias, self.dtype, name="qkv")(x)
    q, k, v = (qkv[:, :, i] for i in range(3))
    if self.qk_norm:
      q = NORMS[self.norm](dtype=self.dtype, name="q_norm")(q)
      k = NORMS[self.norm](dtype=self.dtype, name="k_norm")(k)
    x = attend(q, k, v, valid, self.kernel).reshape(batch, length, width)
    return _dense(width, self.proj_bias, self.dtype, "proj")(x)


class Mlp(nn.Module):
  """Two dense layers with an activation between, applied to every token."""

  hidden: int
  activation: str
  bias: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    h = _dense(self.hidden, self.bias, self.dtype, "fc1")(x)
    h = ACTIVATIONS[self.activation](h)
    return _dense(x.shape[-1], self.bias, self.dtype, "fc2")(h)


class Block(nn.Module):
  """One pre-norm transformer block, shaped as the body of a scan.

  Stochastic depth drops a whole branch of an example with the block's rate
  and divides the branch by the chance of staying.
  """

  num_heads: int
  mlp_ratio: float
  norm: str
  activation: str
  qk_norm: bool
  qkv_bias: bool
  proj_bias: bool
  attention: str
  dtype: str
  stochastic: bool
  return_layers: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B N D"],
    drop_rate: Float[Array, ""],
    valid: Bool[Array, "B N"] | None,
  ) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"] | None]:
    norm = functools.partial(NORMS[self.norm], dtype=self.dtype)
    attn = Attention(
      self.num_heads,
      self.norm,
      self.qk_norm,
      self.qkv_bias,
      self.proj_bias,
      self.attention,
      self.dtype,
      name="attn",
    )
    hidden = int(x.shape[-1] * self.mlp_ratio)
    mlp = Mlp(hidden, self.activation, self.proj_bias, self.dtype, name="mlp")
    x = x + self._drop_path(attn(norm(name="norm1")(x), valid), drop_rate)
    x = x + self._drop_path(mlp(norm(name="norm2")(x)), drop_rate)
    return x, (x if self.return_layers else None)

  def _drop_path(
    self, x: Float[Array, "B N D"], rate: Float[Array, ""]
  ) -> Float[Array, "B N D"]:
    if not self.stochastic:
      return x
    shape = (x.shape[0], 1, 1)
    stays = jax.random.bernoulli(self.make_rng("drop_path"), 1 - rate, shape)
    return x * (stays / (1 - rate)).astype(x.dtype)


class ViT(nn.Module):
  """Encodes spectrograms to tokens, with only the kept patches if told.

  Attributes:
    grid: (time, freq) patches.
    patch_size: side of a patch, in frames and in bands.
    width: D, channels of a token.
    depth: number of blocks.
    num_heads: attention heads; divides width.
    mlp_ratio: hidden width of the MLP over D.
    drop_path: stochastic depth of the last block; linear from 0 at the first.
    norm: a name in NORMS.
    activation: a name in ACTIVATIONS.
    qk_norm: normalise queries and keys per head.
    qkv_bias: bias in the qkv projection.
    proj_bias: bias in the attention output and in the MLP.
    pos_embed: "learnable", or "fixed" at the sin-cos table.
    pos_layout: grid of that table, "paper" (time, freq) or "released".
    class_token: prepend a learned token with a position of its own.
    final_norm: normalise the output tokens.
    attention: the kernel, a name in KERNELS; see `models.kernels`.
    remat: what the backward pass recomputes, a name in REMAT.
    scan_unroll: blocks per step of the scan.
    dtype: of matrix products and the residual stream.
  """

  grid: tuple[int, int]
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_ratio: float
  drop_path: float
  norm: str
  activation: str
  qk_norm: bool
  qkv_bias: bool
  proj_bias: bool
  pos_embed: str
  pos_layout: str
  class_token: bool
  final_norm: bool
  attention: str
  remat: str
  scan_unroll: int
  dtype: str

  @nn.compact
  def __call__(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
    return_layers: bool = False,
    valid: Bool[Array, "B K"] | None = None,
  ) -> (
    Float[Array, "B N D"]
    | tuple[Float[Array, "B N D"], Float[Array, "depth B N D"]]
  ):
    """Encodes a batch.

    Args:
      fbank: standardised log-mel spectrograms.
      keep_ids: ids of the tokens to encode, or None for all.
      train: stochastic depth on; needs the rng collection "drop_path".
      return_layers: also return the output of every block.
      valid: False for tokens that no other token may attend to; their own
        outputs mean nothing. None is all True.

    Returns:
      Tokens, the class token first if there is one; with return_layers also
      the block outputs, before the final norm.

    Raises:
      ValueError: if the spectrogram does not fit the grid.
    """
    self._check(fbank)
    patches = patchify(fbank, self.patch_size)
    pos, cls_pos = self._positions()
    if keep_ids is not None:
      patches = jnp.take_along_axis(patches, keep_ids[:, :, None], axis=1)
      pos = pos[keep_ids]

    embed = PatchEmbed(self.width, self.norm, self.dtype, name="patch_embed")
    x = embed(patches) + pos.astype(self.dtype)
    if self.class_token:
      cls = self.param(
        "cls_token", nn.initializers.normal(1e-6), (1, 1, self.width)
      )
      cls = jnp.broadcast_to(cls + cls_pos, (x.shape[0], 1, self.width))
      x = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
      if valid is not None:
        always = jnp.ones_like(valid[:, :1])
        valid = jnp.concatenate([always, valid], axis=1)
    x = NORMS[self.norm](dtype=self.dtype, name="norm_pre")(x)

    blocks = self._blocks(train, return_layers)
    x, layers = blocks(x, self._drop_rates(), valid)
    if self.final_norm:
      x = NORMS[self.norm](dtype=self.dtype, name="norm")(x)
    return (x, layers) if return_layers else x

  def _positions(self) -> tuple[Float[Array, "L D"], Float[Array, "_ D"]]:
    """Returns the position embeddings of the patches and of the class token."""
    # Parity: the published code builds its table for a (freq, time) grid
    # while tokens are laid out (time, freq).
    grid = self.grid[::-1] if self.pos_layout == "released" else self.grid
    extra = int(self.class_token)

    def table(_key):
      rows = np.pad(sincos_table(*grid, self.width), ((extra, 0), (0, 0)))
      return jnp.asarray(rows[None])

    pos = jnp.asarray(self.param("pos_embed", table))[0]
    if self.pos_embed == "fixed":
      pos = jax.lax.stop_gradient(pos)
    return pos[extra:], pos[:extra]

  def _drop_rates(self) -> Float[Array, "depth"]:
    return jnp.linspace(0.0, self.drop_path, self.depth, dtype=jnp.float32)

  def _blocks(self, train: bool, return_layers: bool) -> Callable:
    """Returns all blocks as one scan over their stacked parameters."""
    stack = nn.scan(
      REMAT[self.remat](Block),
      variable_axes={"params": 0},
      split_rngs={"params": True, "drop_path": True},
      in_axes=(0, nn.broadcast),
      length=self.depth,
      unroll=self.scan_unroll,
    )
    return stack(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      norm=self.norm,
      activation=self.activation,
      qk_norm=self.qk_norm,
      qkv_bias=self.qkv_bias,
      proj_bias=self.proj_bias,
      attention=self.attention,
      dtype=self.dtype,
      stochastic=train and self.drop_path > 0,
      return_layers=return_layers,
      name="blocks",
    )

  def _check(self, fbank: Float[Array, "B T F"]) -> None:
    fits = tuple(n * self.patch_size for n in self.grid)
    if fbank.shape[1:] != fits:
      raise ValueError(
        f"spectrogram of {fbank.shape[1:]} (frames, bands) does not fit "
        f"grid {self.grid} of {self.patch_size}-patches, which needs {fits}; "
        "set num_frames and num_mel_bins, or the grid, to match"
      )
    if self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not divisible by num_heads {self.num_heads}; "
        f"use a width of {self.num_heads * (self.width // self.num_heads)}"
      )
    for name, known in (
      ("norm", NORMS),
      ("activation", ACTIVATIONS),
      ("attention", KERNELS),
      ("remat", REMAT),
      ("pos_embed", ("learnable", "fixed")),
      ("pos_layout", ("paper", "released")),
    ):
      if (value := getattr(self, name)) not in known:
        raise ValueError(
          f"{name} {value!r} is unknown; use one of {tuple(known)}"
        )


def _dense(features: int, use_bias: bool, dtype: str, name: str) -> nn.Dense:
  return nn.Dense(
    features, use_bias, dtype=dtype, kernel_init=DENSE_INIT, name=name
  )


NORMS = {
  # The one-pass variance cancels in float32 when the mean is large.
  "layernorm": functools.partial(
    nn.LayerNorm, epsilon=NORM_EPS, use_fast_variance=False
  ),
  "rmsnorm": functools.partial(nn.RMSNorm, epsilon=NORM_EPS),
}

ACTIVATIONS = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "silu": nn.silu,
}

# A scan already keeps XLA from merging the recomputation away.
REMAT = {
  "none": lambda block: block,
  "full": functools.partial(nn.remat, prevent_cse=False),
  "dots": functools.partial(
    nn.remat,
    prevent_cse=False,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
}
