"""Metrics of finished predictions against the reference and scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics

from audiomosaic_jax import scores

OPTIONS = {"num_resamples": 0, "confidence": 0.95, "seed": 0, "groups": None}


def value(evaluation, name, **options):
  return scores.measure(evaluation, [name], **OPTIONS | options)[name]


def one_hot(labels, num_classes):
  return np.eye(num_classes)[labels]


def test_ranking_metrics_equal_the_reference_class_by_class(golden):
  z = golden("metrics.npz")
  # The reference ranks float32 sigmoids, in which some logits are tied.
  logits = z["multilabel/logits"].astype(np.float32)
  evaluation = scores.Evaluation(
    1 / (1 + np.exp(-logits)), z["multilabel/targets"]
  )
  once = np.ones(len(logits))
  ap = evaluation.per_class(scores.average_precision, once)
  auc = evaluation.per_class(scores.roc_auc, once)
  np.testing.assert_allclose(ap, z["multilabel/AP"], atol=2e-6)
  np.testing.assert_allclose(auc, z["multilabel/AUC"], atol=2e-6)
  d = [scores.d_prime(x) for x in auc]
  np.testing.assert_allclose(d, z["multilabel/d_prime_per_class"], atol=1e-5)
  for name, key in (
    ("map", "mAP"),
    ("mauc", "mAUC"),
    ("d_prime", "d_prime_of_mAUC"),
  ):
    expected = z[f"multilabel/{key}"]
    np.testing.assert_allclose(
      value(evaluation, name)["value"], expected, atol=1e-5
    )


def test_a_class_without_positives_is_counted_and_not_averaged(golden):
  z = golden("metrics.npz")
  targets = z["degenerate/targets"]
  evaluation = scores.Evaluation(z["degenerate/logits"], targets)
  assert evaluation.absent_classes() == 1
  ap = evaluation.per_class(scores.average_precision, np.ones(len(targets)))
  expected = z["degenerate/AP_AUC"]
  assert math.isnan(ap[0])  # The reference says 0, which pulls a mean down.
  np.testing.assert_allclose(ap[1:], expected[1:, 0], atol=1e-6)
  assert value(evaluation, "map")["value"] == pytest.approx(ap[1:].mean())
  assert value(evaluation, "mauc")["value"] == pytest.approx(expected[2, 1])


@pytest.mark.parametrize(
  "case", ["easy", "hard", "ties", "perfect", "imbalanced"]
)
def test_the_equal_error_rate_is_that_of_the_reference(golden, case):
  z = golden("metrics.npz")
  evaluation = scores.Evaluation(
    z[f"binary_{case}/logits"], one_hot(z[f"binary_{case}/targets"], 2)
  )
  np.testing.assert_allclose(
    value(evaluation, "eer")["value"], z[f"binary_{case}/EER"], atol=1e-9
  )


def test_accuracies_equal_the_reference_and_scikit_learn(golden):
  z = golden("metrics.npz")
  logits, labels = z["single_label/logits"], z["single_label/targets"]
  evaluation = scores.Evaluation(logits, one_hot(labels, logits.shape[1]))
  np.testing.assert_allclose(
    value(evaluation, "accuracy")["value"], z["single_label/acc"], rtol=1e-6
  )
  assert value(evaluation, "balanced_accuracy")["value"] == pytest.approx(
    sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1))
  )


@pytest.mark.parametrize("metric", ["average_precision", "roc_auc"])
def test_weights_count_clips_as_copies_of_them_would(metric):
  rng = np.random.default_rng(0)
  score = rng.normal(size=60).round(1)
  target = (rng.random(60) < 0.4).astype(float)
  weights = rng.multinomial(60, np.full(60, 1 / 60)).astype(float)
  expected = getattr(sklearn.metrics, f"{metric}_score")(
    target, score, sample_weight=weights
  )
  ranking = scores.Ranking(score, target)
  result = getattr(scores, metric)(ranking, weights)
  assert result == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_an_accuracy_is_that_of_a_binomial():
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 2, 400)
  right = rng.random(400) < 0.8
  logits = one_hot(np.where(right, labels, 1 - labels), 2)
  evaluation = scores.Evaluation(logits, one_hot(labels, 2))
  result = value(evaluation, "accuracy", num_resamples=2000)
  half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 400)
  assert result["low"] == pytest.approx(right.mean() - half, abs=0.008)
  assert result["high"] == pytest.approx(right.mean() + half, abs=0.008)


def test_groups_widen_the_interval():
  # Ten copies of each clip are not ten clips.
  rng = np.random.default_rng(2)
  right = np.repeat(rng.random(40) < 0.7, 10)
  logits = one_hot(np.where(right, 0, 1), 2)
  evaluation = scores.Evaluation(logits, one_hot(np.zeros(400, int), 2))
  apart = value(evaluation, "accuracy", num_resamples=500)
  groups = [str(i // 10) for i in range(400)]
  together = value(evaluation, "accuracy", num_resamples=500, groups=groups)
  width = [r["high"] - r["low"] for r in (apart, together)]
  assert width[1] > 2 * width[0]


@pytest.mark.parametrize("name", scores.METRICS)
def test_every_metric_has_its_value_inside_a_deterministic_interval(name):
  rng = np.random.default_rng(3)
  labels = rng.integers(0, 2, 100)
  logits = one_hot(labels, 2) + rng.normal(size=(100, 2))
  evaluation = scores.Evaluation(logits, one_hot(labels, 2))
  result = value(evaluation, name, num_resamples=200)
  assert result["low"] <= result["value"] <= result["high"]
  assert result == value(evaluation, name, num_resamples=200)


def test_errors_name_what_is_wrong():
  evaluation = scores.Evaluation(np.zeros((4, 3)), one_hot([0, 1, 2, 0], 3))
  with pytest.raises(ValueError, match=r"'f1' is unknown.*accuracy"):
    scores.measure(evaluation, ["f1"], **OPTIONS)
  with pytest.raises(ValueError, match="'eer' needs 2 classes, got 3"):
    scores.measure(evaluation, ["eer"], **OPTIONS)
  with pytest.raises(ValueError, match=r"1 of 2 clips .* not finite"):
    scores.Evaluation(np.array([[0.0, np.nan], [0, 0]]), np.eye(2))
  with pytest.raises(ValueError, match=r"scores \(2, 2\) and targets \(3, 2\)"):
    scores.Evaluation(np.zeros((2, 2)), np.zeros((3, 2)))


def test_the_distance_of_an_unknown_area_is_unknown():
  assert np.isnan(scores.d_prime(np.nan))
  assert scores.d_prime(1.0) == np.inf and scores.d_prime(0.5) == 0.0
