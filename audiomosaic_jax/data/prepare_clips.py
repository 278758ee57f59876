"""The clips to prepare as rows: a line of JSON says where the sound is.

Rows are all that a worker on another machine needs to know.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from audiomosaic_jax.data import audio_io, sources, tar_source, wrappers

# TFDS takes "all" for all splits.
RESERVED = "all"


class Clip(NamedTuple):
  """One clip.

  Attributes:
    index: its place in the input.
    name: its id.
    path: the file it is in.
    start_s: where it begins in the file; None is the beginning.
    end_s: where it ends; None is the end.
    offset: where its bytes begin, if the file is an archive.
    size: how many they are.
    label: a class index, -1 without a label, or a list of them.
  """

  index: int
  name: str
  path: str
  start_s: float | None
  end_s: float | None
  offset: int | None
  size: int | None
  label: int | list[int]

  def audio(self) -> str | bytes:
    """Returns the file with the sound: its path, or its bytes."""
    if self.offset is not None:
      return tar_source.read(self.path, self.offset, self.size, name=self.name)
    if "://" not in self.path:
      return self.path
    try:
      return epath.Path(self.path).read_bytes()
    except FileNotFoundError:
      raise audio_io.BadClipError(self.name, "no such file") from None

  def load(self, sample_rate_hz: int) -> np.ndarray:
    """Returns the samples; raises audio_io.BadClipError."""
    return audio_io.load_audio(
      self.audio(),
      sample_rate_hz=sample_rate_hz,
      start_s=self.start_s,
      end_s=self.end_s,
      name=self.name,
    )


class Inputs(NamedTuple):
  """All that is to be prepared.

  Attributes:
    described: what was asked for, in words that another run can compare.
    clips: rows of each split.
    missing: names of each split that are listed, but in no file.
    class_names: of all splits.
    multi_hot: whether a clip can have several labels.
  """

  described: list[str]
  clips: dict[str, list[Clip]]
  missing: dict[str, list[str]]
  class_names: tuple[str, ...]
  multi_hot: bool


def collect(
  described: Sequence[str], splits: Mapping[str, sources.Source]
) -> Inputs:
  """Returns the rows of sources, all with the union of their classes."""
  for name in splits:
    if not re.fullmatch(r"\w+", name) or name == RESERVED:
      raise ValueError(
        f"{name!r} cannot be the name of a split (letters, digits and _; not "
        f"{RESERVED!r}); give it another: --input=NAME=PATH or "
        "--split=NAME=SPLIT"
      )
  named = {s.class_names for s in splits.values() if s.class_names}
  if len(named) == 1:
    class_names = named.pop()
  else:
    class_names = tuple(sorted({name for names in named for name in names}))
  multi_hot = any(source.multi_hot for source in splits.values())
  return Inputs(
    described=list(described),
    clips={
      split: list(_rows(source, class_names, multi_hot))
      for split, source in splits.items()
    },
    missing={split: list(source.missing) for split, source in splits.items()},
    class_names=class_names,
    multi_hot=multi_hot,
  )


def _rows(
  source: sources.Source, class_names: tuple[str, ...], multi_hot: bool
) -> Iterable[Clip]:
  new = [class_names.index(name) for name in source.class_names]
  labels = source.label_sets
  for index, place in enumerate(_places(source)):
    own = [new[i] for i in labels[index]]
    if not multi_hot:
      own = own[0] if own else sources.UNLABELLED
    yield Clip(index, source.ids[index], *place, own)


def _places(source: sources.Source) -> Iterable[tuple]:
  """Yields the path, span, offset and size of every clip of a source."""
  if isinstance(source, wrappers.ConcatSource):
    for part in source.sources:
      yield from _places(part)
  elif isinstance(source, tar_source.TarSource):
    for member in source.members:
      yield member.archive, None, None, member.offset, member.size
  else:
    for index in range(len(source)):
      span = (None, None)
      if source.spans is not None:
        span = source.spans[index].tolist()
      yield absolute(source.path(index)), *span, None, None


def absolute(path: str) -> str:
  """Returns a path that means the same on other machines and days."""
  return path if "://" in path else os.path.abspath(path)
