"""Opens what is to be prepared: folders, lists, archives, named data sets."""

import glob
import os
import re
from collections.abc import Sequence

from absl import logging
from etils import epath

from audiomosaic_jax.data import (
  audit,
  datasets,
  prepare_clips,
  sources,
  tables,
  tar_source,
)

# Of every data set, what adds up to all of it with no clip twice.
SPLITS = audit.SPLITS | {
  "audioset": ("balanced", "unbalanced", "eval"),
  "demo": datasets.DEMO_SPLITS,
  "esc50": ("fold1", "fold2", "fold3", "fold4", "fold5"),
}
# Which cannot be read clip by clip from a file.
NO_INPUT = ("tfds",)


def open_dataset(
  name: str,
  data_dir: str | None,
  splits: Sequence[str],
  changes: Sequence[str],
  *,
  sample_rate_hz: int,
) -> prepare_clips.Inputs:
  """Opens a data set that `datasets.DATASETS` knows.

  Args:
    name: of the data set.
    data_dir: where it is; the demo needs none.
    splits: "[name=]split" each; none is all that do not overlap.
    changes: "name=value" of its other arguments, see `audit.parse_arguments`.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError, ValueError: as the data set does.
  """
  if name in NO_INPUT:
    raise ValueError(f"--dataset={name} is prepared already")
  wanted = [text.rpartition("=")[::2] for text in splits]
  wanted = wanted or [("", split) for split in SPLITS.get(name, ())]
  if not wanted:
    raise ValueError(f"{name} needs --split=NAME")
  if name == "demo":
    arguments = {"sample_rate_hz": sample_rate_hz}
  elif data_dir is None:
    raise ValueError(f"--dataset={name} needs --data_dir=DIR")
  else:
    arguments = audit.parse_arguments(name, data_dir, sample_rate_hz, changes)
  opened = {}
  for new, split in wanted:
    new = new or split or "train"
    if new in opened:
      raise ValueError(f"split {new!r} is named twice; use --split=NAME=SPLIT")
    try:
      opened[new] = datasets.make_dataset(name, split, **arguments)
    except datasets.DatasetNotPreparedError as error:
      if splits:
        raise
      # Whoever has only a part of a data set need not name it.
      logging.warning("split %s is left out: %s", new, error)
      problem = error
  if not opened:
    raise problem
  where = (
    ""
    if data_dir is None
    else prepare_clips.absolute(os.path.expanduser(data_dir))
  )
  described = [f"--dataset={name}", f"--data_dir={where}", *changes, *opened]
  return prepare_clips.collect(described, opened)


def open_paths(
  inputs: Sequence[str], *, split_column: str | None, **options
) -> prepare_clips.Inputs:
  """Opens folders, .csv files, .json manifests and .tar archives.

  Args:
    inputs: see `parse`.
    split_column: see `parse`.
    **options: the other arguments of `_open`.

  Raises:
    FileNotFoundError, ValueError: as the sources do.
  """
  options["split_column"] = split_column
  paths = parse(inputs, split_column)
  members = {
    split: [m for p in found for m in tar_source.list_audio(p)]
    for split, found in paths.items()
    if found[0].suffix == ".tar"
  }
  for split, found in members.items():
    if not found:
      raise FileNotFoundError(
        f"{', '.join(map(str, paths[split]))}: no audio file in there "
        f"({' '.join(sources.AUDIO_SUFFIXES)})"
      )
  root = tar_source.shared_folder([m for ms in members.values() for m in ms])
  opened = {}
  for split, found in paths.items():
    if split in members:
      opened[split] = tar_source.TarSource(
        members[split], root=root, sample_rate_hz=options["sample_rate_hz"]
      )
    else:
      opened[split] = _open(split, found[0], **options)
  described = [
    f"{split}={','.join(prepare_clips.absolute(str(path)) for path in found)}"
    for split, found in paths.items()
  ]
  return prepare_clips.collect(described, opened)


def parse(
  inputs: Sequence[str], split_column: str | None
) -> dict[str, list[epath.Path]]:
  """Returns split -> paths of every "[split=]path".

  Args:
    inputs: without a name, the split is "train". A pattern, or several
      inputs, may name the archives of one split.
    split_column: if given, the values of this column of a .csv name its
      splits instead.

  Raises:
    FileNotFoundError: a pattern that fits nothing.
    ValueError: a split is named twice, or a path is empty.
  """
  wanted = {}

  def add(split: str, path: epath.Path) -> None:
    paths = wanted.setdefault(split, [])
    paths.append(path)
    if len(paths) > 1 and {p.suffix for p in paths} != {".tar"}:
      raise ValueError(f"split {split!r} is named twice; use --input=NAME=PATH")

  for text in inputs:
    split, path = re.fullmatch(r"(?:(\w+)=)?(.*)", text).groups()
    if not path:
      raise ValueError(
        f"--input={text}: there is no path; is a variable unset?"
      )
    path = epath.Path(path).expanduser()
    if path.suffix == ".csv" and split_column:
      rows = tables.read_csv(path, [split_column])
      for value in sorted({row[split_column] for _, row in rows}):
        add(value, path)
    elif path.suffix == ".tar" and not path.exists():
      found = sorted(glob.glob(str(path), recursive=True))
      if not found:
        raise FileNotFoundError(f"{path}: no such archive")
      for name in found:
        add(split or "train", epath.Path(name))
    else:
      add(split or "train", path)
  return wanted


def _open(
  split: str,
  path: epath.Path,
  *,
  root: str | None,
  label_csv: str | None,
  path_column: str,
  label_column: str | None,
  split_column: str | None,
  sample_rate_hz: int,
) -> sources.Source:
  """Opens one split.

  Args:
    split: its name.
    path: folder, .csv file or .json manifest.
    root: folder of relative paths in a .csv or .json; None is that of the
      file.
    label_csv: classes of a manifest.
    path_column: column of a .csv.
    label_column: column of a .csv; None is unlabelled.
    split_column: column of a .csv; None takes all rows.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    ValueError: a manifest without label_csv.
  """
  if path.suffix == ".json":
    if label_csv is None:
      raise ValueError(f"{path} is a manifest; name its classes: --label_csv")
    return sources.ManifestSource(
      path, label_csv=label_csv, root=root, sample_rate_hz=sample_rate_hz
    )
  if path.suffix != ".csv":
    return sources.FolderSource(
      path, class_names=None, sample_rate_hz=sample_rate_hz
    )
  return sources.CsvSource(
    path,
    root=root,
    path_column=path_column,
    label_column=label_column,
    split_column=split_column,
    split=split if split_column else None,
    class_names=None,
    sample_rate_hz=sample_rate_hz,
  )
