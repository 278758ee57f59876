"""Which clip is in which split: a table to read, and splits.csv."""

import collections
import csv
import itertools
import os
import pathlib
from collections.abc import Mapping

import ml_collections
import numpy as np

from audiomosaic_jax import files, tables
from audiomosaic_jax.data import partition, supervised
from audiomosaic_jax.data.sources import Source

FILE = "splits.csv"
# Beyond this, only the sum of all classes is printed.
MAX_CLASSES = 40
# Data sets whose clips nobody has grouped yet.
UNGROUPED = ("folder", "task")


def report(
  splits: supervised.Splits,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  fold: int,
) -> None:
  """Prints what is in the splits of a fold, and writes `splits.csv`.

  With several folds the file is `splits_fold_N.csv`. Nothing is written of
  more than `supervised.MAX_LENGTHS_READ` clips.

  Args:
    splits: of the fold.
    config: the experiment.
    workdir: of the experiment.
    fold: from 0.
  """
  seconds = {n: supervised.lengths_s(s) for n, s in splits.named().items()}
  lines = [tables.table_text(table(splits, seconds))]
  lines += [f"note: {note}" for note in notes(splits)]
  if splits.train.groups is None and config.data.source.name in UNGROUPED:
    lines.append(
      "note: every clip counts as a recording of its own; where several are of "
      "one, tell so with data.source.group_pattern or a column group"
    )
  num_clips = sum(map(len, seconds.values()))
  if num_clips <= supervised.MAX_LENGTHS_READ:
    name = FILE if config.folds == 1 else f"splits_fold_{fold + 1}.csv"
    path = workdir / name
    before = path.read_bytes() if path.exists() else None
    write(path, splits, seconds, config.data.source.data_dir)
    if before not in (None, path.read_bytes()):
      lines.append(f"note: {path} is not what it was: clips or splits changed")
    lines.append(f"splits: {path}")
  print("\n".join(lines), flush=True)


def table(
  splits: supervised.Splits, seconds: Mapping[str, np.ndarray]
) -> tables.Table:
  """Returns clips, groups and seconds of every class in every split.

  Args:
    splits: of a fold.
    seconds: split -> [n] length of each clip, NaN where it is unknown.
  """
  class_names = splits.train.class_names
  shown = range(len(class_names)) if len(class_names) <= MAX_CLASSES else ()
  columns = ["class"]
  rows = [["all"], *([class_names[label]] for label in shown)]
  for split, source in splits.named().items():
    columns += [split, "groups", "seconds"]
    groups, label_sets = source.groups or source.ids, source.label_sets
    members = [np.arange(len(source))]
    members += [
      np.array(
        [i for i, labels in enumerate(label_sets) if label in labels], int
      )
      for label in shown
    ]
    for cells, chosen in zip(rows, members, strict=True):
      known = ~np.isnan(seconds[split][chosen])
      total = seconds[split][chosen][known].sum()
      cells += [
        str(len(chosen)),
        str(len({groups[i] for i in chosen})),
        f"{total:.0f}" if known.any() else "-",
      ]
  caption = f"{len(class_names)} classes; clips, groups and seconds of each"
  return tables.Table(caption, columns, rows)


def notes(splits: supervised.Splits) -> list[str]:
  """Returns what makes a score of these splits say less than it seems to."""
  return _untested(splits) + _leaks(splits)


def _untested(splits: supervised.Splits) -> list[str]:
  """Tells of classes that are trained and in no test split."""
  train = splits.train
  tests = [labels for s in splits.tests.values() for labels in s.label_sets]
  tested = {label for labels in tests for label in labels}
  counts = collections.Counter(c for labels in train.label_sets for c in labels)
  lost = sorted(set(counts) - tested)
  if not lost:
    return []
  names = ", ".join(train.class_names[label] for label in lost[:5])
  text = f"trained and never tested: {len(lost)} classes, such as {names}"
  alone = partition.single_groups(train.label_sets, train.groups)
  if lost[0] in alone:
    clip = train.ids[alone[lost[0]]]
    text += (
      f", whose {counts[lost[0]]} clips are one group, that of {clip}; "
      f"{supervised.HOW_TO_GROUP}"
    )
  return [text]


def _leaks(splits: supervised.Splits) -> list[str]:
  """Tells of groups that are in two splits."""
  found, named = [], splits.named()
  for one, other in itertools.combinations(named, 2):
    groups = [named[name].groups for name in (one, other)]
    if None in groups or {one, other} <= set(splits.tests):
      continue
    shared = sorted(set(groups[0]) & set(groups[1]))
    if shared:
      found.append(
        f"{len(shared)} groups, such as {shared[0]!r}, are in {one} and in "
        f"{other}; what {other} says is too good"
      )
  return found


def write(
  path: pathlib.Path,
  splits: supervised.Splits,
  seconds: Mapping[str, np.ndarray],
  data_dir: str,
) -> None:
  """Writes a line for every clip.

  The columns of a `labels.csv` are among them: as one, in the folder of the
  clips, the file keeps the splits as they are.

  Args:
    path: of the file.
    splits: of a fold.
    seconds: split -> [n] length of each clip.
    data_dir: paths below it are relative to it.
  """
  temporary = files.temporary_path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  root = os.path.abspath(os.path.expanduser(data_dir))
  with temporary.open(
    "w", newline="", encoding="utf-8", errors="surrogateescape"
  ) as file:
    writer = csv.writer(file, lineterminator="\n")
    named = splits.named()
    cut = any(_span(source, 0) for source in named.values())
    spans = ["start_s", "end_s"] if cut else []
    writer.writerow(
      ["clip", "path", "label", "split", "group", "seconds", *spans]
    )
    for split, source in named.items():
      groups = source.groups or source.ids
      for i, labels in enumerate(source.label_sets):
        place = os.path.abspath(source.path(i) or source.ids[i])
        if place.startswith(root + os.sep):
          place = os.path.relpath(place, root)
        label = ";".join(source.class_names[label] for label in labels)
        length = seconds[split][i]
        length = "" if np.isnan(length) else f"{length:.3f}"
        row = [source.ids[i], place, label, split, groups[i], length]
        writer.writerow(row + list(_span(source, i)))
  temporary.replace(path)


def _span(source: Source, index: int) -> tuple[str, ...]:
  """Returns the part of its file that a clip is; () of a whole file."""
  source, index = supervised.origin(source, index)
  spans = getattr(source, "spans", None)
  return () if spans is None else tuple(map(str, spans[index].tolist()))
