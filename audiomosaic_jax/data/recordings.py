"""Recordings to embed, from a folder, a glob or a table, and how to read them.

They may be short or last for hours: what is short is decoded ahead of its turn
by several threads, what is long block by block.
"""

import csv
import glob
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from audiomosaic_jax.data import audio_io, sources, tables
from audiomosaic_jax.data.parallel import parallel_map

# Decoded as a whole, ahead of its turn; longer ones block by block.
SHORT_S = 60.0


class Recording(NamedTuple):
  """A file, or a part of one.

  Attributes:
    id: its path as it was found or listed, and its part if it is one.
    path: of the file.
    start_s: where it begins; None is the beginning of the file.
    end_s: where it ends; None is the end of the file.
  """

  id: str
  path: str
  start_s: float | None
  end_s: float | None


def find(where: str) -> list[Recording]:
  """Returns the recordings that a name stands for, in a lasting order.

  Args:
    where: a folder, searched with its sub-folders; one audio file; a pattern
      such as "sites/*/*.wav" ("**" for any folders); or a CSV file with a
      column `path`, relative to the file's folder or absolute, and maybe
      `start_s` and `end_s`.

  Raises:
    FileNotFoundError: nothing of that name, or no recording in it.
    ValueError: a table without such a column, or with the same row twice.
  """
  path = pathlib.Path(where).expanduser()
  if path.is_dir():
    names = sources.list_audio(path)
    found = [Recording(n, str(path / n), None, None) for n in names]
  elif path.suffix.lower() == ".csv":
    found = _from_table(path)
  elif path.exists():
    found = [Recording(path.name, str(path), None, None)]
  else:
    names = sorted(set(glob.glob(str(path), recursive=True)))
    found = [
      Recording(name, name, None, None)
      for name in names
      if name.lower().endswith(sources.AUDIO_SUFFIXES)
    ]
  if not found:
    raise FileNotFoundError(
      f"{where}: no audio there ({' '.join(sources.AUDIO_SUFFIXES)}); give a "
      "folder, a pattern in quotes, or a CSV with a column path"
    )
  return found


def _from_table(path: pathlib.Path) -> list[Recording]:
  """Returns the recordings that a CSV file lists."""
  try:
    rows = tables.read_csv(path, ["path"])
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} is not a CSV file: {error}") from None
  spans = tables.read_spans(path, rows) or [(None, None)] * len(rows)
  found, seen = [], {}
  for (line, row), (start_s, end_s) in zip(rows, spans, strict=True):
    name = row["path"]
    if start_s is not None:
      name += f"#{start_s:.3f}-{end_s:.3f}"
    if name in seen:
      raise ValueError(f"{path}, line {line}: {name} is also in {seen[name]}")
    seen[name] = f"line {line}"
    file = str(path.parent / row["path"])
    found.append(Recording(name, file, start_s, end_s))
  return found


def fingerprint(recordings: Sequence[Recording]) -> str:
  """Returns what tells recordings from others: where, how long, how old."""
  digest = hashlib.sha256()
  for recording in recordings:
    path = os.path.realpath(recording.path)
    try:
      about = os.stat(path)
      state = (about.st_size, about.st_mtime_ns)
    except OSError:
      state = None  # Reading it will say what is wrong.
    line = f"{recording.id}\n{path}\n{state}\n"
    digest.update(line.encode(errors="surrogateescape"))
  return digest.hexdigest()


def read(
  recordings: Iterable[Recording], *, sample_rate_hz: int, num_threads: int
) -> Iterator[Iterable[np.ndarray]]:
  """Yields the samples of each recording as blocks, in order.

  What is wrong with a recording is raised when its blocks are read, as
  `audio_io.BadClipError`, so that the others can go on.

  Args:
    recordings: what to read.
    sample_rate_hz: rate of the samples.
    num_threads: how many are decoded at once.
  """

  def blocks(recording):
    try:
      return _blocks(recording, sample_rate_hz)
    except audio_io.BadClipError as error:
      return _raise(error)

  return parallel_map(blocks, recordings, num_threads)


def _blocks(recording: Recording, sample_rate_hz: int) -> Iterable[np.ndarray]:
  _, path, start_s, end_s = recording
  stream = audio_io.stream_audio(
    path,
    sample_rate_hz=sample_rate_hz,
    block_s=SHORT_S,
    start_s=start_s,
    end_s=end_s,
    name=recording.id,
  )
  try:
    duration_s = audio_io.duration_s(path)
  except audio_io.BadClipError:
    duration_s = 0.0  # The stream will say what is wrong.
  if start_s is not None:
    duration_s = min(duration_s, end_s) - start_s
  return list(stream) if duration_s <= SHORT_S else stream


def _raise(error: Exception) -> Iterator[np.ndarray]:
  raise error
  yield


def segments(
  blocks: Iterable[np.ndarray], size: int, hop: int, min_size: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Cuts a recording into segments of equal length.

  Args:
    blocks: its samples in order.
    size: samples of a segment; the last has what is left.
    hop: samples from one to the next, at most `size`.
    min_size: a last one with fewer samples is left out, unless it is the only
      one.

  Yields:
    (index of the first sample, samples).
  """
  buffer, start = np.zeros(0, np.float32), 0
  for block in itertools.chain(blocks, [None]):
    if block is not None:
      buffer = np.concatenate([buffer, block])
    while len(buffer) >= size:
      yield start, buffer[:size]
      buffer, start = buffer[hop:], start + hop
  # Of an overlap, the segment before has seen all but its last `hop` samples.
  unseen = len(buffer) - (size - hop if start else 0)
  if not start or unseen >= min_size:
    yield start, buffer
