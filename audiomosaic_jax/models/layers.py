"""Layers of every token of a batch: dense, norms, activations, MLP.

Tokens of all examples are rows of one matrix in every product, so that its
gradient is a plain product as well. With the examples as an axis of its own,
XLA for GPUs kept activations with the tokens behind the channels, and spent as
long on moving them as on the products.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# timm truncates its normal at +-2, which is 100 standard deviations.
DENSE_INIT = nn.initializers.normal(0.02)
NORM_EPS = 1e-6


class Dense(nn.Module):
  """x W + b, applied to the last axis; parameters as those of `nn.Dense`.

  The product is named for `jax.checkpoint` policies as the module is.

  Attributes:
    features: channels of the output.
    use_bias: add b.
    dtype: of the product; parameters are float32.
  """

  features: int
  use_bias: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
    width = x.shape[-1]
    kernel = self.param("kernel", DENSE_INIT, (width, self.features))
    y = x.astype(self.dtype).reshape(-1, width) @ kernel.astype(self.dtype)
    y = checkpoint_name(y, self.name)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y += bias.astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


class HeadsDense(nn.Module):
  """Dense layer to q, k and v of every head, stored as one flat kernel.

  They are three products, because what comes out of one has to be cut and
  copied. Of each, devices can share out the heads.
  """

  num_heads: int
  use_bias: bool
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"]
  ) -> tuple[Float[Array, "B N H C"], ...]:
    width = x.shape[-1]
    kernel = self.param("kernel", DENSE_INIT, (width, 3 * width))
    kernels = kernel.astype(self.dtype).reshape(width, 3, width)
    rows = x.astype(self.dtype).reshape(-1, width)
    parts = [rows @ kernels[:, i] for i in range(3)]
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (3 * width,))
      biases = bias.astype(self.dtype).reshape(3, width)
      parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
    # By heads a TPU might store them with half of the channels empty.
    parts = checkpoint_name(tuple(parts), self.name)
    heads = (*x.shape[:-1], self.num_heads, width // self.num_heads)
    return tuple(part.reshape(heads) for part in parts)


class Mlp(nn.Module):
  """Two dense layers with an activation between, applied to every token."""

  hidden: int
  activation: str
  bias: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    h = Dense(self.hidden, self.bias, self.dtype, name="fc1")(x)
    h = ACTIVATIONS[self.activation](h)
    return Dense(x.shape[-1], self.bias, self.dtype, name="fc2")(h)


@jax.custom_vjp
def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """Returns x times the normal distribution function of x, as timm has it.

  It is computed in float32 and by erf, as PyTorch does. `jax.nn.gelu` takes
  erfc, and rounds to bfloat16 at every step. For its gradient, written out,
  nothing but x is kept.
  """
  y = x.astype(jnp.float32)
  return (y * _normal_cdf(y)).astype(x.dtype)


def _gelu_forward(x):
  return gelu(x), x


def _gelu_backward(x, grad):
  y = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
  slope = _normal_cdf(y) + y * density
  return ((grad.astype(jnp.float32) * slope).astype(x.dtype),)


def _normal_cdf(y):
  return 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5)))


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def layer_norm(
  x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"]
) -> Float[Array, "*B D"]:
  """Returns (x - mean) / sqrt(var + eps) * scale + bias, in float32.

  Its gradient is written out: it takes two sums over a row of x, where the one
  that JAX derives takes five.
  """
  return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
  y = x.astype(jnp.float32)
  mean = y.mean(axis=-1)
  # The one-pass variance cancels in float32 when the mean is large.
  variance = jnp.square(y - mean[..., None]).mean(axis=-1)
  inverse = jax.lax.rsqrt(variance + NORM_EPS)
  # Without a last axis of 1, which a TPU would store as 128.
  mean, inverse = checkpoint_name((mean, inverse), "norm")
  unit = (y - mean[..., None]) * inverse[..., None]
  return unit * scale + bias, (x, scale, mean, inverse)


def _layer_norm_backward(residuals, grad):
  x, scale, mean, inverse = residuals
  mean, inverse = mean[..., None], inverse[..., None]
  unit = (x.astype(jnp.float32) - mean) * inverse
  scaled = grad * scale
  along = (scaled * unit).mean(axis=-1, keepdims=True)
  level = scaled.mean(axis=-1, keepdims=True)
  d_x = inverse * (scaled - level - unit * along)
  rows = tuple(range(x.ndim - 1))
  return d_x.astype(x.dtype), (grad * unit).sum(rows), grad.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
  """`layer_norm` with its parameters, which are those of `nn.LayerNorm`.

  Attributes:
    dtype: of the result.
    use_scale: multiply by a scale, else by 1.
    use_bias: add a bias.
  """

  dtype: str
  use_scale: bool = True
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    width = x.shape[-1:]
    scale, bias = jnp.ones(width), jnp.zeros(width)
    if self.use_scale:
      scale = self.param("scale", nn.initializers.ones, width)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, width)
    # Parameters of a file are numpy's.
    normed = layer_norm(x, jnp.asarray(scale), jnp.asarray(bias))
    return normed.astype(self.dtype)


NORMS = {
  "layernorm": LayerNorm,
  "rmsnorm": functools.partial(nn.RMSNorm, epsilon=NORM_EPS),
}

ACTIVATIONS = {
  "gelu": gelu,
  "silu": nn.silu,
}
