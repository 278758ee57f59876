"""Attention is the same whatever computes it, and the kernel is chosen well."""

import types

import chex
import jax
import jax.numpy as jnp
import pytest

from audiomosaic_jax.models import kernels


@pytest.mark.parametrize(
  ("backend", "capability", "dtype", "width", "masked", "kernel"),
  [
    ("gpu", "9.0", "bfloat16", 64, False, "cudnn"),
    ("gpu", "8.0", "float16", 64, False, "cudnn"),
    ("gpu", "7.5", "bfloat16", 64, False, "xla"),
    ("gpu", "9.0", "float32", 64, False, "xla"),
    ("gpu", "9.0", "bfloat16", 20, False, "xla"),
    ("gpu", "9.0", "bfloat16", 64, True, "xla"),
    ("cpu", "9.0", "bfloat16", 64, False, "xla"),
    ("tpu", "9.0", "bfloat16", 64, False, "xla"),
  ],
)
def test_auto_takes_the_fused_kernel_only_where_it_does_the_same(
  monkeypatch, backend, capability, dtype, width, masked, kernel
):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  asked = {"dtype": dtype, "channels": width, "masked": masked}
  assert kernels.choose("auto", **asked) == kernel
  assert kernels.choose("xla", **asked) == "xla"
  assert kernels.choose("cudnn", **asked) == ("xla" if masked else "cudnn")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_equal_those_of_jax(dtype, masked):
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 3, 16), dtype)
  valid = jnp.arange(9) < jnp.array([[4], [9]]) if masked else None
  mask = valid[:, None, None, :] if masked else None

  def ours(q, k, v):
    return kernels.attend(q, k, v, valid, "xla", 9)

  def theirs(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, mask=mask)

  found, expected = (
    (*jax.vjp(attend, q, k, v)[1](jnp.ones_like(q)), attend(q, k, v))
    for attend in (ours, theirs)
  )
  tolerance = 1e-6 if dtype == "float32" else 2**-8
  chex.assert_trees_all_close(found, expected, atol=tolerance, rtol=tolerance)


def test_only_an_odd_number_of_tokens_is_padded_and_only_for_cudnn():
  x = jnp.ones((2, 5, 3))
  chex.assert_trees_all_equal(kernels.pad(x, "xla"), x)
  padded = kernels.pad(x, "cudnn")
  assert padded.shape == (2, 6, 3)
  chex.assert_trees_all_equal(padded[:, :5], x)
  assert not padded[:, 5].any()
  assert kernels.pad(padded, "cudnn").shape == (2, 6, 3)
