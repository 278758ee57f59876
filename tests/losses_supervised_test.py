"""Supervised losses against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import losses

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(6, 3)) * 3, jnp.float32)
LABELS = np.array([0, 1, 2, 1, 1, 0])
ONE_HOT = jnp.eye(3)[LABELS]
PLAIN = {"class_weights": (), "label_smoothing": 0.0}


def test_softmax_loss_is_the_weighted_mean_of_the_log_probabilities():
  x = np.asarray(LOGITS, np.float64)
  log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
  nll = -log_p[np.arange(6), LABELS]
  np.testing.assert_allclose(
    losses.softmax_cross_entropy(LOGITS, ONE_HOT, **PLAIN),
    nll.mean(),
    rtol=1e-5,
  )
  weights = np.array([0.1, 0.9, 2.0])
  np.testing.assert_allclose(
    losses.softmax_cross_entropy(
      LOGITS, ONE_HOT, class_weights=tuple(weights), label_smoothing=0.0
    ),
    (weights[LABELS] * nll).sum() / weights[LABELS].sum(),
    rtol=1e-5,
  )


def test_sigmoid_loss_is_the_mean_binary_cross_entropy():
  targets = jnp.asarray(RNG.random((6, 3)), jnp.float32)
  p = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
  bce = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
  np.testing.assert_allclose(
    losses.sigmoid_cross_entropy(LOGITS, targets, **PLAIN),
    bce.mean(),
    rtol=1e-5,
  )
  weights = (1.0, 2.0, 0.5)
  np.testing.assert_allclose(
    losses.sigmoid_cross_entropy(
      LOGITS, targets, class_weights=weights, label_smoothing=0.0
    ),
    (bce * jnp.array(weights)).mean(),
    rtol=1e-5,
  )


@pytest.mark.parametrize("name", losses.SUPERVISED)
def test_smoothing_is_the_loss_of_smoothed_targets(name):
  loss = losses.SUPERVISED[name]
  mass = 1 / 3 if name == "softmax" else 1 / 2
  smooth = losses.SUPERVISED[name](
    LOGITS, ONE_HOT, class_weights=(), label_smoothing=0.2
  )
  np.testing.assert_allclose(
    smooth, loss(LOGITS, 0.8 * ONE_HOT + 0.2 * mass, **PLAIN), rtol=1e-6
  )


@pytest.mark.parametrize("name", losses.SUPERVISED)
def test_the_gradient_is_finite_at_extreme_logits(name):
  grad = jax.grad(losses.SUPERVISED[name])(
    jnp.array([[300.0, -300.0, 0.0]]), jnp.array([[0.0, 1.0, 0.0]]), **PLAIN
  )
  assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", losses.SUPERVISED)
def test_weights_for_another_number_of_classes_are_refused(name):
  with pytest.raises(ValueError, match="2 values for 3 classes"):
    losses.SUPERVISED[name](
      LOGITS, ONE_HOT, class_weights=(1.0, 2.0), label_smoothing=0.0
    )
