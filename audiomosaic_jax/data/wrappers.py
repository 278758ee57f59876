"""Sources made of sources: joined, cut, cached, tolerant of bad clips.

Wrap from the inside out: Concat or Subset, then Cached, then Tolerant, so
that replacements are remembered and decoded once.
"""

import fcntl
import functools
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Sequence

import numpy as np

from audiomosaic_jax.data import audio_io
from audiomosaic_jax.data.sources import Source


class TooManyBadClipsError(RuntimeError):
  """So many clips are unusable that the data set itself must be wrong."""


class ConcatSource(Source):
  """Several sources one after the other."""

  def __init__(self, sources: Sequence[Source]):
    """Joins sources of the same classes.

    Args:
      sources: at least one.

    Raises:
      ValueError: the sources do not have the same classes.
    """
    for source in sources[1:]:
      if source.class_names != sources[0].class_names:
        raise ValueError(
          f"cannot join classes {sources[0].class_names} and "
          f"{source.class_names}; give both sources the same class_names"
        )
    self.sources = tuple(sources)
    self.class_names = sources[0].class_names
    self.multi_hot = sources[0].multi_hot
    self.ids = list(itertools.chain.from_iterable(s.ids for s in sources))
    self.missing = [name for s in sources for name in s.missing]
    if all(s.groups is not None for s in sources):
      self.groups = [name for s in sources for name in s.groups]
    self._ends = np.cumsum([len(source) for source in sources])

  @functools.cached_property
  def labels(self) -> np.ndarray:
    return np.concatenate([source.labels for source in self.sources])

  @property
  def label_sets(self) -> list[tuple[int, ...]]:
    return [labels for s in self.sources for labels in s.label_sets]

  def _find(self, index: int) -> tuple[Source, int]:
    part = int(np.searchsorted(self._ends, index, side="right"))
    start = int(self._ends[part - 1]) if part else 0
    return self.sources[part], index - start

  def path(self, index: int) -> str | None:
    source, index = self._find(index)
    return source.path(index)

  def __getitem__(self, index: int) -> dict:
    source, place = self._find(index)
    element = source[place]
    return {**element, "id": np.int32(index)}


def draw(total: int, count: int, seed: int) -> list[int]:
  """Returns so many indices of a source, rising, drawn with a seed."""
  drawn = np.random.default_rng(seed).choice(total, count, replace=False)
  return sorted(drawn.tolist())


class SubsetSource(Source):
  """Some clips of a source, in the given order."""

  def __init__(self, source: Source, indices: Sequence[int]):
    self.source = source
    self.indices = np.asarray(indices, np.int64)
    self.class_names = source.class_names
    self.multi_hot = source.multi_hot
    self.ids = [source.ids[i] for i in self.indices]
    if source.groups is not None:
      self.groups = [source.groups[i] for i in self.indices]

  @functools.cached_property
  def labels(self) -> np.ndarray:
    return self.source.labels[self.indices]

  @property
  def label_sets(self) -> list[tuple[int, ...]]:
    label_sets = self.source.label_sets
    return [label_sets[i] for i in self.indices]

  def path(self, index: int) -> str | None:
    return self.source.path(int(self.indices[index]))

  def __getitem__(self, index: int) -> dict:
    element = self.source[int(self.indices[index])]
    return {**element, "id": np.int32(index)}


class Wrapper(Source):
  """A source with the same clips as another; works across processes."""

  def __init__(self, source: Source):
    self.source = source
    self.class_names = source.class_names
    self.multi_hot = source.multi_hot
    self.ids = source.ids
    self.groups, self.missing = source.groups, source.missing
    self._lock = threading.Lock()

  @property
  def labels(self) -> np.ndarray:
    return self.source.labels

  @property
  def label_sets(self) -> list[tuple[int, ...]]:
    return self.source.label_sets

  def path(self, index: int) -> str | None:
    return self.source.path(index)

  def __getstate__(self) -> dict:
    # A worker process gets its own lock.
    return {k: v for k, v in self.__dict__.items() if k != "_lock"}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()


class ReclassedSource(Wrapper):
  """The clips of a source, under the classes of another data set."""

  def __init__(self, source: Source, class_names: Sequence[str]):
    """Wraps a source.

    Args:
      source: where clips come from.
      class_names: all of its classes, and maybe others, in any order.

    Raises:
      ValueError: the source has a class that is not among them.
    """
    super().__init__(source)
    unknown = [n for n in source.class_names if n not in class_names]
    if unknown:
      raise ValueError(
        f"{source!r} has the classes {unknown}, which are not among "
        f"{[*class_names]}; give the classes the same names"
      )
    self.class_names = tuple(class_names)
    self._new = [self.class_names.index(n) for n in source.class_names]

  @functools.cached_property
  def labels(self) -> np.ndarray:
    old = self.source.labels
    if old.ndim == 1:
      # -1 is a clip without a label.
      return np.where(old < 0, old, np.asarray(self._new, old.dtype)[old])
    new = np.zeros((len(old), len(self.class_names)), old.dtype)
    new[:, self._new] = old
    return new

  @property
  def label_sets(self) -> list[tuple[int, ...]]:
    return [tuple(self._new[i] for i in s) for s in self.source.label_sets]

  def __getitem__(self, index: int) -> dict:
    element = self.source[index]
    # By the clip that it holds, which may be a replacement.
    return {**element, "label": self.labels[int(element["id"])]}


class CachedSource(Wrapper):
  """Keeps decoded clips in memory as 16-bit integers, up to a limit.

  What is in stays in: every epoch visits each clip once, so replacing the
  oldest would never hit. Threads share the memory; worker processes do not.
  The waveforms are rounded to 16 bits whether they come from the cache or
  not, so that the cache changes nothing but the speed. Do not write to them.
  """

  def __init__(self, source: Source, *, limit_bytes: int):
    """Wraps a source.

    Args:
      source: where clips come from.
      limit_bytes: memory for samples; 0 caches nothing.
    """
    super().__init__(source)
    self.limit_bytes = limit_bytes
    self.used_bytes = 0
    self._clips = {}

  def __getitem__(self, index: int) -> dict:
    index = int(index)
    element = self._clips.get(index)
    if element is None:
      element = self.source[index]
      pcm = audio_io.as_pcm16(element["waveform"])
      element = {**element, "waveform": pcm}
      with self._lock:
        fits = self.used_bytes + pcm.nbytes <= self.limit_bytes
        if fits and index not in self._clips:
          self._clips[index] = element
          self.used_bytes += pcm.nbytes
    return dict(element)

  def __getstate__(self) -> dict:
    # A worker process starts with an empty cache of its own.
    return {**super().__getstate__(), "_clips": {}, "used_bytes": 0}


class TolerantSource(Wrapper):
  """Replaces a clip that cannot be used by the next one that can.

  Replacing, not skipping: the clip behind every position of every batch is
  then the same for any number of processes, threads and workers. The element
  carries the id of the clip it really holds.
  """

  def __init__(
    self,
    source: Source,
    *,
    max_bad_fraction: float,
    report_path: str | os.PathLike | None,
  ):
    """Wraps a source.

    Args:
      source: where clips come from.
      max_bad_fraction: share of the source that may be bad.
      report_path: JSON-lines file that gets {"id", "path", "reason"} of each
        bad clip, once, also over several runs; None keeps no file.
    """
    super().__init__(source)
    self.max_bad_fraction = max_bad_fraction
    self.report_path = report_path and pathlib.Path(report_path)
    self._bad = {}

  @property
  def num_bad(self) -> int:
    """How many distinct bad clips were met so far, in this process."""
    return len(self._bad)

  def __getitem__(self, index: int) -> dict:
    """Decodes clip `index`, or the next good one.

    Raises:
      TooManyBadClipsError: more than `max_bad_fraction` of the clips are bad.
    """
    for step in range(len(self)):
      candidate = (int(index) + step) % len(self)
      if candidate in self._bad:
        continue
      try:
        return self.source[candidate]
      except audio_io.BadClipError as error:
        self._record(candidate, error)
    raise TooManyBadClipsError(f"none of {len(self)} clips can be decoded")

  def _record(self, index: int, error: audio_io.BadClipError) -> None:
    """Counts and reports a bad clip; gives up when there are too many."""
    with self._lock:
      if index not in self._bad:
        self._bad[index] = error.reason
        if self.report_path:
          _append_once(
            self.report_path,
            {"id": index, "path": error.path, "reason": error.reason},
          )
      num_bad = len(self._bad)
    allowed = self.max_bad_fraction * len(self)
    if num_bad > allowed:
      where = f", see {self.report_path}" if self.report_path else ""
      raise TooManyBadClipsError(
        f"{num_bad} of {len(self)} clips are bad, more than max_bad_fraction="
        f"{self.max_bad_fraction:g} allows ({int(allowed)}){where}. The last "
        f"is {error}. Repair or remove them, or raise max_bad_fraction."
      ) from error


def _append_once(path: pathlib.Path, record: dict) -> None:
  """Appends a JSON line unless a line for the same path is already there.

  The lock is on the file, so that several processes can share it.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "ab+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    *lines, half = file.read().split(b"\n")
    # A full disk leaves a line without its end; the next must not follow it.
    file.truncate(file.tell() - len(half))
    known = {json.loads(line)["path"] for line in lines}
    if record["path"] not in known:
      file.write(json.dumps(record).encode() + b"\n")
