"""The contrastive loss against the reference, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import losses, sharding


def _loss(z_time, z_freq, logit_scale=10.0, logit_bias=0.0):
  return losses.nt_xent(
    z_time,
    z_freq,
    logit_scale=logit_scale,
    logit_bias=logit_bias,
    negatives=None,
  )


# Gradients with respect to both views, the auxiliary values alongside.
_value_and_grad = jax.jit(
  jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)
)


def _batch(batch_size, width, seed=0):
  rng = np.random.default_rng(seed)
  z_time = rng.standard_normal((batch_size, width)).astype(np.float32)
  z_freq = z_time + rng.standard_normal((batch_size, width)) * 0.7
  return jnp.asarray(z_time), jnp.asarray(z_freq, jnp.float32)


def _over_devices(num_devices):
  mesh = sharding.make_mesh(jax.devices()[:num_devices])
  return sharding.batch_sharded(mesh)


@pytest.mark.parametrize("case", [f"case{k}" for k in range(4)])
def test_loss_accuracy_and_gradients_equal_the_reference(golden, case):
  z = golden("ntxent.npz")
  assert int(z["num_cases"]) == 4
  (loss, aux), grads = _value_and_grad(
    jnp.asarray(z[f"{case}/z0"]),
    jnp.asarray(z[f"{case}/z1"]),
    1 / float(z[f"{case}/temperature"]),
  )
  np.testing.assert_allclose(loss, z[f"{case}/loss64"], rtol=1e-6)
  np.testing.assert_allclose(aux["accuracy"], z[f"{case}/res/acc"])
  for view, grad in enumerate(grads):
    expected = z[f"{case}/grad_z{view}"]
    atol = 4 * z[f"{case}/grad_f64absdiff"] + 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(grad, expected, rtol=0, atol=atol)


def test_equal_rows_and_a_zero_row_give_the_reference_loss_and_accuracy(
  golden,
):
  z = golden("ntxent.npz")
  (loss, aux), grads = _value_and_grad(
    jnp.asarray(z["degenerate/z0"]),
    jnp.asarray(z["degenerate/z1"]),
    1 / float(z["degenerate/temperature"]),
  )
  np.testing.assert_allclose(loss, z["degenerate/loss"], rtol=1e-6)
  np.testing.assert_allclose(aux["accuracy"], z["degenerate/acc"])
  assert all(jnp.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("index", range(4))
def test_learned_temperature_and_its_gradient_equal_the_reference(
  golden, index
):
  z = golden("ntxent.npz")
  z_time, z_freq = jnp.asarray(z["tau/z0"]), jnp.asarray(z["tau/z1"])

  def loss_of(log_scale):
    scale = losses.inverse_temperature(log_scale)
    return _loss(z_time, z_freq, scale)[0]

  log_scale = jnp.float32(z["tau/logit_scale_param"][index])
  loss, grad = jax.value_and_grad(loss_of)(log_scale)
  np.testing.assert_allclose(
    losses.inverse_temperature(log_scale),
    z["tau/inverse_tau_used"][index],
    rtol=1e-6,
  )
  np.testing.assert_allclose(loss, z["tau/loss"][index], rtol=2e-6)
  np.testing.assert_allclose(
    grad, z["tau/grad_logit_scale_param"][index], rtol=1e-5, atol=1e-7
  )


def test_the_gradient_of_the_temperature_passes_at_its_upper_limit():
  grad = jax.grad(losses.inverse_temperature)(jnp.float32(0.0))
  np.testing.assert_allclose(grad, 1.0)


@pytest.mark.parametrize("index", range(3))
def test_a_logit_bias_changes_neither_loss_nor_gradient(golden, index):
  z = golden("ntxent.npz")
  z_time, z_freq = jnp.asarray(z["tau/z0"]), jnp.asarray(z["tau/z1"])
  bias = jnp.float32(z["bias/bias"][index])
  loss, grad = jax.value_and_grad(
    lambda b: _loss(z_time, z_freq, logit_bias=b)[0]
  )(bias)
  np.testing.assert_allclose(loss, z["bias/loss"][index], atol=5e-7)
  np.testing.assert_allclose(grad, 0.0, atol=1e-6)


def test_four_devices_give_the_global_loss_of_the_reference(golden):
  z = golden("ntxent.npz")
  num_ranks, per_rank, width = z["dist/z0"].shape
  rows = _over_devices(num_ranks)
  views = [
    jax.device_put(z[f"dist/z{v}"].reshape(-1, width), rows) for v in (0, 1)
  ]
  assert views[0].addressable_shards[0].data.shape == (per_rank, width)
  (loss, aux), grads = _value_and_grad(*views, 1 / float(z["dist/temperature"]))
  np.testing.assert_allclose(loss, z["dist/global_loss"], rtol=1e-6)
  np.testing.assert_allclose(loss, z["dist/rank_loss"].mean(), rtol=1e-6)
  np.testing.assert_allclose(aux["accuracy"], z["dist/global_acc"], rtol=1e-6)
  for view, grad in enumerate(grads):
    expected = z[f"dist/global_grad_z{view}"].reshape(-1, width)
    np.testing.assert_allclose(grad, expected, atol=1e-7)
    gathered = z[f"dist/rank_grad_z{view}"].reshape(-1, width) / num_ranks
    np.testing.assert_allclose(grad, gathered, atol=1e-7)


def test_eight_devices_equal_one_without_moving_rows_between_devices():
  views = _batch(32, 16)
  (loss, aux), grads = _value_and_grad(*views)
  rows = _over_devices(8)
  sharded = [jax.device_put(view, rows) for view in views]
  compiled = _value_and_grad.lower(*sharded).compile()
  assert "all-to-all" not in compiled.as_text()
  assert "collective-permute" not in compiled.as_text()
  (sharded_loss, sharded_aux), sharded_grads = compiled(*sharded)
  np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
  np.testing.assert_allclose(sharded_aux["accuracy"], aux["accuracy"])
  for sharded_grad, grad in zip(sharded_grads, grads, strict=True):
    assert sharded_grad.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_allclose(sharded_grad, grad, atol=1e-7)


def test_the_loss_is_symmetric_in_the_views_and_in_the_order_of_clips():
  z_time, z_freq = _batch(8, 4)
  order = jnp.array([3, 1, 7, 0, 2, 6, 5, 4])
  expected = _loss(z_time, z_freq)[0]
  np.testing.assert_allclose(_loss(z_freq, z_time)[0], expected, rtol=1e-6)
  np.testing.assert_allclose(
    _loss(z_time[order], z_freq[order])[0], expected, rtol=1e-6
  )


def test_the_length_of_a_projection_does_not_matter():
  z_time, z_freq = _batch(8, 4)
  np.testing.assert_allclose(
    _loss(z_time * 100, z_freq * 0.01)[0],
    _loss(z_time, z_freq)[0],
    rtol=1e-5,
  )


def test_collapsed_projections_lose_log_of_the_candidates_and_never_hit():
  ones = jnp.ones((8, 4))
  loss, aux = _loss(ones, ones)
  np.testing.assert_allclose(loss, np.log(15), rtol=1e-6)
  assert float(aux["accuracy"]) == 0.0


def test_bfloat16_projections_are_scored_in_float32():
  z_time, z_freq = (z.astype(jnp.bfloat16) for z in _batch(8, 16))
  loss, _ = _loss(z_time, z_freq)
  expected, _ = _loss(z_time.astype(jnp.float32), z_freq.astype(jnp.float32))
  assert loss.dtype == jnp.float32
  np.testing.assert_array_equal(loss, expected)


def test_a_batch_of_one_clip_is_refused():
  with pytest.raises(ValueError, match="at least 2"):
    _loss(jnp.ones((1, 4)), jnp.ones((1, 4)))


def _queued():
  """Six clips and three more negatives, and the cosines of their 12 anchors."""
  z_time, z_freq = _batch(6, 4)
  queue = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)
  u = np.concatenate([z_time, z_freq, queue]).astype(np.float64)
  u /= np.linalg.norm(u, axis=1, keepdims=True)
  return (z_time, z_freq, jnp.asarray(queue)), u[:12] @ u.T


def test_the_sigmoid_loss_is_the_mean_over_anchors_of_every_pairs_own_loss():
  (z_time, z_freq, queue), cosines = _queued()
  loss, aux = losses.sigmoid_pairs(
    z_time, z_freq, logit_scale=5.0, logit_bias=-2.0, negatives=queue
  )
  logits = 5 * cosines - 2
  positive = np.arange(12)[:, None] == np.roll(np.arange(12), 6)
  expected = np.where(
    np.pad(positive, ((0, 0), (0, 3))),
    np.log1p(np.exp(-logits)),
    np.log1p(np.exp(logits)),
  )
  expected[np.arange(12), np.arange(12)] = 0
  np.testing.assert_allclose(loss, expected.sum() / 12, rtol=1e-6)
  assert 0 < float(aux["accuracy"]) <= 1


def test_further_negatives_join_the_denominator():
  (z_time, z_freq, queue), cosines = _queued()
  loss, _ = losses.nt_xent(
    z_time, z_freq, logit_scale=5.0, logit_bias=0.0, negatives=queue
  )
  logits = 5 * cosines
  logits[np.arange(12), np.arange(12)] = -np.inf
  positive = logits[np.arange(12), np.roll(np.arange(12), 6)]
  expected = np.log(np.exp(logits).sum(1)) - positive
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
