"""Recordings of any length, cut into the windows that an encoder takes.

A window is as many columns of patches as the encoder has positions for, and
windows lie on the grid of columns, so that column c of a recording is the same
stretch of sound whichever window it is in:

  column c sees the samples  c * column_samples  to  c * column_samples +
                             (patch_size - 1) * shift + length

A recording is read block by block and never held as a whole.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Geometry(NamedTuple):
  """Frames and columns of patches, in samples.

  Attributes:
    sample_rate_hz: rate of the recordings.
    length: samples of an analysis frame.
    shift: samples from one frame to the next.
    patch_size: frames of a column.
    max_columns: columns of a window.
  """

  sample_rate_hz: int
  length: int
  shift: int
  patch_size: int
  max_columns: int

  @property
  def column_samples(self) -> int:
    """Samples from one column to the next."""
    return self.patch_size * self.shift

  def num_frames(self, num_samples: int) -> int:
    """Returns how many frames lie inside so many samples."""
    return max(0, 1 + (num_samples - self.length) // self.shift)

  def num_samples(self, num_frames: int) -> int:
    """Returns the samples that so many frames see."""
    return (num_frames - 1) * self.shift + self.length

  def num_columns(self, num_frames: int) -> int:
    """Returns how many columns have a frame; the last may be incomplete."""
    return -(-num_frames // self.patch_size)

  def span(self, num_columns: int) -> int:
    """Returns the samples that so many columns see."""
    return self.num_samples(num_columns * self.patch_size)

  def timestamp_s(self, column: int, offset: int) -> float:
    """Returns the middle of what a column sees, from the beginning."""
    middle = offset + column * self.column_samples + self.span(1) / 2
    return middle / self.sample_rate_hz


class Window(NamedTuple):
  """Part of a recording.

  Attributes:
    column: its first column, counted from the offset.
    offset: samples that the grid of columns is shifted by.
    samples: [n] what its frames see; fewer at the end of the recording. None
      once they are no longer needed.
    num_frames: frames that lie inside.
  """

  column: int
  offset: int
  samples: np.ndarray | None
  num_frames: int


def cut(
  blocks: Iterable[np.ndarray],
  geometry: Geometry,
  *,
  hop_columns: int,
  offsets: Sequence[int],
) -> Iterator[Window]:
  """Cuts a recording into windows, holding one of them at a time.

  Args:
    blocks: the samples of the recording in order, in parts of any length.
    geometry: of the encoder.
    hop_columns: columns from one window to the next, 1 to `max_columns`.
    offsets: shifts of the grid in samples, rising from 0 and less than a
      column; every window is cut once for each.

  Yields:
    Windows that together have every column; the last ends with the recording.

  Raises:
    ValueError: the recording is shorter than a frame.
  """
  # What earlier windows have seen of the next one.
  overlap = geometry.max_columns - hop_columns
  full = geometry.span(geometry.max_columns)
  buffer, column, received = np.zeros(0, np.float32), 0, 0
  for block in itertools.chain(blocks, [None]):
    if block is not None:
      received += len(block)
      buffer = np.concatenate([buffer, block]) if len(buffer) else block
    while True:
      frames = geometry.num_frames(len(buffer))
      unseen = geometry.num_columns(frames) > (overlap if column else 0)
      whole = len(buffer) >= full + offsets[-1]
      if not (whole if block is not None else unseen):
        break
      for offset in offsets:
        samples = buffer[offset : offset + full]
        if num_frames := geometry.num_frames(len(samples)):
          samples = samples[: geometry.num_samples(num_frames)]
          yield Window(column, offset, samples, num_frames)
      column += hop_columns
      buffer = buffer[hop_columns * geometry.column_samples :]
  if not column:
    raise ValueError(
      f"a recording of {received} samples is shorter than one frame of "
      f"{geometry.length} ({1e3 * geometry.length / geometry.sample_rate_hz:g} "
      "ms); leave it out, or append silence"
    )
