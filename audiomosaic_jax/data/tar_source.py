"""Clips inside .tar archives, read where they lie; nothing is extracted.

The name of a member names a clip and never becomes a path, so an archive
cannot reach a file beside it, whatever its names are.
"""

import itertools
import os
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from audiomosaic_jax.data import audio_io, sources


class Member(NamedTuple):
  """A file in an archive: where its bytes are, and how many."""

  name: str
  archive: str
  offset: int
  size: int


class TarSource(sources.Source):
  """Audio files in archives; the class is the first folder below `root`."""

  multi_hot = False

  def __init__(
    self, members: Sequence[Member], *, root: str, sample_rate_hz: int
  ):
    """Holds one row per member.

    Args:
      members: from `list_audio`.
      root: folder in the archives that holds those of the classes; "" is none.
        Of all splits, see `shared_folder`.
      sample_rate_hz: rate the clips are resampled to.

    Raises:
      ValueError: one name in two archives.
    """
    first = {}
    for member in members:
      other = first.setdefault(member.name, member)
      if other is not member:
        raise ValueError(
          f"{member.name!r} is in {other.archive} and in {member.archive}; "
          "give them to different splits, or remove one"
        )
    self.members = members
    self.sample_rate_hz = sample_rate_hz
    self.ids = [member.name for member in members]
    prefix = f"{root}/" if root else ""
    below = [name.removeprefix(prefix) for name in self.ids]
    folders = [name.split("/")[0] if "/" in name else "" for name in below]
    self.class_names = tuple(sorted(set(folders) - {""}))
    index = {name: i for i, name in enumerate(self.class_names)}
    self._labels = [index.get(f, sources.UNLABELLED) for f in folders]

  @property
  def labels(self) -> np.ndarray:
    return np.asarray(self._labels, np.int32)

  def __getitem__(self, index: int) -> dict:
    member = self.members[index]
    waveform = audio_io.load_audio(
      read(member.archive, member.offset, member.size, name=member.name),
      sample_rate_hz=self.sample_rate_hz,
      name=member.name,
    )
    label = np.int32(self._labels[index])
    return {"waveform": waveform, "label": label, "id": np.int32(index)}


def list_audio(archive: sources.Path) -> list[Member]:
  """Returns the audio files of an archive, sorted by name.

  Links, devices, sparse and hidden files are left out. Of a name that occurs
  twice the last counts, as it does when an archive is extracted.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a .tar file, or one that is cut short.
  """
  archive = os.path.abspath(os.path.expanduser(archive))
  found = {}
  try:
    with tarfile.open(archive, "r:") as file:
      bar = tqdm.tqdm(file, desc=os.path.basename(archive), unit=" files")
      for member in bar:
        name = member.name.removeprefix("./")
        hidden = name.rpartition("/")[2].startswith(".")
        audio = name.lower().endswith(sources.AUDIO_SUFFIXES)
        if member.isreg() and not member.issparse() and audio and not hidden:
          place = member.offset_data, member.size
          found[name] = Member(name, archive, *place)
  except tarfile.TarError as error:
    raise ValueError(
      f"{archive} is not a .tar file that can be read in place, or is cut "
      f"short: {error}; get it again, or decompress it: `gunzip FILE`"
    ) from None
  return [found[name] for name in sorted(found)]


def read(archive: str, offset: int, size: int, *, name: str) -> bytes:
  """Returns the bytes of a member.

  Args:
    archive: path of the file.
    offset: where the member begins.
    size: its bytes.
    name: what to call it in an error.

  Raises:
    BadClipError: the archive is gone, or shorter than that.
  """
  try:
    with open(archive, "rb") as file:
      file.seek(offset)
      content = file.read(size)
  except FileNotFoundError:
    raise audio_io.BadClipError(name, "no such file") from None
  if len(content) < size:
    raise audio_io.BadClipError(
      name, f"truncated: {len(content)} of {size} bytes are in {archive}"
    )
  return content


def shared_folder(members: Sequence[Member]) -> str:
  """Returns the folder that holds all members, "" if there is none.

  An archive of a folder has one, and it is no class.
  """
  folders = [member.name.split("/")[:-1] for member in members]
  if not folders:
    return ""
  # What the first and the last in order share, all share.
  pairs = zip(min(folders), max(folders), strict=False)
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
  return "/".join(name for name, _ in same)
