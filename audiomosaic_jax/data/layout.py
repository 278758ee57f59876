"""A downloaded data set on disk: what is there, what is missing, what is odd.

Names in a table never become paths unchecked: clips are looked up among the
files that a walk through the folder found.
"""

import csv
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from audiomosaic_jax.data import audio_io, sources

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

Path = str | os.PathLike


class DatasetNotPreparedError(FileNotFoundError):
  """A data set that has to be prepared first, and how."""


class Where(NamedTuple):
  """A line of a table, for errors; text is made when there is one."""

  path: Path
  line: int

  def __str__(self) -> str:
    return f"{self.path}, line {self.line}"


class Row(NamedTuple):
  """A line of a table and its cells."""

  where: Where
  cells: list[str]


class Clip(NamedTuple):
  """A clip that a table lists.

  Attributes:
    id: its name, the same on every copy of the data set.
    path: its file below the folder; None if the file is not there.
    label: a class index, or a tuple of them.
    group: see `sources.Source.groups`; None if unknown.
    where: what lists it, as the start of an error.
  """

  id: str
  path: str | None
  label: int | tuple[int, ...]
  group: str | None
  where: Where | str


def find_root(
  data_dir: Path, *, holds: Sequence[str], inside: Sequence[str], source: str
) -> pathlib.Path:
  """Returns the folder that has the expected files.

  Args:
    data_dir: the folder, or the one that its archive was extracted into.
    holds: files and folders that have to be there.
    inside: folders of the archive that may have been given the parent of.
    source: where the data set comes from, for the error.

  Raises:
    DatasetNotPreparedError: an archive, no folder, or not what it should hold.
  """
  directory = pathlib.Path(data_dir).expanduser()
  if directory.is_file():
    raise DatasetNotPreparedError(
      f"data_dir={data_dir} is a file; data sets are read from folders. "
      f"{_how_to_extract(directory, directory.parent)}"
    )
  if not directory.is_dir():
    raise DatasetNotPreparedError(
      f"data_dir={data_dir} is not a folder; get the data set from {source}"
    )
  for folder in (directory, *(directory / name for name in inside)):
    if all((folder / name).exists() for name in holds):
      return folder
  lost = [name for name in holds if not (directory / name).exists()]
  hint = f"get the data set from {source}"
  for path in sorted(directory.iterdir()):
    if path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES):
      hint = _how_to_extract(path, directory)
      break
  raise DatasetNotPreparedError(
    f"data_dir={data_dir} does not hold {', '.join(lost)}; {hint}"
  )


def _how_to_extract(path: pathlib.Path, folder: pathlib.Path) -> str:
  if path.suffix.lower() == ".zip":
    parts = path.with_suffix(".z01")
    if parts.exists():
      return (
        f"{path.name} is one of several parts; join and extract them: `zip -s "
        f"0 {path} --out joined.zip && unzip joined.zip -d {folder}`"
      )
    return f"extract it: `unzip {path} -d {folder}`"
  if path.name.lower().endswith(ARCHIVE_SUFFIXES):
    # The Speech Commands archive has no folder of its own.
    target = folder / path.name.split(".tar")[0].removesuffix(".tgz")
    return (
      f"extract it: `mkdir -p {target} && tar -xf {path} -C {target}`, and "
      f"give data_dir={target}"
    )
  return "give the folder that holds the data set"


def read_rows(
  path: Path, *, columns: int, header: Sequence[str] | None
) -> Iterator[Row]:
  """Yields the lines of a table; those that begin with # are comments.

  Args:
    path: CSV file, quoted where a cell has commas.
    columns: cells per line at least.
    header: names that the first line has to begin with; None is no header.

  Raises:
    ValueError: a wrong header, a short line, no lines, or not text; names the
      file and the line.
  """
  count = 0
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      reader = csv.reader(file, skipinitialspace=True, strict=True)
      for cells in reader:
        if not cells or cells[0].startswith("#"):
          continue
        cells = [cell.strip() for cell in cells]
        where = Where(path, reader.line_num)
        if header is not None:
          if cells[: len(header)] != list(header):
            raise ValueError(
              f"{where}: the columns are {', '.join(cells)}; they should begin "
              f"with {', '.join(header)}"
            )
          header = None
          continue
        if len(cells) < columns:
          raise ValueError(
            f"{where}: {len(cells)} columns; there should be {columns}"
          )
        count += 1
        yield Row(where, cells)
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} is not a CSV file: {error}") from None
  if not count:
    raise ValueError(f"{path} lists nothing")


def check_relative(path: str, where: Where | str) -> str:
  """Returns a path of a table unless it leads out of its folder.

  Raises:
    ValueError: an absolute path, "..", or characters no file name has.
  """
  parts = path.split("/")
  if set(parts) & {"", ".", ".."} or set(path) & set("\\\0\n\r:"):
    raise ValueError(
      f"{where}: {path!r} is not the name of a file in the data set"
    )
  return path


def class_index(
  label: str, index: Mapping[str, int], where: Where | str, listed_in: Path
) -> int:
  """Returns the index of a label.

  Raises:
    ValueError: the label is not listed; names the line.
  """
  if label not in index:
    raise ValueError(f"{where}: label {label!r} is not in {listed_in}")
  return index[label]


def make_source(
  clips: Iterable[Clip],
  *,
  root: Path,
  class_names: Sequence[str],
  sample_rate_hz: int,
  max_missing_fraction: float,
  name: str,
) -> sources.FileSource:
  """Makes a source of the clips that are there.

  Args:
    clips: what the table lists.
    root: folder of their paths.
    class_names: name of each class.
    sample_rate_hz: rate the clips are resampled to.
    max_missing_fraction: share of the clips that may be missing. 1 takes
      whatever is there, whichever its classes; that is what an audit does.
    name: what to call the data set in an error.

  Raises:
    DatasetNotPreparedError: none of the clips is there.
    ValueError: nothing is listed, or a clip twice; too many are missing, or
      what is there is of a single class.
  """
  clips = list(clips)
  if not clips:
    raise ValueError(f"{name}: no clip is listed")
  check_distinct(clips)
  found = [clip for clip in clips if clip.path is not None]
  missing = [clip.id for clip in clips if clip.path is None]
  check_missing(missing, len(clips), root, max_missing_fraction, name)
  labels = [clip.label for clip in found]
  if max_missing_fraction < 1:
    check_classes(labels, class_names, name)
  return sources.FileSource(
    [clip.path for clip in found],
    root=root,
    spans=None,
    labels=labels,
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
    ids=[clip.id for clip in found],
    groups=(
      None
      if any(clip.group is None for clip in found)
      else [clip.group for clip in found]
    ),
    missing=missing,
  )


def check_distinct(clips: Sequence[Clip]) -> None:
  """Raises ValueError if a clip is listed twice, naming both lines."""
  first = {}
  for clip in clips:
    other = first.setdefault(clip.id, clip)
    if other is not clip:
      raise ValueError(
        f"{clip.where}: {clip.id!r} is listed already, in {other.where}"
      )


def check_missing(
  missing: Sequence[str],
  num_listed: int,
  root: Path,
  max_missing_fraction: float,
  name: str,
) -> None:
  """Reports missing clips; raises if there are too many of them."""
  if not missing:
    return
  lost = f"{len(missing)} of {num_listed} clips of {name} are not in {root}"
  lost += f", the first is {missing[0]!r}"
  if len(missing) == num_listed:
    raise DatasetNotPreparedError(
      f"{lost}; is this the right folder?{other_formats(root)}"
    )
  if len(missing) > max_missing_fraction * num_listed:
    raise ValueError(
      f"{lost}; that is {len(missing) / num_listed:.1%}, more than "
      f"max_missing_fraction={max_missing_fraction:g} allows. List them with "
      "`python -m audiomosaic_jax.data.audit`, get them, or raise it."
      f"{other_formats(root)}"
    )
  logging.warning("%s", lost)


def other_formats(root: Path) -> str:
  """Tells of files that would be clips if they could be decoded."""
  count = sum(
    name.lower().endswith(audio_io.OTHER_SUFFIXES)
    for _, _, names in os.walk(root)
    for name in names
  )
  if not count:
    return ""
  return (
    f" It holds {count} files of formats that are not read "
    f"({' '.join(audio_io.OTHER_SUFFIXES)}); convert them with `ffmpeg -i IN "
    "-ac 1 OUT.flac`."
  )


def check_classes(
  labels: Sequence[int | tuple[int, ...]],
  class_names: Sequence[str],
  name: str,
) -> None:
  """Raises ValueError unless at least two classes occur."""
  occurring = set()
  for label in labels:
    occurring.update(label if isinstance(label, tuple) else (label,))
    if len(occurring) > 1:
      return
  only = ", ".join(class_names[i] for i in occurring) or "none"
  raise ValueError(
    f"{name}: {len(labels)} clips, all of one class ({only}) of "
    f"{len(class_names)}; nothing can be learnt or measured. Is the split or "
    "the list of labels the wrong one?"
  )
