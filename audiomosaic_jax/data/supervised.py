"""What supervised training reads: splits, folds, and whether they make sense.

Everything here is decided before a model is built, and an error names the
file, and where there is one the line, that has to be mended.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import soundfile

from audiomosaic_jax.data import datasets, layout, wrappers
from audiomosaic_jax.data.sources import Source

# Beyond this, opening every file to read its length takes minutes.
MAX_LENGTHS_READ = 50_000


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
    valid = {} if self.valid is None else {"valid": self.valid}
    return {"train": self.train} | valid | dict(self.tests)


def load_splits(
  source: Mapping,
  *,
  train: str | None,
  valid: str,
  test: Sequence[str],
  valid_fraction: float,
  fold: int,
  num_folds: int,
  seed: int,
  sample_rate_hz: int,
  min_clip_ms: float,
) -> Splits:
  """Reads and checks the splits of one fold.

  A data set that has folds of its own names them with "{fold}", such as
  "not_fold{fold}", which becomes 1, 2, ... Otherwise, with more than one fold,
  all clips of the data set are cut into `num_folds` parts, which keep groups
  together and classes balanced; fold k is tested on part k.

  Args:
    source: arguments of `datasets.make_dataset`, except the split.
    train: split to learn from; "" is all clips.
    valid: split to select by; "" is none, or a part of the training clips.
    test: splits to report on.
    valid_fraction: share of the training clips to select by if there is no
      other; at least one group of them.
    fold: number of the fold, from 0.
    num_folds: how many; 1 is the splits as they are.
    seed: of the parts.
    sample_rate_hz: rate the clips are resampled to.
    min_clip_ms: a clip shorter than this is an error.

  Raises:
    FileNotFoundError: the data set is not there.
    ValueError: labels, splits or clips that cannot be trained or measured on.
  """

  def load(split):
    name = split.format(fold=fold + 1) or None
    return datasets.make_dataset(
      split=name, sample_rate_hz=sample_rate_hz, **source
    )

  given = "{fold}" in train
  if num_folds > 1 and not given:
    pool = load("")
    _check_labels("all clips", pool)
    part = assign_parts(pool.label_sets, pool.groups, num_folds, seed)
    splits = Splits(
      wrappers.SubsetSource(pool, np.flatnonzero(part != fold).tolist()),
      None,
      {
        "test": wrappers.SubsetSource(
          pool, np.flatnonzero(part == fold).tolist()
        )
      },
    )
  else:
    names = [name.format(fold=fold + 1) for name in test]
    tests = {name if len(names) > 1 else "test": load(name) for name in names}
    splits = Splits(load(train), load(valid) if valid else None, tests)
  if splits.valid is None and valid_fraction:
    splits = _hold_out(splits, valid_fraction, seed)
  for name, clips in splits.named().items():
    _check_labels(name, clips)
    check_lengths(clips, min_clip_ms)
  _check_same_classes(splits)
  return splits


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
  count = len(label_sets)
  names = range(count) if groups is None else groups
  _, member = np.unique(np.asarray(names), return_inverse=True)
  num_groups = int(member.max()) + 1
  if num_groups < num_parts:
    raise ValueError(
      f"{num_groups} groups of clips cannot be cut into {num_parts} parts; use "
      f"at most {num_groups}"
    )
  num_classes = 1 + max((max(s, default=0) for s in label_sets), default=0)
  classes = np.zeros((num_groups, num_classes))
  for group, labels in zip(member, label_sets, strict=True):
    classes[group, list(labels)] += 1
  sizes = np.bincount(member)
  shuffled = np.random.default_rng(seed).permutation(num_groups)
  order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
  held = np.zeros((num_parts, num_classes))
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
  if not 0 < fraction <= 0.5:
    raise ValueError(f"valid_fraction {fraction} is not above 0, up to 0.5")
  train = splits.train
  clips = range(len(train)) if train.groups is None else train.groups
  num_parts = max(2, min(round(1 / fraction), len(set(clips))))
  part = assign_parts(train.label_sets, train.groups, num_parts, seed)
  return Splits(
    wrappers.SubsetSource(train, np.flatnonzero(part != 0).tolist()),
    wrappers.SubsetSource(train, np.flatnonzero(part == 0).tolist()),
    splits.tests,
  )


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
  if len(source) > MAX_LENGTHS_READ:
    return
  for index in range(len(source)):
    length = _length_ms(source.path(index))
    if length is not None and length < min_clip_ms:
      raise ValueError(
        f"{_where(source, index)}: {source.ids[index]} lasts {length:.1f} ms, "
        f"less than one frame of {min_clip_ms:g} ms; remove the clip"
      )


def _length_ms(path: str | None) -> float | None:
  """Returns the length of a file, None if it is unknown."""
  if path is None:
    return None
  try:
    info = soundfile.info(path)
  except (soundfile.LibsndfileError, TypeError):
    return None
  return 1000 * info.frames / info.samplerate


def _where(source: Source, index: int) -> str:
  """Returns what lists a clip: file and line if known, else its name."""
  while isinstance(source, wrappers.SubsetSource):
    index, source = int(source.indices[index]), source.source
  where = getattr(source, "where", None)
  return where(index) if where else str(source.path(index) or source.ids[index])
