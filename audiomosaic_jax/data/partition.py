"""Which clips belong together, and parts of a data set that keep them so.

Cuts of one recording sound alike. If one is trained on and another tested, the
score says how well the recording was learned, not its class.
"""

import re
from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Bool, Int


def group_names(
  ids: Sequence[str], groups: Sequence[str] | None, pattern: str
) -> list[str]:
  """Returns the group of each clip by its name.

  A group is the first part in parentheses of the pattern, which has to fit
  from the start of the file name on; or, if there is a slash in the pattern,
  from the start of the whole path on. A clip that it does not fit keeps its
  group, or is one of its own.

  Args:
    ids: path of each clip below the folder.
    groups: what is known of the clips; None is nothing.
    pattern: regular expression, such as "(.*)_[0-9]+" for NAME_NUMBER.wav.

  Raises:
    ValueError: not a regular expression with a group, or it fits no clip.
  """
  try:
    expression = re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"group_pattern {pattern!r} is not a regular expression: {error}"
    ) from None
  if not expression.groups:
    raise ValueError(
      f"group_pattern {pattern!r} has no part in parentheses, which would be "
      "the name of the group; write '(.*)_[0-9]+' for NAME_NUMBER.wav"
    )
  names = list(ids if groups is None else groups)
  fits, others = 0, []
  for index, name in enumerate(ids):
    text = name if "/" in pattern else name.rpartition("/")[2]
    match = expression.match(text)
    if match and match[1]:
      names[index] = match[1]
      fits += 1
    else:
      others.append(name)
  if not fits:
    raise ValueError(
      f"group_pattern {pattern!r} fits none of {len(ids)} clips, the first is "
      f"{ids[0]!r}; it has to fit from the start of the file name on"
    )
  if others:
    logging.warning(
      "group_pattern %r fits %d of %d clips; the first it does not fit is %r",
      *(pattern, fits, len(ids), others[0]),
    )
  return names


def members(
  count: int, groups: Sequence[str] | None
) -> tuple[Int[np.ndarray, " n"], int]:
  """Returns the number of the group of each clip, and how many there are."""
  if groups is None:
    return np.arange(count), count
  _, member = np.unique(np.asarray(groups), return_inverse=True)
  return member, int(member.max()) + 1


def count_classes(
  label_sets: Sequence[Sequence[int]], member: Int[np.ndarray, " n"], count: int
) -> Int[np.ndarray, "G C"]:
  """Returns how many clips of each class each of `count` groups has."""
  num_classes = 1 + max((max(s, default=0) for s in label_sets), default=0)
  classes = np.zeros((count, num_classes), np.int64)
  for group, labels in zip(member, label_sets, strict=True):
    classes[group, list(labels)] += 1
  return classes


def hold_out(
  label_sets: Sequence[Sequence[int]],
  groups: Sequence[str] | None,
  fraction: float,
  seed: int,
) -> Bool[np.ndarray, " n"]:
  """Returns which clips to hold out: groups whole, a share of every class.

  Class by class, the one with the fewest groups first: groups in random order
  are held out that fit into the share and bring the shares of their classes
  nearer to it on the whole, then the one that does so best even if it does not
  fit, and in any case one. But of no class all groups are: a class of one group
  is not held out.

  Args:
    label_sets: classes of each clip.
    groups: group of each clip; None makes every clip its own.
    fraction: share of the clips of each class.
    seed: of the order.
  """
  member, count = members(len(label_sets), groups)
  classes = count_classes(label_sets, member, count)
  present = classes > 0
  left, total = present.sum(0), classes.sum(0)
  held = np.zeros(classes.shape[1])
  chosen = np.zeros(count, bool)
  order = np.random.default_rng(seed).permutation(count)

  def free(candidates):
    """Returns the groups that are left, none the last of a class."""
    last = present[candidates][:, left < 2].any(1)
    return candidates[~chosen[candidates] & ~last]

  def gain(group):
    """Returns by how much the shares come nearer, summed over its classes."""
    own = present[group]
    rest = fraction * total[own] - held[own]
    nearer = np.abs(rest) - np.abs(rest - classes[group, own])
    return float(np.sum(nearer / total[own]))

  def take(group):
    chosen[group] = True
    held[:] += classes[group]
    left[:] -= present[group]

  for label in np.argsort(left, kind="stable"):
    own = order[present[order, label]]
    for group in own:
      rest = fraction * total[label] - held[label]
      if rest < 1:
        break
      fits = classes[group, label] <= rest
      if fits and free(group[None]).size and gain(group) > 0:
        take(group)
    if held[label] and fraction * total[label] - held[label] <= 0.5:
      continue  # Nothing comes nearer.
    candidates = free(own)
    if candidates.size:
      best = max(candidates, key=gain)
      if gain(best) > 0 or not held[label]:
        take(best)
  return chosen[member]


def single_groups(
  label_sets: Sequence[Sequence[int]], groups: Sequence[str] | None
) -> dict[int, int]:
  """Returns class -> a clip of it, of the classes that are in one group only.

  Such a class can be learned or tested, not both.
  """
  member, _ = members(len(label_sets), groups)
  first, several = {}, set()
  for index, labels in enumerate(label_sets):
    for label in labels:
      if member[first.setdefault(label, index)] != member[index]:
        several.add(label)
  return {
    label: i for label, i in sorted(first.items()) if label not in several
  }
