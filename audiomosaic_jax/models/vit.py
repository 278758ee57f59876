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

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from audiomosaic_jax.models import kernels
from audiomosaic_jax.models.layers import (
  ACTIVATIONS,
  NORMS,
  Dense,
  HeadsDense,
  Mlp,
)
from audiomosaic_jax.models.positions import sincos_table
from audiomosaic_jax.models.remat import POLICIES, remat


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
    x = Dense(self.width, True, self.dtype, name="proj")(patches)
    return NORMS[self.norm](dtype=self.dtype, name="norm")(x)


class Attention(nn.Module):
  """Multi-head self-attention; the fused qkv is laid out [q|k|v][head][dim].

  Tokens from `length` on are padding, which nobody attends to.

  Reference: timm Attention, with its optional norms of q and k per head.
  """

  num_heads: int
  norm: str
  qk_norm: bool
  qkv_bias: bool
  proj_bias: bool
  kernel: str
  length: int
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"] | None
  ) -> Float[Array, "B N D"]:
    qkv = HeadsDense(self.num_heads, self.qkv_bias, self.dtype, name="qkv")
    q, k, v = qkv(x)
    if self.qk_norm:
      q = NORMS[self.norm](dtype=self.dtype, name="q_norm")(q)
      k = NORMS[self.norm](dtype=self.dtype, name="k_norm")(k)
    heads = kernels.attend(q, k, v, valid, self.kernel, self.length)
    proj = Dense(x.shape[-1], self.proj_bias, self.dtype, name="proj")
    return proj(heads.reshape(x.shape))


class Block(nn.Module):
  """One pre-norm transformer block, shaped as the body of a scan.

  Each of the two branches is multiplied by what stochastic depth has drawn for
  the example, see `branch_scales`.
  """

  num_heads: int
  mlp_ratio: float
  norm: str
  activation: str
  qk_norm: bool
  qkv_bias: bool
  proj_bias: bool
  attention: str
  length: int
  dtype: str
  return_layers: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B N D"],
    scales: Float[Array, "2 B"] | None,
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
      self.length,
      self.dtype,
      name="attn",
    )
    hidden = int(x.shape[-1] * self.mlp_ratio)
    mlp = Mlp(hidden, self.activation, self.proj_bias, self.dtype, name="mlp")
    x = x + _scaled(attn(norm(name="norm1")(x), valid), scales, 0)
    x = checkpoint_name(x, "middle")
    x = x + _scaled(mlp(norm(name="norm2")(x)), scales, 1)
    return x, (x if self.return_layers else None)


def _scaled(
  branch: Float[Array, "B N D"], scales: Float[Array, "2 B"] | None, index: int
) -> Float[Array, "B N D"]:
  if scales is None:
    return branch
  return branch * scales[index, :, None, None].astype(branch.dtype)


def branch_scales(
  keys: Key[Array, "B"], depth: int, drop_path: float
) -> Float[Array, "depth 2 B"]:
  """Returns what stochastic depth multiplies the branches of each block by.

  A branch of an example is dropped with the rate of its block, or divided by
  the chance of staying. Drawn ahead and example by example, it depends on
  nothing else in the batch, nor on how that is cut up.

  Args:
    keys: of the examples.
    depth: number of blocks.
    drop_path: rate of the last block; linear from 0 at the first.

  Reference: Huang et al. 2016; the scaling is timm's DropPath.
  """
  stays = 1 - jnp.linspace(0.0, drop_path, depth)[:, None]

  def draw(key: Key[Array, ""]) -> Float[Array, "depth 2"]:
    return jax.random.bernoulli(key, stays, (depth, 2)) / stays

  return jnp.moveaxis(jax.vmap(draw)(keys), 0, -1)


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
    remat: what the backward pass recomputes, a name in `remat.POLICIES`.
    scan_unroll: blocks per step of the scan; 0 is all of them on a GPU, where
      a loop copies all it keeps for the backward pass, and else 1.
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
    drop_keys: Key[Array, "B"] | None = None,
  ) -> (
    Float[Array, "B N D"]
    | tuple[Float[Array, "B N D"], Float[Array, "depth B N D"]]
  ):
    """Encodes a batch.

    Args:
      fbank: standardised log-mel spectrograms.
      keep_ids: ids of the tokens to encode, or None for all.
      train: stochastic depth on.
      return_layers: also return the output of every block.
      valid: False for tokens that no other token may attend to; their own
        outputs mean nothing. None is all True.
      drop_keys: of the examples, for stochastic depth; None splits the rng
        "drop_path".

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

    scales = None
    if train and self.drop_path > 0:
      if drop_keys is None:
        drop_keys = jax.random.split(self.make_rng("drop_path"), len(x))
      scales = branch_scales(drop_keys, self.depth, self.drop_path)
    x, layers = self._run_blocks(x, scales, valid, return_layers)
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

  def _run_blocks(
    self,
    x: Float[Array, "B N D"],
    scales: Float[Array, "depth 2 B"] | None,
    valid: Bool[Array, "B N"] | None,
    return_layers: bool,
  ) -> tuple[Float[Array, "B N D"], Float[Array, "depth B N D"] | None]:
    """Runs all blocks as one scan over their stacked parameters."""
    length = x.shape[1]
    kernel = kernels.choose(
      self.attention,
      dtype=self.dtype,
      channels=self.width // self.num_heads,
      masked=valid is not None,
    )
    unroll = self._unroll()
    stack = nn.scan(
      remat(Block, self.remat, in_loop=unroll < self.depth),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast if scales is None else 0, nn.broadcast),
      length=self.depth,
      unroll=unroll,
    )
    blocks = stack(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      norm=self.norm,
      activation=self.activation,
      qk_norm=self.qk_norm,
      qkv_bias=self.qkv_bias,
      proj_bias=self.proj_bias,
      attention=kernel,
      length=length,
      dtype=self.dtype,
      return_layers=return_layers,
      name="blocks",
    )
    x = kernels.row_major(kernels.pad(x, kernel), self.attention)
    x, layers = blocks(x, scales, valid)
    x = kernels.row_major(x, self.attention)
    return x[:, :length], None if layers is None else layers[:, :, :length]

  def _unroll(self) -> int:
    """Returns the blocks per step of the scan."""
    if self.scan_unroll:
      return min(self.scan_unroll, self.depth)
    return self.depth if kernels.on_gpu() else 1

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
      ("attention", kernels.KERNELS),
      ("remat", POLICIES),
      ("pos_embed", ("learnable", "fixed")),
      ("pos_layout", ("paper", "released")),
    ):
      if (value := getattr(self, name)) not in known:
        raise ValueError(
          f"{name} {value!r} is unknown; use one of {tuple(known)}"
        )
