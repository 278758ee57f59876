"""Pictures of classifiers: confusion, scores of classes and layers, trust."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audiomosaic_jax import calibration
from audiomosaic_jax.report import BLUE, GREY, INK, VERMILION

MAX_CLASSES = 60


def plot_confusion(
  labels: Int[np.ndarray, " N"],
  predictions: Int[np.ndarray, " N"],
  class_names: Sequence[str],
) -> Figure:
  """Shows which classes are taken for which, as shares of the true class.

  Args:
    labels: class of each clip.
    predictions: what it was taken for.
    class_names: name of each class; the first MAX_CLASSES are drawn.
  """
  count = len(class_names)
  matrix = np.zeros((count, count))
  np.add.at(matrix, (labels, predictions), 1)
  matrix /= np.maximum(matrix.sum(1, keepdims=True), 1)
  shown = min(count, MAX_CLASSES)
  side = 2.5 + 0.22 * shown
  figure = Figure(figsize=(side, side), layout="constrained")
  ax = figure.subplots()
  ax.imshow(matrix[:shown, :shown], cmap="Blues", vmin=0, vmax=1)
  if shown <= 12:
    for i, j in np.ndindex(shown, shown):
      if matrix[i, j] >= 0.005:
        color = "white" if matrix[i, j] > 0.5 else INK
        text = f"{100 * matrix[i, j]:.0f}"
        ax.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
  ax.set_xticks(range(shown), class_names[:shown], rotation=90, fontsize=8)
  ax.set_yticks(range(shown), class_names[:shown], fontsize=8)
  ax.set(xlabel="predicted", ylabel="true class; rows sum to 100 %")
  return figure


def plot_per_class(
  values: Float[np.ndarray, " C"], class_names: Sequence[str], xlabel: str
) -> Figure:
  """Shows a score of each class, best first; undefined ones are left out.

  Args:
    values: one per class, NaN where it is undefined.
    class_names: name of each class.
    xlabel: what the score is. Of many classes the best and worst are drawn.
  """
  known = np.flatnonzero(~np.isnan(values))
  order = known[np.argsort(-values[known], kind="stable")]
  if len(order) > MAX_CLASSES:
    half = MAX_CLASSES // 2
    order = np.concatenate([order[:half], order[-half:]])
  size = (7.0, 1.2 + 0.19 * len(order))
  figure = Figure(figsize=size, layout="constrained")
  ax = figure.subplots()
  place = np.arange(len(order))
  ax.barh(place, values[order], color=BLUE, height=0.7)
  ax.set_yticks(place, [class_names[i] for i in order], fontsize=8)
  ax.invert_yaxis()
  ax.set_xlabel(xlabel, color=INK)
  ax.spines[["top", "right"]].set_visible(False)
  return figure


def plot_layers(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
  """Shows a score of the probe of every layer, with its interval.

  Args:
    rows: of `comparison.write_summary`, one per layer and split.
    metric: which of their metrics.
  """
  figure = Figure(figsize=(7.2, 4.0), layout="constrained")
  ax = figure.subplots()
  for split in dict.fromkeys(row["split"] for row in rows):
    chosen = [row for row in rows if row["split"] == split]
    layer = [row["layer"] for row in chosen]
    values = [row["metrics"][metric] for row in chosen]
    ax.plot(layer, [v["mean"] for v in values], marker="o", label=split)
    if all("low" in v for v in values):
      low, high = ([v[end] for v in values] for end in ("low", "high"))
      ax.fill_between(layer, low, high, alpha=0.15, linewidth=0)
  ax.set_xlabel("layer", color=INK)
  ax.set_ylabel(metric, color=INK)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(GREY)
  ax.legend(frameon=False)
  return figure


def plot_reliability(
  confidence: Float[np.ndarray, " N"],
  correct: Float[np.ndarray, " N"],
  calibrated: Float[np.ndarray, " N"] | None = None,
) -> Figure:
  """Shows how often a guess is right against how sure it is.

  Args:
    confidence: probability of each guess.
    correct: 1 where the guess is right, else 0.
    calibrated: the probabilities after calibration; None draws none.
  """
  figure = Figure(figsize=(4.6, 4.4), layout="constrained")
  ax = figure.subplots()
  ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
  series = {"as trained": (confidence, VERMILION, "o")}
  if calibrated is None:
    series = {"": (confidence, BLUE, "o")}
  else:
    series["calibrated"] = (calibrated, BLUE, "s")
  for name, (values, color, marker) in series.items():
    curve = calibration.reliability(values, correct)
    ax.plot(
      curve.confidence,
      curve.right,
      color=color,
      marker=marker,
      clip_on=False,
      label=f"{name}: off by {100 * curve.error:.1f} points",
    )
  ax.set(xlim=(0, 1), ylim=(0, 1))
  ax.set_xlabel("probability of the guess", color=INK)
  ax.set_ylabel("share of right guesses", color=INK)
  gap = confidence.mean() - correct.mean()
  words = "too sure" if gap > 0 else "not sure enough"
  title = f"on average {100 * abs(gap):.1f} points {words}"
  if calibrated is not None:
    title += " as trained"
    ax.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=INK)
  ax.set_title(title, fontsize=10)
  ax.spines[["top", "right"]].set_visible(False)
  return figure


def plot_degradations(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
  """Shows a score of degraded clips, one series of points per classifier.

  Args:
    rows: of `robustness.write`, of one split.
    metric: which of their metrics.
  """
  names = list(dict.fromkeys(row["degradation"] for row in rows))
  methods = list(dict.fromkeys(row["method"] for row in rows))
  height = 1.4 + (0.22 + 0.1 * len(methods)) * len(names)
  figure = Figure(figsize=(7.2, height), layout="constrained")
  ax = figure.subplots()
  for index, method in enumerate(methods):
    values = {
      r["degradation"]: r["metrics"][metric]
      for r in rows
      if r["method"] == method
    }
    place = np.arange(len(names)) + 0.14 * (index - (len(methods) - 1) / 2)
    means = [values[name]["mean"] for name in names]
    ax.plot(means, place, "o", markersize=5, label=method)
    if all("low" in value for value in values.values()):
      ends = [[values[name][end] for name in names] for end in ("low", "high")]
      ax.hlines(place, *ends, color=ax.lines[-1].get_color(), linewidth=1.2)
  ax.set_yticks(range(len(names)), names, fontsize=9)
  ax.invert_yaxis()
  ax.set_xlabel(metric, color=INK)
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))
  return figure
