"""Attention of all tokens to all, by the kernel that suits the device."""

import jax
import jax.numpy as jnp
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
) -> Float[Array, "B N H C"]:
  """Returns softmax(q k / sqrt(C)) v of every head.

  Args:
    q: queries.
    k: keys.
    v: values.
    valid: False for tokens that none may attend to; None is all True.
    kernel: a name in KERNELS; see `choose`.
  """
  if choose(kernel, q, masked=valid is not None) == "cudnn":
    return _cudnn(q, k, v)
  return _xla(q, k, v, valid)


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
) -> Float[Array, "B N H C"]:
  """Returns the attention of all tokens to all, by cuDNN's fused kernel.

  JAX gives it gradients for even lengths only, so an odd length is padded by
  a token that nobody attends to.
  """
  length = q.shape[1]
  if length % 2 == 0:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
  # Of q, because JAX 0.10 cannot map over examples with a constant here.
  lengths = 0 * q[:, 0, 0, 0].astype(jnp.int32) + length
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )[:, :length]


def choose(name: str, q: jax.Array, *, masked: bool) -> str:
  """Returns the implementation of `jax.nn.dot_product_attention` to use.

  Args:
    name: one of KERNELS. "auto" is "cudnn" where cuDNN's fused kernel does
      the same: on NVIDIA GPUs since Ampere, in half precision, without a mask.
    q: queries [B, N, H, C].
    masked: some keys are left out.
  """
  if name != "auto":
    return name
  fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
  return "cudnn" if fits and not masked and _has_cudnn_kernel() else "xla"


def _has_cudnn_kernel() -> bool:
  """Whether the GPUs, if that is what programs run on, know the kernel."""
  if jax.default_backend() != "gpu":
    return False
  version = getattr(jax.local_devices()[0], "compute_capability", "0.0")
  return float(version) >= CUDNN_CAPABILITY
