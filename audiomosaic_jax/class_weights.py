"""How much each class weighs in the loss."""

from collections.abc import Sequence

import ml_collections
import numpy as np

BALANCES = ("none", "inverse")


def inverse_frequency(
  label_sets: Sequence[Sequence[int]], num_classes: int
) -> tuple[float, ...]:
  """Weighs every class alike, however many clips it has.

    w_c = n / (k n_c)

  with n_c clips of class c, n of all, and k classes that have any. A class
  without clips weighs 0.

  Args:
    label_sets: classes of each training clip.
    num_classes: number of classes.

  Reference: scikit-learn's compute_class_weight("balanced").
  """
  counts = np.bincount(
    [label for labels in label_sets for label in labels], minlength=num_classes
  )
  used = counts > 0
  weights = np.zeros(num_classes)
  weights[used] = counts.sum() / (used.sum() * counts[used])
  return tuple(weights.tolist())


def resolve(
  loss: ml_collections.ConfigDict,
  label_sets: Sequence[Sequence[int]],
  num_classes: int,
) -> tuple[float, ...]:
  """Returns the weights that `config.loss` asks for; () is none.

  Args:
    loss: `config.loss`.
    label_sets: classes of each training clip.
    num_classes: number of classes.
  """
  if loss.balance == "none":
    return tuple(loss.class_weights)
  return inverse_frequency(label_sets, num_classes)


def check(loss: ml_collections.ConfigDict) -> None:
  """Raises ValueError for settings of `config.loss` that exclude each other."""
  if loss.balance not in BALANCES:
    raise ValueError(
      f"loss.balance is {loss.balance!r}; use one of {[*BALANCES]}"
    )
  if loss.balance == "none":
    return
  if len(loss.class_weights):
    raise ValueError(
      f"loss.balance is {loss.balance!r} and loss.class_weights is "
      f"{tuple(loss.class_weights)}; set one of them"
    )
  if loss.name != "softmax":
    raise ValueError(
      f"loss.balance is {loss.balance!r} with loss.name {loss.name!r}, which "
      "averages over the classes already; use 'none', or draw rare classes "
      "more often with data.sampling.balanced"
    )
