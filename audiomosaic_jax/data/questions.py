"""Clips with a question each, as the pipeline of clips reads them.

The label of a clip is its text: int32 [2, N], ids and what is to be predicted.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from audiomosaic_jax.data import audio_io, datasets, text
from audiomosaic_jax.data.sources import Source
from audiomosaic_jax.data.storage import temporary_path
from audiomosaic_jax.data.text import IGNORED, Record, Tokenizer

PADDING = -1
# What a question without a clip has for one, in samples.
SILENCE = 400

# Of the packaged notes: what can be asked, and how it is answered.
ASKED = (
  ("Which instrument is playing?", "The {label}."),
  ("What do you hear?", "The sound of {label}."),
  ("Name the family of the instrument.", "It is {label}."),
  (
    "Close-ended question: Write an audio caption describing the sound.",
    "The sound of {label}.",
  ),
)
WITHOUT_AUDIO = (
  ("How many strings has a violin?", "Four."),
  ("Is a flute made of wood or of metal?", "It can be made of either."),
  ("What is a semitone?", "The twelfth part of an octave."),
  ("Which is higher, a flute or a bass?", "A flute."),
)


class QuestionSource(Source):
  """Records as clips; those of one clip decode it each time."""

  class_names = ()
  multi_hot = False

  def __init__(
    self,
    records: Sequence[Record],
    *,
    audio_root: str,
    tokenizer: Tokenizer,
    cutoff: int,
    response_only: bool,
    sample_rate_hz: int,
  ):
    """Checks where the clips are; reads none.

    Args:
      records: questions and answers.
      audio_root: folder that their audio ids are relative to; no id may lead
        out of it. "" takes them as they are.
      tokenizer: of the base.
      cutoff: N, ids of a text at most.
      response_only: see `text.encode_example`.
      sample_rate_hz: rate that clips are resampled to.

    Raises:
      ValueError: an id that leads out of `audio_root`.
    """
    self._records = records
    self._root = pathlib.Path(audio_root).expanduser() if audio_root else None
    self._tokenizer, self._cutoff = tokenizer, cutoff
    self._response_only = response_only
    self._sample_rate_hz = sample_rate_hz
    self.ids = [record.audio_id or "empty" for record in records]
    if self._root is not None:
      for record in records:
        if record.has_audio:
          _check_within(record.audio_id)

  @property
  def labels(self) -> np.ndarray:
    """No clip has a class."""
    return np.full(len(self), -1, np.int32)

  def path(self, index: int) -> str | None:
    """The file of a clip; None if nothing is heard."""
    record = self._records[index]
    if not record.has_audio:
      return None
    name = pathlib.Path(record.audio_id)
    return str(name if self._root is None else self._root / name)

  def __getitem__(self, index: int) -> dict:
    path, silence = self.path(index), np.zeros(SILENCE, np.float32)
    waveform = (
      silence
      if path is None
      else audio_io.load_audio(path, sample_rate_hz=self._sample_rate_hz)
    )
    return {
      "waveform": waveform,
      "label": self.text_of(index),
      "has_audio": np.bool_(path is not None),
      "id": np.int32(index),
    }

  def text_of(self, index: int) -> Int[np.ndarray, "2 N"]:
    """Returns ids and labels, filled up with PADDING and IGNORED."""
    ids, labels = text.encode_example(
      self._records[index],
      self._tokenizer,
      cutoff=self._cutoff,
      response_only=self._response_only,
    )
    rows = np.full((2, self._cutoff), PADDING, np.int32)
    rows[1] = IGNORED
    rows[0, : len(ids)] = ids
    rows[1, : len(ids)] = labels
    return rows


def to_arrays(
  batch: Mapping[str, np.ndarray], buckets: Sequence[int]
) -> dict[str, np.ndarray]:
  """Returns what a training step takes of a batch of the pipeline.

  Args:
    batch: of questions.
    buckets: lengths, rising; texts are padded to the first that holds them
      all, so that no more programs than that are compiled.
  """
  ids, labels = batch["label"][:, 0], batch["label"][:, 1]
  longest = int((ids != PADDING).sum(axis=1).max())
  length = next(size for size in buckets if size >= longest)
  missing = ((0, 0), (0, max(0, length - ids.shape[1])))
  ids = np.pad(ids, missing, constant_values=PADDING)[:, :length]
  labels = np.pad(labels, missing, constant_values=IGNORED)[:, :length]
  return {
    "waveform": batch["waveform"],
    "has_audio": batch["has_audio"],
    "ids": np.maximum(ids, 0),
    "valid": ids != PADDING,
    "labels": labels,
  }


def demo_records(split: str, *, seed: int) -> list[Record]:
  """Returns questions about the packaged notes of a split.

  Args:
    split: train, valid or test.
    seed: of what is asked.
  """
  notes = datasets.labelled(split, data_dir="demo", sample_rate_hz=16_000)
  rng = np.random.default_rng(seed)
  records = []
  for index, (label,) in enumerate(notes.label_sets):
    name = notes.class_names[label]
    for number in rng.permutation(len(ASKED))[:2].tolist():
      asked, answered = ASKED[number]
      path, answer = str(notes.path(index)), answered.format(label=name)
      records.append(
        Record(asked, "", path, "packaged notes", "closed-ended", answer)
      )
  records += [
    Record(asked, "", "", "none", "open-ended", answer)
    for asked, answer in WITHOUT_AUDIO
  ]
  return records


def write_records(records: Sequence[Record], path: pathlib.Path) -> None:
  """Writes records as a file of questions."""
  temporary = temporary_path(path)
  rows = [record._asdict() for record in records]
  temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
  temporary.replace(path)


def _check_within(audio_id: str) -> None:
  """Raises ValueError for an id that leads out of its folder."""
  parts = pathlib.PurePath(audio_id)
  if parts.is_absolute() or ".." in parts.parts:
    raise ValueError(
      f"audio_id {audio_id!r} leads out of data.audio_root; give ids relative "
      "to it, or set data.audio_root='' to take paths as they are"
    )
