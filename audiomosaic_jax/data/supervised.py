"""What supervised training reads: splits, folds, and whether they make sense.

Everything here is decided before a model is built, and an error names the
file, and where there is one the line, that has to be mended.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from audiomosaic_jax.data import (
  audio_io,
  datasets,
  layout,
  own_clips,
  partition,
  wrappers,
)
from audiomosaic_jax.data.sources import Source

# Beyond this, opening every file to read its length takes minutes.
MAX_LENGTHS_READ = 50_000

HOW_TO_GROUP = (
  "add clips of another recording, or set data.source.group_pattern or the "
  "column group so that clips of different recordings are in different groups"
)


@dataclasses.dataclass(frozen=True)
class Splits:
  """The clips of one run.

  Attributes:
    train: clips to learn from.
    valid: clips to select by; None without any.
    tests: name -> clips to report on.
  """

  train: Source
  valid: Source | None
  tests: Mapping[str, Source]

  def named(self) -> dict[str, Source]:
    """Returns name -> clips of all splits, training first."""
    return {"train": self.train} | self.held_out()

  def held_out(self) -> dict[str, Source]:
    """Returns name -> clips of all splits that nothing is learned from."""
    valid = {} if self.valid is None else {"valid": self.valid}
    return valid | dict(self.tests)


def load_splits(
  source: Mapping,
  *,
  train: str | None,
  valid: str,
  test: Sequence[str],
  valid_fraction: float,
  test_fraction: float,
  fold: int,
  num_folds: int,
  seed: int,
  sample_rate_hz: int,
  min_clip_ms: float,
) -> Splits:
  """Reads and checks the splits of one fold.

  A data set that has folds of its own names them with "{fold}", such as
  "not_fold{fold}", which becomes 1, 2, ... Otherwise, with more than one fold,
  all clips of its splits are cut into `num_folds` parts, which keep groups
  together and classes balanced; fold k is tested on part k.

  A folder that is not cut into splits, see `own_clips`, is cut here: groups
  whole, a share of every class.

  Args:
    source: arguments of `datasets.make_dataset`, except the split.
    train: split to learn from; "" is all clips.
    valid: split to select by; "" is none, or a part of the training clips.
    test: splits to report on.
    valid_fraction: share of the training clips to select by if there is no
      other; at least one group of them.
    test_fraction: share of all clips to report on, of a folder without splits.
    fold: number of the fold, from 0.
    num_folds: how many; 1 is the splits as they are.
    seed: of the parts.
    sample_rate_hz: rate the clips are resampled to.
    min_clip_ms: a clip shorter than this is an error.

  Raises:
    FileNotFoundError: the data set is not there.
    ValueError: labels, splits or clips that cannot be trained or measured on.
  """
  source, known = own_clips.find(source)

  def load(split):
    name = split.format(fold=fold + 1)
    return datasets.make_dataset(
      split=(known or {}).get(name, name) or None,
      sample_rate_hz=sample_rate_hz,
      **source,
    )

  def load_all():
    if not known and source["name"] in ("folder", "task"):
      return load("")
    parts = known or dict.fromkeys(filter(None, (train, valid, *test)))
    return wrappers.ConcatSource([load(split) for split in parts])

  if num_folds > 1 and "{fold}" not in train:
    splits = _take_fold(load_all(), fold, num_folds, seed)
  elif known == {}:
    splits = _cut(load_all(), test_fraction, seed)
  else:
    names = [name.format(fold=fold + 1) for name in test]
    tests = {name if len(names) > 1 else "test": load(name) for name in names}
    if known is not None and valid in set(own_clips.NAMES) - set(known):
      valid = ""
    splits = Splits(load(train), load(valid) if valid else None, tests)
  if splits.valid is None and valid_fraction:
    splits = _hold_out(splits, valid_fraction, seed)
  for name, clips in splits.named().items():
    _check_labels(name, clips)
    check_lengths(clips, min_clip_ms)
  _check_same_classes(splits)
  return splits


def _take_fold(pool: Source, fold: int, num_folds: int, seed: int) -> Splits:
  """Returns all clips but those of a fold, and those, to test on."""
  _check_labels("all clips", pool)
  alone = partition.single_groups(pool.label_sets, pool.groups)
  if alone and not pool.multi_hot:
    label, index = next(iter(alone.items()))
    raise ValueError(
      f"all clips of class {pool.class_names[label]!r} are of one group, such "
      f"as {pool.ids[index]}, so no fold could both train and test it; "
      f"{HOW_TO_GROUP}"
    )
  part = assign_parts(pool.label_sets, pool.groups, num_folds, seed)
  rest, test = (
    _subset(pool, chosen) for chosen in (part != fold, part == fold)
  )
  return Splits(rest, None, {"test": test})


def _cut(pool: Source, test_fraction: float, seed: int) -> Splits:
  """Returns training clips, and a share of every class to test on."""
  _check_labels("all clips", pool)
  if not test_fraction:
    raise ValueError(
      f"{pool!r} is not cut into splits: no column split and no folders train "
      "and test; set data.splits.test_fraction=0.2 to have it cut"
    )
  test = _choose(pool, "test_fraction", test_fraction, seed)
  if not test.any():
    raise ValueError(
      f"every class of {pool!r} is of one group only, so none can be both "
      f"trained and tested; {HOW_TO_GROUP}"
    )
  return Splits(_subset(pool, ~test), None, {"test": _subset(pool, test)})


def _subset(source: Source, chosen: np.ndarray) -> Source:
  return wrappers.SubsetSource(source, np.flatnonzero(chosen).tolist())


def _choose(
  source: Source, field: str, fraction: float, seed: int
) -> np.ndarray:
  """Returns which clips to hold out, as `partition.hold_out` does."""
  if not 0 < fraction <= 0.5:
    raise ValueError(f"{field} {fraction} is not above 0, up to 0.5")
  return partition.hold_out(source.label_sets, source.groups, fraction, seed)


def assign_parts(
  label_sets: Sequence[Sequence[int]],
  groups: Sequence[str] | None,
  num_parts: int,
  seed: int,
) -> np.ndarray:
  """Returns [n] the part of each clip: groups whole, classes spread evenly.

  Groups, largest first and else in random order, go one after the other to
  the part that has the fewest clips of their classes, then of any.

  Args:
    label_sets: classes of each clip.
    groups: group of each clip; None makes every clip its own.
    num_parts: how many parts.
    seed: of the order.

  Raises:
    ValueError: fewer groups than parts.
  """
  member, num_groups = partition.members(len(label_sets), groups)
  if num_groups < num_parts:
    raise ValueError(
      f"{num_groups} groups of clips cannot be cut into {num_parts} parts; use "
      f"at most {num_groups}"
    )
  classes = partition.count_classes(label_sets, member, num_groups)
  sizes = np.bincount(member)
  shuffled = np.random.default_rng(seed).permutation(num_groups)
  order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
  held = np.zeros((num_parts, classes.shape[1]))
  total = np.zeros(num_parts)
  part = np.zeros(num_groups, np.int64)
  for group in order:
    crowding = held @ classes[group]
    best = np.lexsort((total, crowding))[0]
    part[group] = best
    held[best] += classes[group]
    total[best] += sizes[group]
  return part[member]


def _hold_out(splits: Splits, fraction: float, seed: int) -> Splits:
  """Returns the splits with part of the training clips to select by."""
  train = splits.train
  chosen = _choose(train, "valid_fraction", fraction, seed)
  if not chosen.any():
    raise ValueError(
      f"no class of {train!r} has two groups of clips, so none can be held out "
      "to select by; set evaluation.selection='last' with "
      f"data.splits.valid_fraction=0.0, or else: {HOW_TO_GROUP}"
    )
  return Splits(_subset(train, ~chosen), _subset(train, chosen), splits.tests)


def check_labelled(name: str, source: Source) -> None:
  """Raises ValueError for a clip without a label, where each must have one."""
  if source.multi_hot:
    return
  for index, labels in enumerate(source.label_sets):
    if not labels:
      raise ValueError(
        f"split {name!r}: {_where(source, index)} has no label; put the clip "
        "into the folder of its class, or remove it"
      )


def _check_labels(name: str, source: Source) -> None:
  """Raises ValueError for clips that say nothing about classes."""
  check_labelled(name, source)
  layout.check_classes(source.label_sets, source.class_names, f"split {name!r}")


def _check_same_classes(splits: Splits) -> None:
  """Raises ValueError for a class that is tested and was never trained."""
  trained = {c for labels in splits.train.label_sets for c in labels}
  names = splits.train.class_names
  for name, source in splits.named().items():
    if source.class_names != names:
      raise ValueError(
        f"split {name!r} has the classes {', '.join(source.class_names)}, but "
        f"the training clips {', '.join(names)}"
      )
    # Of clips with several labels some classes are always rare.
    if source.multi_hot:
      continue
    for index, (label,) in enumerate(source.label_sets):
      if label not in trained:
        raise ValueError(
          f"split {name!r}: {_where(source, index)} has label "
          f"{names[label]!r}, which no training clip has"
        )


def check_lengths(source: Source, min_clip_ms: float) -> None:
  """Raises ValueError for a clip shorter than a frame; reads headers only.

  Files that cannot be read are left to `datasets.guard`, which replaces them.
  """
  for index, length_s in enumerate(lengths_s(source)):
    if 1000 * length_s < min_clip_ms:
      raise ValueError(
        f"{_where(source, index)}: {source.ids[index]} lasts "
        f"{1000 * length_s:.1f} ms, less than one frame of {min_clip_ms:g} ms; "
        "remove the clip"
      )


def lengths_s(source: Source) -> np.ndarray:
  """Returns [n] seconds of each clip, NaN where no header tells.

  Nothing is read of more than `MAX_LENGTHS_READ` clips.
  """
  if len(source) > MAX_LENGTHS_READ:
    return np.full(len(source), np.nan)
  return np.array([_length_s(*origin(source, i)) for i in range(len(source))])


def _length_s(source: Source, index: int) -> float:
  """Returns the length of a clip, NaN if it is unknown."""
  spans = getattr(source, "spans", None)
  if spans is not None:
    return float(spans[index][1] - spans[index][0])
  path = source.path(index)
  if path is None:
    return float("nan")
  try:
    return audio_io.duration_s(path)
  except audio_io.BadClipError:
    return float("nan")


def origin(source: Source, index: int) -> tuple[Source, int]:
  """Returns the source that decodes a clip, and its number there."""
  while isinstance(source, wrappers.SubsetSource | wrappers.Wrapper):
    if isinstance(source, wrappers.SubsetSource):
      index = int(source.indices[index])
    source = source.source
  return source, index


def _where(source: Source, index: int) -> str:
  """Returns what lists a clip: file and line if known, else its name."""
  source, index = origin(source, index)
  where = getattr(source, "where", None)
  return where(index) if where else str(source.path(index) or source.ids[index])
