"""Losses in blocks against the same losses as one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import blockwise, losses, sharding

CLIPS, WIDTH = 48, 16


def views(dtype=np.float32):
  rng = np.random.default_rng(0)
  z_time = rng.standard_normal((CLIPS, WIDTH))
  z_freq = z_time + 0.7 * rng.standard_normal((CLIPS, WIDTH))
  return z_time.astype(dtype), z_freq.astype(dtype)


def negatives(count):
  rng = np.random.default_rng(1)
  rows = rng.standard_normal((count, WIDTH)).astype(np.float32)
  return jnp.asarray(rows) if count else None


def value_and_grad(loss):
  """Of a loss of (z_time, z_freq, scale, bias), with what goes alongside."""
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def dense(name, queue):
  def loss(z_time, z_freq, scale, bias):
    return losses.CONTRASTIVE[name](
      z_time, z_freq, logit_scale=scale, logit_bias=bias, negatives=queue
    )

  return value_and_grad(loss)


def blocks(name, queue, size, mesh):
  def loss(z_time, z_freq, scale, bias):
    return blockwise.contrast(
      name,
      z_time,
      z_freq,
      logit_scale=scale,
      logit_bias=bias,
      negatives=queue,
      block_size=size,
      mesh=mesh,
    )

  return value_and_grad(loss)


def test_every_contrastive_loss_has_a_blockwise_form():
  assert blockwise.ROWS.keys() == losses.CONTRASTIVE.keys()


@pytest.mark.parametrize("num_queued", [0, 10])
@pytest.mark.parametrize("name", losses.CONTRASTIVE)
@pytest.mark.parametrize(
  # Blocks that divide the rows of a device, that do not, and one block.
  "num_devices, size",
  [(1, 16), (1, 7), (2, 4096), (4, 5), (8, 4)],
)
def test_blocks_give_the_loss_and_the_gradients_of_the_matrix(
  name, num_queued, num_devices, size
):
  queue = negatives(num_queued)
  scalars = jnp.float32(12.0), jnp.float32(-3.0)
  (expected, aux), grads = dense(name, queue)(*views(), *scalars)
  mesh = sharding.make_mesh(jax.devices()[:num_devices])
  rows = [jax.device_put(z, sharding.batch_sharded(mesh)) for z in views()]
  (loss, own_aux), own_grads = blocks(name, queue, size, mesh)(*rows, *scalars)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(own_aux["accuracy"], aux["accuracy"], rtol=1e-6)
  for own, grad in zip(own_grads[:2], grads[:2], strict=True):
    assert own.sharding.is_equivalent_to(rows[0].sharding, 2)
    np.testing.assert_allclose(own, grad, atol=1e-6 * np.abs(grad).max())
  # Of the scale and the bias, which sum over all pairs.
  np.testing.assert_allclose(own_grads[2:], grads[2:], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", [f"case{k}" for k in range(4)])
def test_blocks_equal_the_reference(golden, case):
  z = golden("ntxent.npz")
  mesh = sharding.make_mesh(jax.devices()[:1])
  (loss, aux), grads = blocks("nt_xent", None, 4, mesh)(
    jnp.asarray(z[f"{case}/z0"]),
    jnp.asarray(z[f"{case}/z1"]),
    jnp.float32(1 / float(z[f"{case}/temperature"])),
    jnp.float32(0.0),
  )
  # Half the spacing of float32 at the largest logit, 10, comes on top.
  np.testing.assert_allclose(loss, z[f"{case}/loss64"], atol=5e-7, rtol=1e-6)
  np.testing.assert_allclose(aux["accuracy"], z[f"{case}/res/acc"])
  for view, grad in enumerate(grads[:2]):
    expected = z[f"{case}/grad_z{view}"]
    atol = 4 * z[f"{case}/grad_f64absdiff"] + 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(grad, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", losses.CONTRASTIVE)
def test_extreme_temperatures_stay_finite(name):
  mesh = sharding.make_mesh(jax.devices()[:1])
  step = blocks(name, negatives(10), 16, mesh)
  (loss, _), grads = step(*views(), jnp.float32(100.0), jnp.float32(-50.0))
  (expected, _), _ = dense(name, negatives(10))(
    *views(), jnp.float32(100.0), jnp.float32(-50.0)
  )
  # Differences of logits of 50 and more.
  np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-5)
  assert all(np.isfinite(grad).all() for grad in grads)


def test_devices_exchange_projections_and_scalars_only():
  mesh = sharding.make_mesh()
  rows = sharding.batch_sharded(mesh)
  step = blocks("nt_xent", None, 4, mesh)
  shapes = [
    *(jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=rows) for z in views()),
    *(jax.ShapeDtypeStruct((), np.float32),) * 2,
  ]
  text = step.lower(*shapes).compile().as_text()
  for kind in ("all-to-all", "collective-permute", "reduce-scatter"):
    assert kind not in text
  gathered = [line for line in text.splitlines() if " all-gather(" in line]
  assert gathered
  assert all(
    f"f32[{CLIPS},{WIDTH}]" in line or f"f32[{CLIPS}]" in line
    for line in gathered
  )


def test_memory_does_not_grow_with_the_square_of_the_batch():
  mesh = sharding.make_mesh(jax.devices()[:1])
  z = jax.ShapeDtypeStruct((8192, WIDTH), np.float32)
  scalar = jax.ShapeDtypeStruct((), np.float32)
  step = blocks("nt_xent", None, 512, mesh)
  plan = step.lower(z, z, scalar, scalar).compile().memory_analysis()
  matrix = 4 * (2 * 8192) ** 2
  assert plan.temp_size_in_bytes < matrix / 50
