"""Random-access collections of labelled clips: folders, CSV and JSON.

Every source answers `len(source)` and `source[i]`, which decodes clip i:

  {"waveform": [n], "label": int32 () or float32 [C], "id": int32 ()}

A waveform is float32 in [-1, 1), or the 16-bit integers that a clip was stored
as: `audio_io.as_float` and `as_pcm16` give what is wanted of either. A label is
the index of the class (-1: unlabelled) or a multi-hot row over C classes; the
id indexes `source.ids`, the names of the clips.
"""

import abc
import functools
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from audiomosaic_jax.data import audio_io, tables

AUDIO_SUFFIXES = (
  *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
  *(".aif", ".aiff", ".au", ".caf", ".w64"),
)
UNLABELLED = tables.UNLABELLED

Path = str | os.PathLike


class Source(abc.ABC):
  """Clips by index.

  Attributes:
    ids: name of each clip.
    class_names: name of each class; empty if unlabelled.
    multi_hot: whether a clip can have several labels.
    groups: what each clip was cut out of or who speaks in it, where that is
      known: clips of one group are not independent. None if it is not.
    missing: ids that a table lists but the folder lacks; not in `ids`.
  """

  ids: Sequence[str]
  class_names: tuple[str, ...]
  multi_hot: bool
  groups: Sequence[str] | None = None
  missing: Sequence[str] = ()

  @property
  @abc.abstractmethod
  def labels(self) -> np.ndarray:
    """int32 [n], or float32 [n, C] if a clip can have several; no decoding."""

  @property
  def label_sets(self) -> list[tuple[int, ...]]:
    """The classes of each clip; two million clips need no dense rows."""
    if self.multi_hot:
      return [tuple(np.flatnonzero(row).tolist()) for row in self.labels]
    return [(label,) if label >= 0 else () for label in self.labels.tolist()]

  def path(self, index: int) -> str | None:
    """The file that clip `index` is in; None if it is in no file of its own."""
    del index
    return None

  @abc.abstractmethod
  def __getitem__(self, index: int) -> dict:
    """Decodes clip `index`; raises audio_io.BadClipError."""

  def __len__(self) -> int:
    return len(self.ids)

  def __repr__(self) -> str:
    return (
      f"{type(self).__name__}({len(self)} clips, "
      f"{len(self.class_names)} classes)"
    )


def encode_label(label: int | Sequence[int], num_classes: int):
  """Returns an int32 scalar, or the multi-hot row of several labels."""
  if isinstance(label, int | np.integer):
    return np.int32(label)
  row = np.zeros(num_classes, np.float32)
  row[list(label)] = 1.0
  return row


class FileSource(Source):
  """Clips that are audio files or parts of them."""

  def __init__(
    self,
    paths: Sequence[str],
    *,
    root: Path,
    spans: Sequence[tuple[float, float]] | None,
    labels: Sequence[int | tuple[int, ...]],
    class_names: Sequence[str],
    sample_rate_hz: int,
    ids: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    missing: Sequence[str] = (),
  ):
    """Holds one row per clip.

    Args:
      paths: file of each clip, relative to `root`, or absolute.
      root: folder of the relative paths.
      spans: (start_s, end_s) of each clip in its file; None is whole files.
      labels: a class index each, or a tuple of them each.
      class_names: name of each class.
      sample_rate_hz: rate the clips are resampled to.
      ids: name of each clip; None is its path and its part of the file.
      groups: see `Source`; None is the file of each clip, if clips are cut out
        of files or some share one.
      missing: see `Source`.
    """
    self.root = os.fspath(root)
    self.paths = list(paths)
    self.spans = None if spans is None else np.asarray(spans, np.float64)
    self.class_names = tuple(class_names)
    self.sample_rate_hz = sample_rate_hz
    self.multi_hot = not isinstance(labels[0], int)
    self._labels = labels
    repeated = len(set(self.paths)) < len(self.paths)
    if groups is None and (repeated or spans is not None):
      groups = self.paths  # Cuts of one recording, here or in another split.
    self.groups, self.missing = groups, missing
    self.names = self.paths
    if self.spans is not None:
      self.names = [
        f"{path}#{start:.3f}-{end:.3f}"
        for path, (start, end) in zip(paths, self.spans, strict=True)
      ]
    self.ids = self.names if ids is None else ids

  @functools.cached_property
  def labels(self) -> np.ndarray:
    return encode_labels(self._labels, len(self.class_names))

  @property
  def label_sets(self) -> list[tuple[int, ...]]:
    if self.multi_hot:
      return list(self._labels)
    return [(label,) if label >= 0 else () for label in self._labels]

  def path(self, index: int) -> str:
    return os.path.join(self.root, self.paths[index])

  def __getitem__(self, index: int) -> dict:
    start_s, end_s = (None, None) if self.spans is None else self.spans[index]
    waveform = audio_io.load_audio(
      self.path(index),
      sample_rate_hz=self.sample_rate_hz,
      start_s=start_s,
      end_s=end_s,
      name=self.names[index],
    )
    label = encode_label(self._labels[index], len(self.class_names))
    return {"waveform": waveform, "label": label, "id": np.int32(index)}


class FolderSource(FileSource):
  """Every audio file below a folder; the class is the first sub-folder."""

  def __init__(
    self,
    root: Path,
    *,
    class_names: Sequence[str] | None,
    sample_rate_hz: int,
  ):
    """Lists the folder.

    Args:
      root: folder; files directly in it are unlabelled.
      class_names: sub-folders in the order of their indices, to agree with
        another folder; None is alphabetical.
      sample_rate_hz: rate the clips are resampled to.

    Raises:
      FileNotFoundError: no such folder, or no audio in it.
      ValueError: a sub-folder that is not in `class_names`.
    """
    root = epath.Path(root).expanduser()
    if not root.is_dir():
      raise FileNotFoundError(f"{root} is not a folder")
    files = list_audio(root)
    if not files:
      raise FileNotFoundError(
        f"{root} holds no audio file ({' '.join(AUDIO_SUFFIXES)}), "
        "not even in sub-folders"
      )
    classes = [name.split("/")[0] if "/" in name else "" for name in files]
    if class_names is None:
      class_names = sorted(set(classes) - {""})
    index = {name: i for i, name in enumerate(class_names)}
    unknown = sorted(set(classes) - set(index) - {""})
    if unknown:
      raise ValueError(
        f"{root}/{unknown[0]} is not one of the classes "
        f"{', '.join(class_names)}"
      )
    super().__init__(
      files,
      root=root,
      spans=None,
      labels=[index.get(name, UNLABELLED) for name in classes],
      class_names=class_names,
      sample_rate_hz=sample_rate_hz,
    )


class CsvSource(FileSource):
  """One clip per row of a CSV file with a header.

  Columns `start_s` and `end_s`, where there are any, cut clips out of files.
  """

  def __init__(
    self,
    csv_path: Path,
    *,
    root: Path | None,
    path_column: str,
    label_column: str | None,
    split_column: str | None,
    split: str | None,
    class_names: Sequence[str] | None,
    sample_rate_hz: int,
  ):
    """Reads the file.

    Args:
      csv_path: the CSV file.
      root: folder of the paths in it; None is the folder of the file.
      path_column: column of the audio paths.
      label_column: column of the class names; None is unlabelled.
      split_column: column that tells the splits apart; None is one split.
      split: which rows to take; None is all.
      class_names: classes in the order of their indices; None is the
        alphabetical order of all rows, whatever their split.
      sample_rate_hz: rate the clips are resampled to.

    Raises:
      FileNotFoundError: no such file, or its first clip does not exist.
      ValueError: a missing column, wrong value, unknown label or empty split;
        names the file and the line.
    """
    csv_path = pathlib.Path(csv_path).expanduser()
    rows = tables.read_csv(csv_path, [path_column, label_column, split_column])
    if label_column is None:
      class_names = ()
    elif class_names is None:
      class_names = sorted({row[label_column] for _, row in rows})
    if split is not None and split_column is not None:
      splits = sorted({row[split_column] for _, row in rows})
      rows = [(n, row) for n, row in rows if row[split_column] == split]
      if not rows:
        raise ValueError(
          f"{csv_path}: no row has {split_column}={split!r}; there are "
          f"{', '.join(splits)}"
        )
    root = csv_path.parent if root is None else epath.Path(root).expanduser()
    line, first = rows[0]
    _check_first(root, first[path_column], f"{csv_path}, line {line}")
    super().__init__(
      [row[path_column] for _, row in rows],
      root=root,
      spans=tables.read_spans(csv_path, rows),
      labels=tables.read_labels(csv_path, rows, label_column, class_names),
      class_names=class_names,
      sample_rate_hz=sample_rate_hz,
    )


class ManifestSource(FileSource):
  """The published code's JSON, {"data": [{"wav": ..., "labels": ...}]}.

  `labels` holds machine identifiers separated by commas; a CSV file with the
  columns index, mid, display_name lists them. Labels are multi-hot.
  """

  def __init__(
    self,
    json_path: Path,
    *,
    label_csv: Path,
    root: Path | None,
    sample_rate_hz: int,
  ):
    """Reads both files.

    Args:
      json_path: the manifest.
      label_csv: the list of classes.
      root: folder of the relative paths; None is that of the manifest.
      sample_rate_hz: rate the clips are resampled to.

    Raises:
      FileNotFoundError: no such file, or the first clip does not exist.
      ValueError: a malformed entry or unknown label; names file and entry.
    """
    json_path = pathlib.Path(json_path).expanduser()
    class_index, class_names = tables.read_label_csv(label_csv)
    try:
      entries = json.loads(json_path.read_text(encoding="utf-8"))["data"]
      fields = [(e["wav"], e["labels"].split(",")) for e in entries]
      paths, labels = zip(*fields, strict=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{json_path} is not {{"data": [{{"wav": ..., "labels": ...}}]}} with '
        f"at least one entry: {type(error).__name__} {error}"
      ) from None
    for number, mids in enumerate(labels):
      for mid in mids:
        if mid not in class_index:
          raise ValueError(
            f"{json_path}, entry {number}: label {mid!r} is not in {label_csv}"
          )
    root = json_path.parent if root is None else epath.Path(root).expanduser()
    _check_first(root, paths[0], f"{json_path}, entry 0")
    super().__init__(
      paths,
      root=root,
      spans=None,
      labels=[tuple(class_index[mid] for mid in mids) for mids in labels],
      class_names=class_names,
      sample_rate_hz=sample_rate_hz,
    )


def list_audio(root: Path) -> list[str]:
  """Returns the audio files below a folder, relative to it, sorted.

  Links to folders are followed, once each. Hidden files are left out: on some
  systems every clip has one with its attributes.
  """
  root = os.fspath(root)
  if "://" in root:
    return _list_bucket(root)
  seen, found = set(), []
  for folder, folders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in seen:
      folders.clear()
      continue
    seen.add(real)
    below = os.path.relpath(folder, root).replace(os.sep, "/")
    prefix = "" if below == "." else f"{below}/"
    found += [
      prefix + name
      for name in names
      if name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith(".")
    ]
  return sorted(found)


def _list_bucket(root: str) -> list[str]:
  """Does the same for a folder in a bucket, gs://bucket/folder."""
  import fsspec  # With the plug-in of the bucket, such as gcsfs.

  system, folder = fsspec.core.url_to_fs(root)
  names = [name.removeprefix(f"{folder}/") for name in system.find(folder)]
  return sorted(
    name
    for name in names
    if name.lower().endswith(AUDIO_SUFFIXES)
    and not name.rpartition("/")[2].startswith(".")
  )


def _check_first(
  root: pathlib.Path | epath.Path, path: str, where: str
) -> None:
  """Catches a wrong root before 20,000 clips are reported missing."""
  if not (root / path).is_file():
    raise FileNotFoundError(
      f"{where}: {root / path} does not exist; paths are relative to {root}"
    )


def encode_labels(labels: Sequence, num_classes: int) -> np.ndarray:
  """Returns int32 [n], or float32 [n, C] of several labels per clip."""
  return np.stack([encode_label(label, num_classes) for label in labels])
