"""Which clip comes next in training: rare classes as often as common ones.

A clip's weight is a sum over its classes, so the draws are balanced over
classes as far as clips with several of them allow. Draws are functions of
the seed and the position in the stream alone.
"""

import csv
import dataclasses
import os
import sys
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Float

from audiomosaic_jax.data import tables

# The published code's: keeps weights of AudioSet's classes near 1 and a class
# without a clip from dividing by zero.
SCALE, EPSILON = 1000.0, 0.01


def clip_weights(
  label_sets: Sequence[Sequence[int]], num_classes: int
) -> Float[np.ndarray, " n"]:
  """Weighs every clip by how rare its classes are.

    w_i = sum over the classes c of clip i of 1000 / (n_c + 0.01)

  where n_c counts the clips of class c. A clip without a class weighs 0.

  Args:
    label_sets: classes of each clip, as `Source.label_sets` gives them.
    num_classes: number of classes.

  Returns:
    One weight per clip, not normalised.

  Reference: AST's gen_weight_file.py, which made the weight_full.csv that the
    published AudioSet-2M recipe names; the file itself is not published.
    Other copies of AudioSet need their own weights, because n_c counts the
    clips that are there.
  """
  counts = np.zeros(num_classes)
  for labels in label_sets:
    counts[list(labels)] += 1
  of_class = SCALE / (counts + EPSILON)
  return np.array([of_class[list(labels)].sum() for labels in label_sets])


@dataclasses.dataclass(frozen=True, eq=False)
class WithoutReplacement:
  """Weights whose every `draws` successive draws are different clips.

  What the published AudioSet-2M recipe does, with 200,000 draws of two
  million clips. Drawing with replacement is something else: a clip whose class
  has n clips would come about 200,000 / (527 n) times, so four times if n is
  100, instead of once at most.

  Attributes:
    weights: [n] as for drawing with replacement.
    draws: how many draws are one epoch.

  Reference: WeightedRandomSampler(replacement=False) in main_finetune.py.
  """

  weights: Float[np.ndarray, " n"]
  draws: int


class WeightedDraws(grain.MapDataset):
  """An endless stream of the clips of a parent, drawn by weight.

  Position k of the stream is the same clip whichever process or thread asks,
  so the stream is random access as the other stages of the pipeline are.
  """

  def __init__(
    self,
    parent: grain.MapDataset,
    weights: Float[np.ndarray, " n"] | WithoutReplacement,
    *,
    seed: int,
  ):
    """Checks the weights.

    Args:
      parent: clips.
      weights: one per clip; 0 is never drawn.
      seed: of the draws.

    Raises:
      ValueError: not one usable weight per clip, or more distinct draws than
        clips to draw.
    """
    super().__init__(parent)
    self._clips = parent
    self._seed = seed
    self._draws = None
    if isinstance(weights, WithoutReplacement):
      weights, self._draws = weights.weights, weights.draws
    self._weights = check_weights(weights, len(parent))
    self._ends = np.cumsum(self._weights)
    self._last = int(np.flatnonzero(self._weights)[-1])
    self._orders = {}
    drawable = int(np.count_nonzero(self._weights))
    if self._draws is not None and not 1 <= self._draws <= drawable:
      raise ValueError(
        f"{self._draws} draws without replacement from {drawable} clips of "
        f"positive weight; use 1 to {drawable}"
      )

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int | slice):
    if isinstance(index, slice):
      return self.slice(index)
    return self._clips[self.clip(index)]

  def clip(self, position: int) -> int:
    """Returns the index of the clip at a position of the stream."""
    if self._draws is None:
      uniform = np.random.default_rng((self._seed, position)).random()
      place = np.searchsorted(
        self._ends, uniform * self._ends[-1], side="right"
      )
      return min(int(place), self._last)  # Rounding may reach the very end.
    epoch, place = divmod(position, self._draws)
    order = self._orders.get(epoch)
    if order is None:
      order = self._order(epoch)
      # Batches read ahead may span two epochs, so two orders are kept. If two
      # threads compute one, they compute the same.
      orders = {**self._orders, epoch: order}
      near = sorted(orders, key=lambda other: abs(other - epoch))[:2]
      self._orders = {other: orders[other] for other in near}
    return int(order[place])

  def _order(self, epoch: int) -> np.ndarray:
    """Draws one by one without replacement, all at once.

    The clips with the smallest E_i / w_i, E_i exponentially distributed, in
    that order: Efraimidis and Spirakis, Information Processing Letters 2006.
    """
    rng = np.random.default_rng((self._seed, epoch))
    with np.errstate(divide="ignore"):
      arrival = rng.exponential(size=len(self._weights)) / self._weights
    first = np.argpartition(arrival, self._draws - 1)[: self._draws]
    return first[np.argsort(arrival[first], kind="stable")]


def check_weights(
  weights: np.ndarray | Sequence[float], num_clips: int
) -> Float[np.ndarray, " n"]:
  """Returns weights as float64.

  Raises:
    ValueError: not one finite, non-negative weight per clip, or all zero.
  """
  weights = np.asarray(weights, np.float64)
  if weights.shape != (num_clips,):
    raise ValueError(
      f"weights of shape {weights.shape} do not fit {num_clips} clips; "
      "compute them for this copy of the data set"
    )
  wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
  if wrong.size:
    raise ValueError(
      f"weight {wrong[0]} is {weights[wrong[0]]}; weights are finite and not "
      "negative"
    )
  if not weights.any():
    raise ValueError("all weights are 0; no clip can be drawn")
  return weights


def write_weights(
  path: str | os.PathLike,
  ids: Sequence[str],
  weights: np.ndarray | Sequence[float],
) -> None:
  """Writes a CSV file of id and weight, which `read_weights` reads."""
  with open(
    path, "w", newline="", encoding="utf-8", errors="surrogateescape"
  ) as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "weight"])
    for name, weight in zip(ids, weights, strict=True):
      writer.writerow([name, repr(float(weight))])


def read_weights(
  path: str | os.PathLike, ids: Sequence[str]
) -> Float[np.ndarray, " n"]:
  """Reads the weights of the clips `ids`, in their order, from a CSV file.

  By name and not by position: weights of another list of clips, used by
  mistake, cost several points of mAP without any error.

  Args:
    path: columns id and weight, as the audit writes them.
    ids: clips, as `Source.ids`.

  Raises:
    ValueError: a clip has no weight, or a weight is not a number.
  """
  found = {}
  for line, row in tables.read_csv(path, ["id", "weight"]):
    try:
      found[row["id"]] = float(row["weight"])
    except ValueError:
      raise ValueError(
        f"{path}, line {line}: weight {row['weight']!r} is not a number"
      ) from None
  lost = [name for name in ids if name not in found]
  if lost:
    raise ValueError(
      f"{path} has no weight for {len(lost)} of {len(ids)} clips, the first "
      f"is {lost[0]!r}; audit this copy of the data set again"
    )
  return np.array([found[name] for name in ids])
