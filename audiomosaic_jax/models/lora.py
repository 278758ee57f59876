"""A projection with a low-rank adapter beside its frozen kernel.

  y = x W + (alpha / rank) dropout(x) A B    W [in, out], A [in, r], B [r, out]

B starts at zero, so an adapter changes nothing before it is trained. A and B
are float32 whatever the type of W, and lie beside it in the tree as `lora_a`
and `lora_b`: `split` takes them out for the optimiser, `join` puts them back,
`merge` adds them to the kernels.

Reference: Hu et al. 2021, LoRA (arXiv 2106.09685), with the initialisation
of PEFT; logits are equal to PEFT's to 2e-4 and gradients to 1e-3 relative.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

KERNEL_INIT = nn.initializers.normal(0.02)
# Uniform in +-1/sqrt(in).
A_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
FACTORS = ("lora_a", "lora_b")


class Projection(nn.Module):
  """A product with a matrix, and with the adapter's two if it has a rank.

  Attributes:
    features: channels of the output.
    rank: of the adapter; 0 is none.
    alpha: the adapter's product is scaled by alpha / rank.
    dropout: share of the adapter's input that is dropped in training.
    dtype: of products.
    param_dtype: of the kernel.
    use_kernel: what is done to the kernel before its use; None is nothing.
    train: dropout on; needs the rng collection "dropout".
  """

  features: int
  rank: int
  alpha: float
  dropout: float
  dtype: str
  param_dtype: str
  use_kernel: Callable[[jax.Array], jax.Array] | None
  train: bool

  @nn.compact
  def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    width = x.shape[-1]
    kernel = self.param(
      "kernel",
      KERNEL_INIT,
      (width, self.features),
      jnp.dtype(self.param_dtype),
    )
    if self.use_kernel is not None:
      kernel = self.use_kernel(kernel)
    x = x.astype(self.dtype)
    y = x @ kernel.astype(self.dtype)
    if not self.rank:
      return y
    a = self.param("lora_a", A_INIT, (width, self.rank), jnp.float32)
    b = self.param(
      "lora_b", nn.initializers.zeros, (self.rank, self.features), jnp.float32
    )
    x = nn.Dropout(self.dropout, deterministic=not self.train)(x)
    update = (x @ a.astype(self.dtype)) @ b.astype(self.dtype)
    return y + update * (self.alpha / self.rank)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (adapters, base): two trees that share no leaf."""
  flat = traverse_util.flatten_dict(params)
  adapters = {path: x for path, x in flat.items() if path[-1] in FACTORS}
  base = {path: x for path, x in flat.items() if path[-1] not in FACTORS}
  unflatten = traverse_util.unflatten_dict
  return unflatten(adapters), unflatten(base)


def join(
  adapters: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the parameters that `split` took apart."""
  flatten = traverse_util.flatten_dict
  return traverse_util.unflatten_dict({**flatten(base), **flatten(adapters)})


def merge(params: Mapping[str, Any], *, alpha: float) -> dict[str, Any]:
  """Adds every adapter to its kernel, in float32.

  Args:
    params: with adapters; kernels may be stacked, [layers, in, out].
    alpha: of the adapters.

  Returns:
    Parameters of the same network without adapters. Kernels keep their type,
    so that bfloat16 ones lose what is below their last digit.
  """
  flat = traverse_util.flatten_dict(params)
  merged = {path: x for path, x in flat.items() if path[-1] not in FACTORS}
  for path, a in flat.items():
    if path[-1] == "lora_a":
      b, kernel = flat[*path[:-1], "lora_b"], flat[*path[:-1], "kernel"]
      update = jnp.matmul(a, b, precision="highest") * (alpha / a.shape[-1])
      summed = kernel.astype(jnp.float32) + update
      merged[*path[:-1], "kernel"] = summed.astype(kernel.dtype)
  return traverse_util.unflatten_dict(merged)


def init_adapters(shapes: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
  """Draws adapters without touching the base, which may not fit a device.

  Args:
    shapes: of all parameters, as `jax.eval_shape` tells them.
    key: random key.

  Returns:
    The tree of the adapters alone, as `split` returns it.
  """

  def draw(path, leaf):
    if path[-1].key == "lora_b":
      return jnp.zeros(leaf.shape, leaf.dtype)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    keys = jax.random.split(own, leaf.shape[0])
    return jax.vmap(lambda k: A_INIT(k, leaf.shape[1:], leaf.dtype))(keys)

  return jax.tree.map_with_path(draw, split(shapes)[0])
