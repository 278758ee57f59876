"""A job of preparing audio: what, how, and in which shards.

  OUTPUT/NAME-train.array_record-00007-of-00120  the clips of a shard
  OUTPUT/_prepare/job.json                       how, and of what
  OUTPUT/_prepare/clips.jsonl                    the clips, shard after shard
  OUTPUT/_prepare/train-00007.json               a shard is complete; what of it

So whoever knows the folder can write a shard, on any machine, and what was
complete before a kill is complete after it.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import fsspec
import numpy as np
import soundfile
from etils import epath

from audiomosaic_jax.data import storage
from audiomosaic_jax.data.prepare_clips import Clip, Inputs

FORMATS = ("flac", "int16")
FILE_FORMAT = "array_record"
# Bytes of a second of speech or music as FLAC, for each as integers.
FLAC_RATIO = 0.6
# Clips looked at to know how long the others are.
NUM_PROBED = 64
# So many shards, if they have so many clips, for as many processes.
MIN_SHARDS, MIN_SHARD_CLIPS = 32, 64


@dataclasses.dataclass(frozen=True)
class Settings:
  """How clips are stored.

  Attributes:
    format: "flac" or "int16".
    sample_rate_hz: their rate.
    num_frames: length of the filter bank that an encoder sees, for the
      statistics.
    shard_mb: size of a shard, about, in 10^6 bytes.
    num_shards: of each split; None is by size.
    seed: of the order of the clips.
  """

  format: str
  sample_rate_hz: int
  num_frames: int
  shard_mb: float
  num_shards: int | None
  seed: int

  def __post_init__(self):
    if self.format not in FORMATS:
      raise ValueError(f"format={self.format!r}; choose {', '.join(FORMATS)}")
    if self.shard_mb <= 0 or (self.num_shards or 1) < 1:
      raise ValueError(
        f"shard_mb={self.shard_mb:g}, num_shards={self.num_shards}: shards "
        "need a size and a number above 0"
      )


class Shard(NamedTuple):
  """A file of a split: which of how many, and its lines in the list."""

  split: str
  number: int
  total: int
  first_byte: int
  num_bytes: int
  num_clips: int


@dataclasses.dataclass(frozen=True)
class Job:
  """A job that was opened, here or on another machine.

  Attributes:
    folder: of the data set.
    about: the content of job.json.
  """

  folder: epath.Path
  about: Mapping

  @functools.cached_property
  def settings(self) -> Settings:
    return Settings(**self.about["settings"])

  @functools.cached_property
  def shards(self) -> list[Shard]:
    return [Shard(*fields) for fields in self.about["shards"]]

  @property
  def class_names(self) -> list[str]:
    return self.about["class_names"]

  @property
  def multi_hot(self) -> bool:
    return self.about["multi_hot"]

  @property
  def name(self) -> str:
    """Name of the data set, as TFDS wants it."""
    folder = self.folder
    if re.fullmatch(r"\d+\.\d+\.\d+", folder.name):
      folder = folder.parent
    name = re.sub(r"\W+", "_", folder.name.lower()).strip("_")
    return name if name[:1].isalpha() else f"audio_{name}".strip("_")

  @property
  def version(self) -> str:
    """The folder, if it is called like one, as TFDS lays out data sets."""
    is_version = re.fullmatch(r"\d+\.\d+\.\d+", self.folder.name)
    return self.folder.name if is_version else "1.0.0"

  def records(self, shard: Shard) -> epath.Path:
    """Returns the file of a shard, named as TFDS names it."""
    number = f"{shard.number:05d}-of-{shard.total:05d}"
    return self.folder / f"{self.name}-{shard.split}.{FILE_FORMAT}-{number}"

  def report(self, shard: Shard) -> epath.Path:
    """Returns the file that says a shard is complete, and what of it."""
    return notes(self.folder) / f"{shard.split}-{shard.number:05d}.json"

  def missing(self) -> list[int]:
    """Returns the shards that are not complete, as indices."""
    present = _names(self.folder)
    return [
      i
      for i, shard in enumerate(self.shards)
      if not {self.report(shard).name, self.records(shard).name} <= present
    ]

  def clips(self, shard: Shard) -> list[Clip]:
    """Returns the clips of a shard."""
    with (notes(self.folder) / "clips.jsonl").open("rb") as file:
      file.seek(shard.first_byte)
      lines = file.read(shard.num_bytes).splitlines()
    return [Clip(*json.loads(line)) for line in lines]


def notes(folder: epath.Path) -> epath.Path:
  """Returns the folder of what is known of a job."""
  return folder / "_prepare"


def _names(folder: epath.Path) -> set[str]:
  """Returns the names of the files of a job, and others in its folders."""
  if not storage.is_remote(folder):
    folders = [f for f in (folder, notes(folder)) if f.exists()]
    return {path.name for f in folders for path in f.iterdir()}
  # A client of its own, as that of epath would keep the list, and not know of
  # what workers write later.
  system, path = fsspec.core.url_to_fs(os.fspath(folder))
  system.invalidate_cache()
  return {name.rpartition("/")[2] for name in system.find(path)}


def read_job(folder: epath.Path) -> Job:
  """Returns a job that was opened before."""
  about = json.loads((notes(folder) / "job.json").read_text())
  return Job(folder, about)


def open_job(folder: epath.Path, inputs: Inputs, settings: Settings) -> Job:
  """Makes the folder of a job, or finds that it is of the same one.

  Args:
    folder: of the data set.
    inputs: what is to be stored.
    settings: how.

  Raises:
    FileExistsError: it has something else in it.
    ValueError: it has another job; says in what it differs.
  """
  lines, shards = [], []
  for split, clips in inputs.clips.items():
    shards += _cut(split, clips, settings, lines)
  text = "".join(lines)
  about = {
    "inputs": inputs.described,
    "settings": dataclasses.asdict(settings),
    "class_names": list(inputs.class_names),
    "multi_hot": inputs.multi_hot,
    "num_clips": {split: len(clips) for split, clips in inputs.clips.items()},
    "clips_sha256": hashlib.sha256(text.encode()).hexdigest(),
    "shards": [list(shard) for shard in shards],
  }
  path = notes(folder) / "job.json"
  if path.exists():
    old = json.loads(path.read_text())
    _check_same(folder, old, about)
    # Its cut, as that of today may be another: it follows from the lengths of
    # some files, and those may have been mended in the meantime.
    return Job(folder, old)
  if any(
    FILE_FORMAT in name or name == "dataset_info.json"
    for name in _names(folder)
  ):
    raise FileExistsError(
      f"{folder} has a data set that no job of this command is known of; "
      "delete it or choose another --output"
    )
  if not storage.is_remote(folder):  # In a bucket, folders are but names.
    notes(folder).mkdir(parents=True, exist_ok=True)
  storage.write_text(notes(folder) / "clips.jsonl", text)
  # Last, as it says that the list is complete.
  storage.write_text(path, json.dumps(about, indent=1) + "\n")
  return Job(folder, about)


def _check_same(folder: epath.Path, old: dict, new: dict) -> None:
  """Raises ValueError if a job is not the one that was begun."""
  flat = [{**about, **about["settings"]} for about in (old, new)]
  # Most telling first: what follows from it comes after it.
  for name in (
    *(field.name for field in dataclasses.fields(Settings)),
    *("inputs", "num_clips", "class_names", "multi_hot", "clips_sha256"),
  ):
    was, is_now = (about[name] for about in flat)
    if was != is_now:
      raise ValueError(
        f"{folder} has another job: {name} was {was!r}, is now {is_now!r}; "
        "give the same inputs and settings to go on with it, or another "
        "--output"
      )


def _cut(
  split: str, clips: Sequence[Clip], settings: Settings, lines: list[str]
) -> list[Shard]:
  """Cuts a split into shards of clips in random order; adds their lines."""
  order = np.random.default_rng(settings.seed).permutation(len(clips))
  total = settings.num_shards or _count(clips, order, settings)
  total = max(1, min(total, len(clips)))
  shards = []
  position = sum(len(line) for line in lines)
  for number, part in enumerate(np.array_split(order, total)):
    # ASCII, so that characters are bytes.
    added = [json.dumps(clips[i]) + "\n" for i in part]
    size = sum(len(line) for line in added)
    shards.append(Shard(split, number, total, position, size, len(part)))
    position += size
    lines += added
  return shards


def _count(clips: Sequence[Clip], order: np.ndarray, settings: Settings) -> int:
  """Returns how many shards have about the size that is wanted."""
  seconds = [_seconds(clips[i]) for i in order[:NUM_PROBED]]
  known = [s for s in seconds if s is not None]
  mean_s = sum(known) / len(known) if known else 0.0
  clip_bytes = 2 * mean_s * settings.sample_rate_hz
  if settings.format == "flac":
    clip_bytes *= FLAC_RATIO
  by_size = len(clips) * clip_bytes / (1e6 * settings.shard_mb)
  enough = min(MIN_SHARDS, len(clips) // MIN_SHARD_CLIPS)
  return max(round(by_size), enough)


def _seconds(clip: Clip) -> float | None:
  """Returns how long a clip is by its header; None if that is not known."""
  if clip.end_s is not None:
    return clip.end_s - clip.start_s
  try:
    audio = clip.audio()
    is_path = isinstance(audio, str)
    return soundfile.info(
      os.fsencode(audio) if is_path else io.BytesIO(audio)
    ).duration
  except (OSError, ValueError, RuntimeError):
    return None
