"""Clips with captions that people wrote: tables of AudioCaps, Clotho, your own.

Clotho      file_name,caption_1,...,caption_5      a clip per line
AudioCaps   youtube_id,start_time,caption          a caption per line
your own    path,caption                           a caption per line
"""

import csv
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from audiomosaic_jax.data import layout, youtube
from audiomosaic_jax.data.sources import AUDIO_SUFFIXES

FORMS = (
  ("file_name", "caption_1"),
  ("youtube_id", "start_time", "caption"),
  ("path", "caption"),
)


class Captioned(NamedTuple):
  """A clip.

  Attributes:
    path: of its file.
    captions: what people wrote.
  """

  path: str
  captions: tuple[str, ...]


def read(table: str, folder: str) -> tuple[list[Captioned], int]:
  """Reads a table of captions.

  Args:
    table: a CSV file in one of the forms above.
    folder: where its clips are; "" takes the paths of a table of your own as
      they are.

  Returns:
    The clips that are there, and how many are not.

  Raises:
    FileNotFoundError: there is no table, or none of its clips.
    ValueError: it has other columns, and says which; or names files without
      a folder.
  """
  path = pathlib.Path(table).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; give a table of captions")
  root = pathlib.Path(folder).expanduser()
  with path.open(encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file)
    columns = reader.fieldnames or ()
    form = next((f for f in FORMS if set(f) <= set(columns)), None)
    if form is None:
      raise ValueError(
        f"{path} has the columns {', '.join(columns)}; it needs those of one "
        f"of {FORMS}"
      )
    rows = list(reader)
  if not folder and form != FORMS[-1]:
    raise ValueError(
      f"{path} names clips, not paths, and the folder is ''; set the folder to "
      "the one that holds them"
    )
  captions = _READERS[FORMS.index(form)](rows, root, path)
  found = [clip for clip in captions if pathlib.Path(clip.path).is_file()]
  if not found:
    raise FileNotFoundError(
      f"none of {len(captions)} clips of {path} are in {root}; set the folder "
      "to the one that holds them"
    )
  return found, len(captions) - len(found)


def _clotho(rows: Iterable[Mapping], root: pathlib.Path, table: pathlib.Path):
  del table
  return [
    Captioned(
      str(root / pathlib.PurePath(row["file_name"]).name),
      tuple(
        text
        for name, text in row.items()
        if name and name.startswith("caption_") and text
      ),
    )
    for row in rows
  ]


def _audiocaps(
  rows: Iterable[Mapping], root: pathlib.Path, table: pathlib.Path
):
  grouped: dict[tuple[str, float], list[str]] = {}
  for line, row in enumerate(rows, 2):
    where = layout.Where(str(table), line)
    start_s = youtube.read_seconds(row["start_time"], where)
    video = youtube.check_id(row["youtube_id"], where)
    grouped.setdefault((video, start_s), []).append(row["caption"])
  files = youtube.Files(
    sorted(
      str(path)
      for path in root.rglob("*")
      if path.suffix.lower() in AUDIO_SUFFIXES
    )
  )
  count: dict[str, int] = {}
  for video, _ in grouped:
    count[video] = count.get(video, 0) + 1
  return [
    Captioned(
      files.find(video, start_s, alone=count[video] == 1) or "",
      tuple(captions),
    )
    for (video, start_s), captions in grouped.items()
  ]


def _own(rows: Iterable[Mapping], root: pathlib.Path, table: pathlib.Path):
  grouped: dict[str, list[str]] = {}
  for line, row in enumerate(rows, 2):
    if root != pathlib.Path():
      layout.check_relative(row["path"], layout.Where(str(table), line))
    grouped.setdefault(str(root / row["path"]), []).append(row["caption"])
  return [Captioned(path, tuple(texts)) for path, texts in grouped.items()]


# In the order of FORMS.
_READERS = (_clotho, _audiocaps, _own)
