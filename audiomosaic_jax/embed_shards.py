"""Embeddings of many recordings, shard by shard, as Parquet files.

A shard is a stretch of the list of recordings and becomes one file, which
appears under its name when it is complete:

  out.parquet/part-00007-of-00120.parquet
  out.parquet/_bad-00007-of-00120.jsonl     recordings that have no sound
  out.parquet/_about.json                   of what, by which encoder

So what is there is finished, and several processes or machines can work on
shards of their own. Readers of Parquet take the folder as one table.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from audiomosaic_jax import embed_program, encoder_files, files
from audiomosaic_jax.data import audio_io, recordings
from audiomosaic_jax.embedding import Embedding
from audiomosaic_jax.encoder import Encoder

ABOUT_FILE = "_about.json"
LIST_FILE = "_recordings.jsonl"


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is computed of each recording.

  Attributes:
    encoder: path of the encoder.
    dtype: of matrix products.
    batch_size: windows computed at once.
    frames: a row for every frame, not for every recording.
    hop_ms: from one frame to the next; None is that of the patches.
    overlap: part of a window that the next one sees again.
    segment_s: length of the parts that are embedded by themselves; 0 is whole
      recordings.
    segment_hop_s: from one such part to the next.
    num_threads: recordings decoded at once.
  """

  encoder: str
  dtype: str
  batch_size: int
  frames: bool
  hop_ms: float | None
  overlap: float
  segment_s: float
  segment_hop_s: float
  num_threads: int

  def __post_init__(self):
    if self.segment_hop_s and not self.segment_s:
      raise ValueError(
        f"segment_hop_s is {self.segment_hop_s:g} but segment_s is 0, whole "
        "recordings; give segment_s too, or leave out segment_hop_s"
      )
    if self.segment_s and not 0 < self.segment_hop_s <= self.segment_s:
      raise ValueError(
        f"segment_hop_s is {self.segment_hop_s:g}; use more than 0 and at most "
        f"the {self.segment_s:g} s of a segment, or sound would be left out"
      )


class Part(NamedTuple):
  """A recording, or a segment of one.

  Attributes:
    id: of the recording.
    start_s: where it begins.
    end_s: where it ends.
    out: what the encoder says of it.
  """

  id: str
  start_s: float
  end_s: float
  out: Embedding


# Fields that change no number beyond rounding.
NOT_OF_A_RESULT = ("encoder", "batch_size", "num_threads")


@functools.lru_cache(1)
def load_encoder(settings: Settings) -> Encoder:
  """Returns the encoder of a job, which a process loads once."""
  return encoder_files.load_encoder(
    settings.encoder, dtype=settings.dtype, batch_size=settings.batch_size
  )


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be embedded, and where to.

  Attributes:
    folder: of the Parquet files.
    settings: what is computed.
    recordings: of what, in an order that lasts.
    shard_size: recordings of a file.
  """

  folder: pathlib.Path
  settings: Settings
  recordings: Sequence[recordings.Recording]
  shard_size: int

  @property
  def shards(self) -> list[range]:
    """The recordings of each shard, as indices."""
    total = len(self.recordings)
    return [
      range(start, min(start + self.shard_size, total))
      for start in range(0, total, self.shard_size)
    ]

  def part(self, shard: int) -> pathlib.Path:
    """Returns the file of a shard."""
    return self.folder / f"part-{self._number(shard)}.parquet"

  def missing(self) -> list[int]:
    """Returns the shards that are not there."""
    return [i for i in range(len(self.shards)) if not self.part(i).exists()]

  def bad(self) -> list[dict[str, str]]:
    """Returns "id" and "reason" of every recording that was left out."""
    return [
      json.loads(line)
      for shard in range(len(self.shards))
      for line in self._bad(shard).read_text().splitlines()
    ]

  def open(self) -> None:
    """Makes the folder, or finds that it is of the same job.

    Raises:
      ValueError: it has the results of another job, or the encoder has no
        such hop or overlap; nothing is then written.
    """
    encoder = load_encoder(self.settings)
    encoder.hops(self.settings.hop_ms, self.settings.overlap)
    values = dataclasses.asdict(self.settings)
    about = {
      "encoder_fingerprint": embed_program.fingerprint(
        encoder.variables, encoder.config
      ),
      "recordings": len(self.recordings),
      "recordings_sha256": recordings.fingerprint(self.recordings),
      "shard_size": self.shard_size,
      **{k: v for k, v in values.items() if k not in NOT_OF_A_RESULT},
    }
    path = self.folder / ABOUT_FILE
    if path.exists():
      old = json.loads(path.read_text())
      for name in about:
        if old[name] != about[name]:
          raise ValueError(
            f"{self.folder} has embeddings of another job: {name} was "
            f"{old[name]!r}, is now {about[name]!r}; give another --output, "
            "or remove it"
          )
      return
    rest = {
      "encoder": self.settings.encoder,
      "width": encoder.embedding_width,
      "sample_rate_hz": encoder.sample_rate_hz,
      "class_names": encoder.class_names,
    }
    self.folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(recording) + "\n" for recording in self.recordings)
    files.write_text(self.folder / LIST_FILE, "".join(lines))
    files.write_text(path, json.dumps(about | rest, indent=2) + "\n")

  def embed_shard(
    self, shard: int, progress: Callable[[float], None] = lambda _: None
  ) -> None:
    """Embeds the recordings of a shard and writes its files.

    Args:
      shard: its number.
      progress: called with the seconds of each recording that is done.
    """
    encoder = load_encoder(self.settings)
    chosen = [self.recordings[i] for i in self.shards[shard]]
    rows, bad = embed(encoder, self.settings, chosen, progress)
    text = "".join(
      json.dumps({"id": chosen[i].id, "reason": str(error)}) + "\n"
      for i, error in sorted(bad.items())
    )
    files.write_text(self._bad(shard), text)
    path = self.part(shard)
    temporary = files.temporary_path(path)
    pyarrow.parquet.write_table(table(encoder, self.settings, rows), temporary)
    temporary.replace(path)

  def _number(self, shard: int) -> str:
    return f"{shard:05d}-of-{len(self.shards):05d}"

  def _bad(self, shard: int) -> pathlib.Path:
    return self.folder / f"_bad-{self._number(shard)}.jsonl"


@functools.lru_cache(1)
def read_job(folder: pathlib.Path, settings: Settings) -> Job:
  """Returns a job that was opened before, here or on another machine."""
  lines = (folder / LIST_FILE).read_text().splitlines()
  found = [recordings.Recording(*json.loads(line)) for line in lines]
  about = json.loads((folder / ABOUT_FILE).read_text())
  return Job(folder, settings, found, about["shard_size"])


def embed_shard(folder: pathlib.Path, settings: Settings, shard: int) -> None:
  """Embeds a shard of a job that was opened before, on whichever machine."""
  read_job(folder, settings).embed_shard(shard)


def embed(
  encoder: Encoder,
  settings: Settings,
  chosen: Sequence[recordings.Recording],
  progress: Callable[[float], None],
) -> tuple[list[Part], dict[int, ValueError]]:
  """Returns (a row for each part, error of each recording that is bad).

  Of a recording that turns out bad on the way, nothing is kept.
  """
  rate_hz = encoder.sample_rate_hz
  size, hop = (
    round(seconds * rate_hz)
    for seconds in (settings.segment_s, settings.segment_hop_s)
  )
  # Of each part: recording, first sample, number of samples.
  parts: list[tuple[int, int, int]] = []
  num_samples = collections.Counter()
  bad: dict[int, ValueError] = {}

  def counted(index, blocks):
    for block in blocks:
      num_samples[index] += len(block)
      yield block

  def clips() -> Iterator:
    streams = recordings.read(
      chosen, sample_rate_hz=rate_hz, num_threads=settings.num_threads
    )
    for index, blocks in enumerate(streams):
      blocks = counted(index, blocks)
      if not size:
        parts.append((index, 0, 0))
        yield blocks
      else:
        pieces = recordings.segments(blocks, size, hop, encoder.geometry.length)
        try:
          for start, samples in pieces:
            parts.append((index, start, len(samples)))
            yield [samples]
        except audio_io.BadClipError as error:
          bad[index] = error
      progress(num_samples[index] / rate_hz)

  found = {}
  for part, out in encoder.embed_clips(
    clips(),
    hop_ms=settings.hop_ms,
    overlap=settings.overlap,
    layers=False,
    frames=settings.frames,
    full_batches=True,
    on_error=lambda part, error: bad.update({parts[part][0]: error}),
  ):
    found[part] = out
  rows = []
  for part, out in sorted(found.items()):
    index, start, length = parts[part]
    if index not in bad:
      end = start + (length or num_samples[index])
      rows.append(Part(chosen[index].id, start / rate_hz, end / rate_hz, out))
  return rows, bad


def table(
  encoder: Encoder,
  settings: Settings,
  rows: list[Part],
) -> pyarrow.Table:
  """Returns the table of a shard.

  Its columns are `id`, `start_s` and `end_s`, or for frames `id` and
  `timestamp_s`; then `embedding`, and of a classifier `logits`. Seconds are
  those of the recording, or of the part of it that a table asked for.
  """
  string, seconds = pyarrow.string(), pyarrow.float64()
  if settings.frames:
    names = [row.id for row in rows for _ in row.out.frames]
    times = [row.start_s + t for row in rows for t in row.out.timestamps_s]
    columns = {
      "id": pyarrow.array(map(printable, names), string),
      "timestamp_s": pyarrow.array(times, seconds),
      "embedding": vectors([row.out.frames for row in rows], encoder.width),
    }
    return pyarrow.table(columns)
  columns = {
    "id": pyarrow.array([printable(row.id) for row in rows], string),
    "start_s": pyarrow.array([row.start_s for row in rows], seconds),
    "end_s": pyarrow.array([row.end_s for row in rows], seconds),
    "embedding": vectors(
      [row.out.embedding[None] for row in rows], encoder.embedding_width
    ),
  }
  if encoder.model.num_classes:
    columns["logits"] = vectors(
      [row.out.logits[None] for row in rows], encoder.model.num_classes
    )
  return pyarrow.table(columns)


def vectors(parts: list[np.ndarray], width: int) -> pyarrow.Array:
  """Returns a column of vectors of one width."""
  empty = np.zeros((0, width), np.float32)
  flat = np.concatenate([empty, *parts]).ravel()
  return pyarrow.FixedSizeListArray.from_arrays(flat, width)


def printable(name: str) -> str:
  """Returns names of files as text; what is none becomes a question mark."""
  return name.encode(errors="surrogateescape").decode(errors="replace")
