"""How well scores tell classes apart, with intervals, for finished predictions.

Every metric is a function of scores [N, C], targets [N, C] (1 where the clip
is of the class) and weights [N], how often each clip counts. A bootstrap
resample is a draw of weights, so clips are sorted once, not once a resample.

A class without a clip, or with nothing but its clips, has no ranking to speak
of: it is left out of a mean, never NaN in it, and `absent_classes` counts it.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Weights = Float[np.ndarray, " N"]


class Ranking:
  """The clips of one class, from the highest score to the lowest."""

  def __init__(self, scores: np.ndarray, targets: np.ndarray):
    self.order = np.argsort(-scores, kind="stable")
    ranked = scores[self.order]
    # Equal scores share a threshold: the curve has a point where they end.
    self.ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    self.positive = targets[self.order] > 0.5

  def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (true, false) positives at every threshold, highest first."""
    ranked = weights[self.order]
    true = np.cumsum(np.where(self.positive, ranked, 0.0))[self.ends]
    false = np.cumsum(np.where(self.positive, 0.0, ranked))[self.ends]
    return true, false


def average_precision(ranking: Ranking, weights: Weights) -> float:
  """Sum over thresholds of the gain in recall times the precision.

  Returns:
    A number from 0 to 1, NaN for a class without a positive clip.

  Reference: equal to scikit-learn's average_precision_score.
  """
  true, false = ranking.counts(weights)
  if not true[-1]:
    return math.nan
  seen = true + false
  precision = np.divide(true, seen, out=np.zeros_like(true), where=seen > 0)
  return float(np.sum(np.diff(true, prepend=0.0) * precision) / true[-1])


def roc_auc(ranking: Ranking, weights: Weights) -> float:
  """The chance that a positive scores above a negative, ties counting half.

  Returns:
    A number from 0 to 1, NaN for a class of positives or negatives only.

  Reference: equal to scikit-learn's roc_auc_score.
  """
  true, false = ranking.counts(weights)
  if not true[-1] or not false[-1]:
    return math.nan
  steps = np.diff(false, prepend=0.0)
  heights = true - np.diff(true, prepend=0.0) / 2
  return float(np.sum(steps * heights) / (true[-1] * false[-1]))


def equal_error_rate(ranking: Ranking, weights: Weights) -> float:
  """The false positive rate where it is nearest the false negative rate.

  Points of the ROC curve that lie on a line between others are left out and
  nothing is interpolated, as in the published evaluation.

  Returns:
    A number from 0 to 1, NaN for a class of positives or negatives only.

  Reference: the EER of the published code, equal in five cases.
  """
  true, false = ranking.counts(weights)
  if not true[-1] or not false[-1]:
    return math.nan
  true, false = (np.concatenate([[0.0], x]) for x in (true, false))
  corner = np.ones(len(true), bool)
  corner[1:-1] = (np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)
  rate = false[corner] / false[-1]
  gap = np.abs(1 - true[corner] / true[-1] - rate)
  return float(rate[np.argmin(gap)])


def d_prime(auc: float) -> float:
  """The distance of two unit normals with this area under the curve.

    d' = sqrt(2) Phi^-1(auc)

  Returns:
    A real number, infinite for a perfect ranking, NaN for none.
  """
  if math.isnan(auc):
    return auc
  if not 0 < auc < 1:
    return math.copysign(math.inf, auc - 0.5)
  return math.sqrt(2) * statistics.NormalDist().inv_cdf(auc)


class Evaluation:
  """Scores and targets of one split, ready to be measured many times."""

  def __init__(
    self,
    scores: Float[np.ndarray, "..."],
    targets: Float[np.ndarray, "..."],
  ):
    """Checks what is to be measured.

    Args:
      scores: [N, C], any increasing function of the logits per class.
      targets: [N, C], 1 where the clip is of the class, else 0.

    Raises:
      ValueError: other shapes, no clip, or scores that are not finite.
    """
    if scores.shape != targets.shape or not len(scores):
      raise ValueError(
        f"scores {scores.shape} and targets {targets.shape} should be [N, C] "
        "of at least one clip"
      )
    if not np.isfinite(scores).all():
      raise ValueError(
        f"{int((~np.isfinite(scores)).any(1).sum())} of {len(scores)} clips "
        "have scores that are not finite"
      )
    self.scores = np.asarray(scores, np.float64)
    self.targets = np.asarray(targets, np.float64)
    self.labels = self.targets.argmax(1)
    self.hits = self.targets[np.arange(len(scores)), self.scores.argmax(1)] > 0
    self._rankings: list[Ranking] | None = None

  @property
  def rankings(self) -> list[Ranking]:
    if self._rankings is None:
      self._rankings = [
        Ranking(score, target)
        for score, target in zip(self.scores.T, self.targets.T, strict=True)
      ]
    return self._rankings

  def absent_classes(self) -> int:
    """Returns how many classes have no clip."""
    return int(np.sum(~(self.targets > 0.5).any(0)))

  def per_class(self, metric: Callable, weights: Weights) -> np.ndarray:
    """Returns [C] values of a metric of rankings, NaN where undefined."""
    return np.array([metric(r, weights) for r in self.rankings])


def _mean(values: np.ndarray) -> float:
  """Returns the mean over the classes that have a value."""
  known = values[~np.isnan(values)]
  return float(known.mean()) if len(known) else math.nan


def _accuracy(evaluation: Evaluation, weights: Weights) -> float:
  return float(np.average(evaluation.hits, weights=weights))


def _balanced_accuracy(evaluation: Evaluation, weights: Weights) -> float:
  count = evaluation.targets.shape[1]
  labels, hits = evaluation.labels, evaluation.hits
  sizes = np.bincount(labels, weights, minlength=count)
  recalled = np.bincount(labels, weights * hits, minlength=count)
  return float(np.mean(recalled[sizes > 0] / sizes[sizes > 0]))


def _mean_average_precision(evaluation: Evaluation, weights: Weights) -> float:
  return _mean(evaluation.per_class(average_precision, weights))


def _mean_auc(evaluation: Evaluation, weights: Weights) -> float:
  return _mean(evaluation.per_class(roc_auc, weights))


def _d_prime(evaluation: Evaluation, weights: Weights) -> float:
  return d_prime(_mean_auc(evaluation, weights))


def _eer(evaluation: Evaluation, weights: Weights) -> float:
  # Of two classes, the second is what is to be detected. By the difference of
  # the logits, which orders clips as its softmax does but never saturates.
  scores = evaluation.scores
  check_classes(("eer",), scores.shape[1])
  ranking = Ranking(scores[:, 1] - scores[:, 0], evaluation.targets[:, 1])
  return equal_error_rate(ranking, weights)


def measure(
  evaluation: Evaluation,
  names: Sequence[str],
  *,
  num_resamples: int,
  confidence: float,
  seed: int,
  groups: Sequence[str] | None,
) -> dict[str, dict[str, float]]:
  """Returns each metric and its bootstrap percentile interval.

  Clips are drawn with replacement, whole groups at a time where groups are
  known: two cuts of one recording are not two observations.

  Args:
    evaluation: scores and targets.
    names: of METRICS.
    num_resamples: draws; 0 gives no intervals.
    confidence: share of the draws inside the interval, 0.95.
    seed: of the draws, the same for every metric.
    groups: [N] group of each clip, or None.

  Returns:
    name -> {"value", and with draws "low", "high"}.

  Raises:
    ValueError: an unknown metric.
  """
  for name in names:
    if name not in METRICS:
      raise ValueError(f"metric {name!r} is unknown; use one of {[*METRICS]}")
  count = len(evaluation.labels)
  once = np.ones(count)
  result = {n: {"value": METRICS[n](evaluation, once)} for n in names}
  if not num_resamples:
    return result
  _, member = np.unique(
    np.arange(count) if groups is None else np.asarray(groups),
    return_inverse=True,
  )
  rng = np.random.default_rng(seed)
  num_groups = int(member.max()) + 1
  even = np.full(num_groups, 1 / num_groups)
  draws = {name: np.empty(num_resamples) for name in names}
  for i in range(num_resamples):
    weights = rng.multinomial(num_groups, even)[member].astype(np.float64)
    for name in names:
      draws[name][i] = METRICS[name](evaluation, weights)
  tail = 50 * (1 - confidence)
  for name, values in draws.items():
    # A draw without one of the classes has no EER; it says nothing.
    known = values[~np.isnan(values)]
    if len(known):
      low, high = np.percentile(known, [tail, 100 - tail])
      result[name] |= {"low": float(low), "high": float(high)}
  return result


METRICS: dict[str, Callable[[Evaluation, Weights], float]] = {
  "accuracy": _accuracy,
  "balanced_accuracy": _balanced_accuracy,
  "map": _mean_average_precision,
  "mauc": _mean_auc,
  "d_prime": _d_prime,
  "eer": _eer,
}
LOWER_IS_BETTER = ("eer",)


def check_classes(metrics: Sequence[str], num_classes: int) -> None:
  """Raises ValueError for a metric that is not of so many classes."""
  if "eer" in metrics and num_classes != 2:
    raise ValueError(
      f"metric 'eer' needs 2 classes, got {num_classes}; take it out of "
      "evaluation.metrics"
    )
