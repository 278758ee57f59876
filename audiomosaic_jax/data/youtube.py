"""Clips named after the YouTube video and the second they were cut at.

The data sets publish lists only, so every copy names its files as the tool
that downloaded them did, and 10 to 30 % of the videos are gone.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from audiomosaic_jax.data import layout

VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}")

# [Y]<id>[_<start>[_<end>]]; an id may itself begin with Y or hold "_".
FILE_NAME = re.compile(
  rf"Y?(?P<id>{VIDEO_ID.pattern})"
  r"(?:_(?P<start>\d+(?:\.\d+)?)(?:_\d+(?:\.\d+)?)?)?"
)


class File(NamedTuple):
  """A file; start is the number in its name, None without one."""

  start: str | None
  path: str


class Files:
  """The audio files of a folder by video and start."""

  def __init__(self, paths: Iterable[str]):
    """Reads the names.

    Args:
      paths: files, sorted; of several for one clip the first is taken.
        Understood are Y<id>.wav, <id>.flac, <id>_<start>_<end>.wav and
        <id>_<start>.ogg, with the start in seconds or in milliseconds, and
        with leading zeros. Other names are left alone.
    """
    self._by_id = {}
    for path in paths:
      stem = path.rpartition("/")[2].rpartition(".")[0]
      name = FILE_NAME.fullmatch(stem)
      if name is not None:
        file = File(name["start"], path)
        self._by_id.setdefault(name["id"], []).append(file)

  def find(self, video_id: str, start_s: float, *, alone: bool) -> str | None:
    """Returns the file of a clip, or None.

    Args:
      video_id: YouTube id.
      start_s: where the clip starts. A file whose name gives another start is
        another part of the video.
      alone: whether it is the only clip of its video; if not, a file whose
        name gives no start could be any of them and is not taken.
    """
    files = self._by_id.get(video_id, ())
    for file in files:
      if file.start is not None and _is_start(file.start, start_s):
        return file.path
    for file in files:
      if file.start is None and alone:
        return file.path
    return None


def _is_start(text: str, start_s: float) -> bool:
  """Whether the number in a name is this start, in seconds or ms."""
  start_ms = round(1000 * start_s)
  if "." in text:
    return round(1000 * float(text)) == start_ms
  return int(text) in (int(start_s), start_ms)


def check_id(text: str, where: layout.Where) -> str:
  """Returns a video id, or raises ValueError that names the line."""
  if not VIDEO_ID.fullmatch(text):
    raise ValueError(f"{where}: {text!r} is not a YouTube id")
  return text


def read_seconds(text: str, where: layout.Where) -> float:
  """Returns a time of a table, or raises ValueError that names the line."""
  try:
    seconds = float(text)
  except ValueError:
    seconds = -1.0
  if not 0 <= seconds < float("inf"):
    raise ValueError(f"{where}: {text!r} is not a time in seconds")
  return seconds
