"""Laws of groups and of what is held out, by hand and on random data."""

import numpy as np
import pytest

from audiomosaic_jax.data import partition

NAMES = ["dog/rec1_01.wav", "dog/rec1_02.wav", "cat/rec1_3.wav", "cat/x.wav"]


def test_a_group_is_the_first_part_of_the_pattern_in_the_file_name():
  groups = partition.group_names(NAMES, None, r"(.*)_\d+")
  # A recording that was cut into clips of two classes is one group.
  assert groups == ["rec1", "rec1", "rec1", "cat/x.wav"]


def test_a_pattern_with_a_slash_fits_the_path():
  groups = partition.group_names(NAMES, None, r"([^/]+)/")
  assert groups == ["dog", "dog", "cat", "cat"]


def test_clips_that_the_pattern_does_not_fit_keep_their_group():
  groups = partition.group_names(NAMES, ["a", "a", "b", "b"], r"(.*)_0\d")
  assert groups == ["rec1", "rec1", "b", "b"]


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    (r"(.*_\d+", "not a regular expression"),
    (r".*_\d+", "no part in parentheses"),
    (r"(take)\d", r"fits none of 4 clips, the first is 'dog/rec1_01\.wav'"),
  ],
)
def test_a_wrong_pattern_is_refused(pattern, message):
  with pytest.raises(ValueError, match=message):
    partition.group_names(NAMES, None, pattern)


def random_clips(seed, num_classes, num_groups, labels_per_group):
  """Returns label sets and groups of clips; groups have 1 to 6 clips."""
  rng = np.random.default_rng(seed)
  label_sets, groups = [], []
  for group in range(num_groups):
    classes = rng.integers(num_classes, size=labels_per_group)
    for _ in range(rng.integers(1, 7)):
      label_sets.append((int(rng.choice(classes)),))
      groups.append(f"g{group}")
  return label_sets, groups


@pytest.mark.parametrize("labels_per_group", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_groups_stay_whole_and_every_class_is_on_both_sides(
  seed, labels_per_group
):
  label_sets, groups = random_clips(seed, 5, 40, labels_per_group)
  held = partition.hold_out(label_sets, groups, 0.2, seed)
  sides = [
    {g for g, h in zip(groups, held, strict=True) if h == side}
    for side in (True, False)
  ]
  assert not sides[0] & sides[1]
  labels, groups = np.array(label_sets)[:, 0], np.array(groups)
  for label in np.unique(labels):
    own = labels == label
    _, sizes = np.unique(groups[own], return_counts=True)
    share = held[own].mean()
    # Off by no more than a group.
    assert 0 < share <= 0.2 + sizes.max() / sizes.sum() < 1, label


def test_clips_without_groups_are_held_out_by_the_share():
  label_sets = [(0,)] * 50 + [(1,)] * 10 + [(2,)] * 2
  held = partition.hold_out(label_sets, None, 0.2, 0)
  assert np.bincount(np.array(label_sets)[held, 0]).tolist() == [10, 2, 1]


def test_what_is_held_out_is_a_function_of_the_seed():
  label_sets = [(i % 3,) for i in range(60)]
  one, same, other = (
    partition.hold_out(label_sets, None, 0.2, seed) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()


def test_a_class_of_one_group_is_not_held_out():
  label_sets = [(0,)] * 6 + [(1,)] * 6
  groups = ["a"] * 6 + ["b", "b", "b", "c", "d", "e"]
  held = partition.hold_out(label_sets, groups, 0.3, 0)
  assert not held[:6].any() and held[6:].any() and not held[6:].all()
  assert partition.single_groups(label_sets, groups) == {0: 0}
  # Nor is a group that has all of it among clips of other classes.
  mixed = partition.hold_out([*label_sets, (1,)], [*groups, "a"], 0.9, 0)
  assert not mixed[:6].any() and not mixed[-1]


def test_nothing_can_be_held_out_of_one_group_a_class():
  held = partition.hold_out([(0,), (0,), (1,)], ["a", "a", "b"], 0.5, 0)
  assert not held.any()


def test_of_two_unequal_groups_the_smaller_one_is_held_out():
  label_sets = [(0,)] * 10 + [(1,)] * 10
  groups = ["big"] * 9 + ["small"] + ["large"] * 9 + ["little"]
  held = partition.hold_out(label_sets, groups, 0.2, 3)
  assert np.flatnonzero(held).tolist() == [9, 19]


def test_clips_of_several_labels_are_held_out_by_every_class():
  rng = np.random.default_rng(0)
  rows = rng.random((200, 6)) < 0.3
  label_sets = [tuple(np.flatnonzero(row).tolist()) for row in rows]
  held = partition.hold_out(label_sets, None, 0.2, 0)
  shares = rows[held].sum(0) / rows.sum(0)
  assert (shares > 0.1).all() and (shares < 0.35).all()
