"""Probabilities that mean what they say: definitions and scikit-learn."""

import json

import numpy as np
import pytest
from scipy import optimize, special
from sklearn import calibration as sklearn_calibration
from sklearn import metrics

from audiomosaic_jax import calibration
from audiomosaic_jax.calibration import Calibration


def drawn(temperature, count=4_000, classes=4, seed=0):
  """Returns logits that are too sure by a factor, and labels drawn by them."""
  rng = np.random.default_rng(seed)
  true = 1.5 * rng.normal(size=(count, classes))
  ends = special.softmax(true, axis=1).cumsum(1)
  labels = (rng.random((count, 1)) > ends).sum(1).clip(0, classes - 1)
  return temperature * true, np.eye(classes)[labels]


def drawn_several(temperature, count=3_000, classes=3, seed=0):
  rng = np.random.default_rng(seed)
  true = 2 * rng.normal(size=(count, classes)) - 1
  targets = rng.random((count, classes)) < special.expit(true)
  return temperature * true, targets.astype(np.float64)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_temperature_that_spoiled_the_logits_is_found(link, temperature):
  make = drawn if link == "softmax" else drawn_several
  logits, targets = make(temperature)
  found = calibration.fit_temperature(logits, targets, link)
  assert found == pytest.approx(temperature, rel=0.08)


def test_the_temperature_is_where_the_derivative_is_zero():
  logits, targets = drawn(2.5, count=300)

  def slope(inverse):
    expected = (special.softmax(inverse * logits, axis=1) * logits).sum(1)
    return np.mean(expected - (targets * logits).sum(1))

  inverse = optimize.bisect(slope, 0.05, 20)
  found = calibration.fit_temperature(logits, targets, "softmax")
  assert found == pytest.approx(1 / inverse, rel=1e-3)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_clips_that_are_all_right_leave_the_temperature_alone(link):
  targets = np.eye(3)[[0, 1, 2, 1]]
  logits = 4 * targets - 2
  assert calibration.fit_temperature(logits, targets, link) == 1.0
  logits[0] = -logits[0]
  assert calibration.fit_temperature(logits, targets, link) > 1.0


def test_logits_that_say_nothing_are_made_as_flat_as_allowed():
  logits = np.array([[5.0, -5.0], [5.0, -5.0], [-5.0, 5.0], [-5.0, 5.0]])
  targets = np.eye(2)[[0, 1, 0, 1]]
  found = calibration.fit_temperature(logits, targets, "softmax")
  assert found == pytest.approx(calibration.LIMITS[1], rel=1e-2)


def test_a_temperature_changes_no_guess_and_makes_the_error_smaller():
  logits, targets = drawn(3.0)
  fitted = calibration.fit(
    logits[:2_000], targets[:2_000], "softmax", multi_label=False
  )
  logits, targets = logits[2_000:], targets[2_000:]
  assert fitted.thresholds is None
  np.testing.assert_array_equal(
    fitted.decisions(logits).argmax(1), logits.argmax(1)
  )
  found = calibration.quality(fitted, logits, targets)
  errors = [found[k]["expected_calibration_error"] for k in found]
  assert errors[0] > 0.1 and errors[1] < 0.04
  likelihoods = [found[k]["negative_log_likelihood"] for k in found]
  assert likelihoods[1] < likelihoods[0]
  assert likelihoods[1] == pytest.approx(
    metrics.log_loss(targets.argmax(1), fitted.probabilities(logits))
  )


def test_thresholds_have_the_best_f1_of_all():
  logits, targets = drawn_several(1.0, count=120)
  probability = special.expit(logits)
  thresholds = calibration.best_thresholds(probability, targets)
  for label, threshold in enumerate(thresholds):
    p, target = probability[:, label], targets[:, label]
    best = max(metrics.f1_score(target, p >= end) for end in np.unique(p))
    assert metrics.f1_score(target, p >= threshold) == pytest.approx(best)
    # Half-way between two clips, so that neither is on the edge.
    assert np.abs(p - threshold).min() > 0


def test_a_class_without_a_validation_clip_has_the_threshold_of_a_half():
  targets = np.array([[1, 0], [0, 0], [1, 0]])
  probability = np.array([[0.4, 0.9], [0.1, 0.2], [0.3, 0.1]])
  thresholds = calibration.best_thresholds(probability, targets)
  np.testing.assert_allclose(thresholds, [0.2, 0.5])


def test_of_several_labels_those_above_their_thresholds_are_said():
  logits, targets = drawn_several(2.0)
  fitted = calibration.fit(logits, targets, "sigmoid", multi_label=True)
  assert fitted.temperature == pytest.approx(2.0, rel=0.08)
  assert len(fitted.thresholds) == 3
  state = Calibration("sigmoid", 2.0, (0.5, 0.9, 0.1))
  decisions = state.decisions(np.array([[1.0, 1.0, 1.0], [-1.0, 9.0, -9.0]]))
  np.testing.assert_array_equal(decisions, [[1, 0, 1], [0, 1, 0]])


def test_the_curve_is_that_of_scikit_learn_and_its_error_the_definition():
  rng = np.random.default_rng(1)
  sure = rng.uniform(0.3, 1, 1_000)
  right = (rng.random(1_000) < sure**2).astype(float)
  curve = calibration.reliability(sure, right)
  shares, means = sklearn_calibration.calibration_curve(
    right, sure, n_bins=10, strategy="quantile"
  )
  np.testing.assert_allclose(curve.right, shares)
  np.testing.assert_allclose(curve.confidence, means)
  assert curve.counts.sum() == 1_000
  by_hand = sum(
    abs(sure[part].mean() - right[part].mean()) * len(part) / 1_000
    for part in np.array_split(np.argsort(sure), 10)
  )
  assert curve.error == pytest.approx(by_hand, abs=2e-3)


def test_few_guesses_are_in_few_bins():
  rng = np.random.default_rng(2)
  for count, bins in ((5, 1), (45, 2), (5_000, 10)):
    curve = calibration.reliability(rng.random(count), np.ones(count))
    assert len(curve.counts) == bins
    assert curve.counts.min() >= min(count, calibration.MIN_PER_BIN)


def test_the_reliability_of_guesses_is_their_probability_and_their_success():
  odds = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]])
  targets = np.eye(2)[[0, 0, 0]]
  plain = Calibration("softmax", 1.0, None).probabilities(np.log(odds))
  sure, right = calibration.guesses(plain, targets, "softmax")
  np.testing.assert_allclose(sure, [0.9, 0.7, 0.6])
  np.testing.assert_array_equal(right, [1, 0, 1])
  each = Calibration("sigmoid", 1.0, None).probabilities(np.log(odds))
  sure, right = calibration.guesses(each, targets, "sigmoid")
  assert sure.shape == right.shape == (6,)
  # An odds of 0.9 is a "no" of probability 1 / 1.9, and wrong.
  np.testing.assert_allclose(sure[0], 1 / 1.9)
  assert right[0] == 0


def test_a_calibration_is_read_as_it_was_written(tmp_path):
  assert calibration.read(tmp_path) is None
  logits, targets = drawn_several(2.0, count=200)
  arrays = {"logits": logits, "targets": targets}
  fitted = calibration.fit(logits, targets, "sigmoid", multi_label=True)
  names = ("a", "b", "c")
  calibration.write(tmp_path, fitted, names, {"valid": arrays, "test": arrays})
  assert calibration.read(tmp_path) == fitted
  content = json.loads((tmp_path / calibration.FILE).read_text())
  assert content["fitted_on_clips"] == 200
  assert [row["class"] for row in content["thresholds"]] == [*names]
  assert content["splits"]["test"] == content["splits"]["valid"]


def test_without_validation_clips_several_labels_are_said_above_a_half():
  logits = np.array([[1.0, 2.0, -1.0], [-1.0, -2.0, -3.0]])
  state = calibration.untouched("sigmoid", 3, multi_label=True)
  np.testing.assert_array_equal(state.decisions(logits), [[1, 1, 0], [0, 0, 0]])
  for link, several in (("sigmoid", False), ("softmax", True)):
    state = calibration.untouched(link, 3, multi_label=several)
    said = state.decisions(logits)
    np.testing.assert_array_equal(said, [[0, 1, 0], [1, 0, 0]])


def test_several_labels_have_thresholds_though_each_clip_shown_has_one():
  logits, _ = drawn_several(2.0, count=60)
  targets = np.eye(3)[np.arange(60) % 3]
  fitted = calibration.fit(logits, targets, "sigmoid", multi_label=True)
  assert len(fitted.thresholds) == 3
