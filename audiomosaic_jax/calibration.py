"""How far the probabilities of a classifier can be trusted, and made so.

A temperature that fits the validation clips divides the logits; of clips with
several labels, each class has the threshold that finds it best there. Both are
in `calibration.json` of a run.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy import optimize, special
from sklearn import metrics

from audiomosaic_jax import files

FILE = "calibration.json"
# Functions from logits to probabilities, by the loss that trained them.
SOFTMAX, SIGMOID = "softmax", "sigmoid"
# Of a temperature; beyond them logits say nothing, or all is certain.
LIMITS = (0.05, 20.0)
# Guesses in each bin of a reliability curve, at least, and bins at most.
MIN_PER_BIN, MAX_BINS = 20, 10

Logits = Float[np.ndarray, "N C"]
Targets = Num[np.ndarray, "N C"]


class Calibration(NamedTuple):
  """From logits to probabilities and decisions.

  Attributes:
    link: SOFTMAX or SIGMOID.
    temperature: divides the logits; 1 leaves them.
    thresholds: one per class, of clips with several labels; None decides for
      the most likely class.
  """

  link: str
  temperature: float
  thresholds: tuple[float, ...] | None

  def probabilities(self, logits: Logits) -> Logits:
    """Returns the probability of each class."""
    scaled = np.asarray(logits, np.float64) / self.temperature
    if self.link == SIGMOID:
      return special.expit(scaled)
    return special.softmax(scaled, axis=1)

  def decisions(self, logits: Logits) -> Bool[np.ndarray, "N C"]:
    """Returns which classes each clip is said to have."""
    if self.thresholds is None:
      guess = np.argmax(logits, axis=1)
      return guess[:, None] == np.arange(logits.shape[1])
    return self.probabilities(logits) >= np.array(self.thresholds)

  def negative_log_likelihood(self, logits: Logits, targets: Targets) -> float:
    """Returns the mean over clips, and over the classes of a sigmoid."""
    scaled = np.asarray(logits, np.float64) / self.temperature
    if self.link == SIGMOID:
      return float(np.mean(np.logaddexp(0, scaled) - targets * scaled))
    log_p = special.log_softmax(scaled, axis=1)
    return float(-np.mean(np.sum(targets * log_p, axis=1)))


def guesses(
  probabilities: Logits, targets: Targets, link: str
) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
  """Returns the probability of each guess, and 1 where it is right.

  A softmax guesses one class per clip, a sigmoid answers for every class.
  """
  if link == SIGMOID:
    right = (probabilities > 0.5) == (targets > 0.5)
    sure = np.maximum(probabilities, 1 - probabilities)
    return sure.ravel(), right.ravel().astype(float)
  guess = probabilities.argmax(1)[:, None]
  return tuple(
    np.take_along_axis(values, guess, 1)[:, 0].astype(float)
    for values in (probabilities, targets)
  )


def untouched(link: str, num_classes: int, multi_label: bool) -> Calibration:
  """Returns what is known without validation clips.

  Args:
    link: SOFTMAX or SIGMOID.
    num_classes: number of classes.
    multi_label: a clip may have several classes, or none.
  """
  several = multi_label and link == SIGMOID
  return Calibration(link, 1.0, (0.5,) * num_classes if several else None)


def fit(
  logits: Logits, targets: Targets, link: str, *, multi_label: bool
) -> Calibration:
  """Returns the calibration that fits validation clips.

  Args:
    logits: of the clips.
    targets: 1 where the clip is of the class, else 0.
    link: SOFTMAX or SIGMOID.
    multi_label: a clip may have several classes, or none.
  """
  found = untouched(link, targets.shape[1], multi_label)._replace(
    temperature=fit_temperature(logits, targets, link)
  )
  if found.thresholds is not None:
    best = best_thresholds(found.probabilities(logits), targets)
    found = found._replace(thresholds=tuple(best.tolist()))
  return found


def fit_temperature(logits: Logits, targets: Targets, link: str) -> float:
  """Returns the temperature of the lowest negative log-likelihood.

  Clips that are all classified right would be likeliest at temperature 0, and
  say nothing of how often a guess is wrong; the temperature is then 1.

  Reference: Guo et al. 2017, On Calibration of Modern Neural Networks, 4.2.
    The inverse temperature at which the derivative is zero, found by bisection,
    is the same within 1e-3.
  """
  if link == SIGMOID:
    margins = np.where(targets > 0.5, logits, -logits)
  else:
    margins = np.min(
      np.max(np.where(targets > 0.5, logits, -np.inf), axis=1, keepdims=True)
      - logits,
      axis=1,
    )
  if (margins >= 0).all():
    return 1.0

  def loss(log_temperature):
    calibration = Calibration(link, float(np.exp(log_temperature)), None)
    return calibration.negative_log_likelihood(logits, targets)

  # Convex in the inverse of the temperature, so there is one minimum.
  found = optimize.minimize_scalar(
    loss, bounds=np.log(LIMITS), method="bounded", options={"xatol": 1e-5}
  )
  return float(np.exp(found.x))


def best_thresholds(
  probabilities: Logits, targets: Targets
) -> Float[np.ndarray, " C"]:
  """Returns the threshold of each class with the highest F1.

    F1 = 2 TP / (2 TP + FP + FN)

  It lies half-way between the last probability that counts as a yes and the
  next lower one. A class without a clip has 0.5.
  """
  thresholds = np.full(targets.shape[1], 0.5)
  for label, (p, target) in enumerate(
    zip(probabilities.T, targets.T, strict=True)
  ):
    if not (target > 0.5).any():
      continue
    precision, recall, ends = metrics.precision_recall_curve(target > 0.5, p)
    total = precision[:-1] + recall[:-1]
    f1 = 2 * precision[:-1] * recall[:-1] / np.where(total > 0, total, 1.0)
    last = ends[int(np.argmax(f1))]
    lower = p[p < last].max(initial=0.0)
    thresholds[label] = (last + lower) / 2
  return thresholds


class Reliability(NamedTuple):
  """Guesses in bins of equally many.

  Attributes:
    confidence: mean probability of the guesses of each bin.
    right: share of them that is right.
    counts: how many they are.
  """

  confidence: Float[np.ndarray, " B"]
  right: Float[np.ndarray, " B"]
  counts: Int[np.ndarray, " B"]

  @property
  def error(self) -> float:
    """The expected calibration error, from 0 to 1.

    sum over bins of count / total * |confidence - right|
    """
    gaps = np.abs(self.confidence - self.right)
    return float(np.average(gaps, weights=self.counts))


def reliability(
  confidence: Float[np.ndarray, " G"], correct: Float[np.ndarray, " G"]
) -> Reliability:
  """Compares how sure guesses are with how often they are right.

  Args:
    confidence: probability of each guess.
    correct: 1 where the guess is right, else 0.

  Reference: the bins of scikit-learn's calibration_curve with the strategy
    "quantile".
  """
  num_bins = int(np.clip(len(confidence) // MIN_PER_BIN, 1, MAX_BINS))
  edges = np.quantile(confidence, np.linspace(0, 1, num_bins + 1))
  member = np.searchsorted(edges[1:-1], confidence)
  counts = np.bincount(member, minlength=num_bins)
  sums = [
    np.bincount(member, weights=values, minlength=num_bins)
    for values in (confidence, correct)
  ]
  used = counts > 0
  means = [values[used] / counts[used] for values in sums]
  return Reliability(*means, counts[used])


def quality(
  calibration: Calibration, logits: Logits, targets: Targets
) -> dict[str, dict[str, float]]:
  """Returns {"before", "after"} of what is measured of probabilities."""
  plain = calibration._replace(temperature=1.0)
  return {
    name: {
      "expected_calibration_error": reliability(
        *guesses(state.probabilities(logits), targets, state.link)
      ).error,
      "negative_log_likelihood": state.negative_log_likelihood(logits, targets),
    }
    for name, state in (("before", plain), ("after", calibration))
  }


def write(
  folder: pathlib.Path,
  calibration: Calibration,
  class_names: Sequence[str],
  splits: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
  """Writes `calibration.json`.

  Args:
    folder: of the run.
    calibration: of its classifier.
    class_names: in the order of the logits.
    splits: name -> "logits" and "targets", "valid" among them.
  """
  thresholds = calibration.thresholds
  if thresholds is not None:
    thresholds = [
      {"class": name, "threshold": value}
      for name, value in zip(class_names, thresholds, strict=True)
    ]
  content = {
    "link": calibration.link,
    "temperature": calibration.temperature,
    "thresholds": thresholds,
    "fitted_on_clips": len(splits["valid"]["logits"]),
    "splits": {
      name: quality(calibration, arrays["logits"], arrays["targets"])
      for name, arrays in splits.items()
    },
  }
  files.write_text(folder / FILE, json.dumps(content, indent=2) + "\n")


def read(folder: pathlib.Path) -> Calibration | None:
  """Returns the calibration of a run; None if it has none."""
  path = folder / FILE
  if not path.exists():
    return None
  content = json.loads(path.read_text())
  thresholds = content["thresholds"]
  if thresholds is not None:
    thresholds = tuple(row["threshold"] for row in thresholds)
  return Calibration(content["link"], content["temperature"], thresholds)
