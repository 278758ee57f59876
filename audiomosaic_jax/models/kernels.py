"""Attention of all tokens to all, by the kernel that suits the device."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float

KERNELS = ("auto", "xla", "cudnn")
# The least compute capability that cuDNN's kernel runs on, that of Ampere.
CUDNN_CAPABILITY = 8.0


def attend(
  q: Float[Array, "B N H C"],
  k: Float[Array, "B N H C"],
  v: Float[Array, "B N H C"],
  valid: Bool[Array, "B N"] | None,
  kernel: str,
  length: int,
) -> Float[Array, "B N H C"]:
  """Returns softmax(q k / sqrt(C)) v of every head.

  Args:
    q: queries.
    k: keys.
    v: values.
    valid: False for tokens that none may attend to; None is all True.
    kernel: "xla", or "cudnn" if valid is None.
    length: tokens; what is behind them is padding, see `pad`.
  """
  if kernel == "cudnn":
    return _cudnn(q, k, v, length)
  return _xla(q, k, v, valid)


def pad(x: Float[Array, "B N D"], kernel: str) -> Float[Array, "B M D"]:
  """Returns tokens in the number that a kernel can take gradients of.

  JAX gives cuDNN's kernel gradients for even lengths only, so an odd length is
  padded by a token that nobody attends to.
  """
  odd = kernel == "cudnn" and x.shape[1] % 2
  return jnp.pad(x, ((0, 0), (0, 1), (0, 0))) if odd else x


def _xla(
  q: Float[Array, "B N H C"],
  k: Float[Array, "B N H C"],
  v: Float[Array, "B N H C"],
  valid: Bool[Array, "B N"] | None,
) -> Float[Array, "B N H C"]:
  """Returns the attention as plain products, its softmax in float32.

  `jax.nn.dot_product_attention` computes the same with the heads behind the
  tokens, where XLA for CPUs copies every operand, forward and backward: two
  layers of ViT-B took 6 % longer to train.
  """
  weights = attention_weights(q, k, valid).astype(v.dtype)
  v = jnp.swapaxes(v, 1, 2)
  return jnp.swapaxes(jnp.einsum("bhnm,bhmc->bhnc", weights, v), 1, 2)


def attention_weights(
  q: Float[Array, "B N H C"],
  k: Float[Array, "B N H C"],
  valid: Bool[Array, "B N"] | None,
) -> Float[Array, "B H N N"]:
  """Returns softmax(q k / sqrt(C)) in float32; arguments as of `attend`."""
  q, k = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
  scores = jnp.einsum(
    "bhnc,bhmc->bhnm", q, k, preferred_element_type=jnp.float32
  )
  scores *= q.shape[-1] ** -0.5
  if valid is not None:
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(valid[:, None, None, :], scores, lowest)
  return jax.nn.softmax(scores)


def _cudnn(
  q: Float[Array, "B N H C"],
  k: Float[Array, "B N H C"],
  v: Float[Array, "B N H C"],
  length: int,
) -> Float[Array, "B N H C"]:
  """Returns the attention of all tokens to all, by cuDNN's fused kernel."""
  attention = functools.partial(
    jax.nn.dot_product_attention, q, k, v, implementation="cudnn"
  )
  if length == q.shape[1]:
    return attention()
  # Of q, because JAX 0.10 wants them to vary over the devices as it does.
  none = 0 * q[:, 0, 0, 0].astype(jnp.int32)
  return attention(
    query_seq_lengths=none + q.shape[1], key_value_seq_lengths=none + length
  )


def row_major(x: Float[Array, "B N D"], name: str) -> Float[Array, "B N D"]:
  """Returns x, its channels side by side in the memory of a GPU.

  Left to choose, XLA kept the tokens of one of two views there, in all blocks,
  and turned them around before and after each product. With "xla" by name
  nothing is pinned, as exported programs are for all platforms.
  """
  if name == "xla" or not on_gpu():
    return x
  return with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))


def choose(name: str, *, dtype: str, channels: int, masked: bool) -> str:
  """Returns the kernel to use, "xla" or "cudnn".

  Args:
    name: one of KERNELS. "auto" is "cudnn" where cuDNN's fused kernel does
      the same: on NVIDIA GPUs since Ampere, in half precision.
    dtype: of queries, keys and values.
    channels: of a head.
    masked: some keys are left out, which only "xla" knows.
  """
  if masked or name == "xla":
    return "xla"
  fits = dtype in ("bfloat16", "float16") and channels % 8 == 0
  fused = name == "cudnn" or (fits and _has_cudnn_kernel())
  return "cudnn" if fused else "xla"


def on_gpu() -> bool:
  """Whether GPUs are what programs run on, if not told otherwise."""
  return jax.default_backend() == "gpu"


def _has_cudnn_kernel() -> bool:
  """Whether the GPUs, if that is what programs run on, know the kernel."""
  if not on_gpu():
    return False
  version = getattr(jax.local_devices()[0], "compute_capability", "0.0")
  return float(version) >= CUDNN_CAPABILITY
