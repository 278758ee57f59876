"""Weights of classes: those of scikit-learn, and what excludes them."""

import ml_collections
import numpy as np
import pytest
from sklearn.utils import class_weight

from audiomosaic_jax import class_weights


def loss(**changes):
  settings = {"name": "softmax", "class_weights": (), "balance": "inverse"}
  return ml_collections.ConfigDict(settings | changes)


def test_the_weights_are_those_of_scikit_learn():
  labels = np.repeat([0, 1, 3], [30, 5, 1])
  weights = class_weights.inverse_frequency([(y,) for y in labels.tolist()], 4)
  expected = class_weight.compute_class_weight(
    "balanced", classes=np.array([0, 1, 3]), y=labels
  )
  assert [weights[i] for i in (0, 1, 3)] == pytest.approx(expected)
  assert weights[2] == 0
  # All clips of a class weigh as much as all of another.
  assert weights[0] * 30 == pytest.approx(weights[3] * 1)


def test_without_balance_the_given_weights_are_used():
  given = loss(balance="none", class_weights=(0.1, 0.9))
  assert class_weights.resolve(given, [(0,)] * 3 + [(1,)], 2) == (0.1, 0.9)
  balanced = class_weights.resolve(loss(), [(0,)] * 3 + [(1,)], 2)
  assert balanced == pytest.approx((4 / 6, 2.0))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"balance": "square"}, r"loss\.balance is 'square'.*inverse"),
    ({"class_weights": (1.0, 2.0)}, "set one of them"),
    ({"name": "sigmoid"}, "averages over the classes already"),
  ],
)
def test_settings_that_exclude_each_other_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    class_weights.check(loss(**changes))
  class_weights.check(loss())
