"""What an encoder says of a recording, put together from its windows."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from audiomosaic_jax.data.windows import Geometry, Window

# Batches on their way; the device computes one while the next is prepared.
IN_FLIGHT = 2
# What of a window has a row for each of its columns.
PER_COLUMN = ("frames", "layers")

Part = tuple[Window, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Embedding:
  """What an encoder says of a recording.

  Attributes:
    embedding: float32 [E], the mean over its sound.
    frames: float32 [T, D], one for every `hop_ms`; None if left out.
    timestamps_s: float64 [T], the middle of what each frame saw first-hand.
    layers: float32 [depth, T, D], frames after every block; None if not asked
      for.
    z: float32 [Z], what the contrastive loss compares; None without projector.
    logits: float32 [classes]; None without a linear classifier.
  """

  embedding: np.ndarray
  frames: np.ndarray | None
  timestamps_s: np.ndarray
  layers: np.ndarray | None
  z: np.ndarray | None
  logits: np.ndarray | None


def join(
  parts: Sequence[Part], geometry: Geometry, offsets: Sequence[int]
) -> Embedding:
  """Puts the windows of a recording together.

  The embedding is the mean of the windows, each as often as it has columns.
  Frames of shifted grids go between those of the first.

  Args:
    parts: windows, whose samples are not looked at, and what the encoder made
      of each.
    geometry: of the encoder.
    offsets: the shifts.
  """
  totals = [
    max(
      window.column + geometry.num_columns(window.num_frames)
      for window, _ in parts
      if window.offset == offset
    )
    for offset in offsets
    if any(window.offset == offset for window, _ in parts)
  ]
  num_frames = sum(totals)
  first = [part for part in parts if part[0].offset == offsets[0]]
  weights = [geometry.num_columns(window.num_frames) for window, _ in first]

  def mean(name):
    if name not in first[0][1]:
      return None
    rows = [out[name] for _, out in first]
    return np.average(rows, axis=0, weights=weights).astype(np.float32)

  def columns(name):
    if name not in first[0][1]:
      return None
    *outer, _, width = first[0][1][name].shape
    total = np.zeros((*outer, num_frames, width), np.float32)
    seen = np.zeros((num_frames, 1), np.float32)
    for window, out in parts:
      # Column c of shift k is frame c * K + k.
      start = window.column * len(offsets) + offsets.index(window.offset)
      stop = start + out[name].shape[-2] * len(offsets)
      rows = slice(start, stop, len(offsets))
      total[..., rows, :] += out[name]
      seen[rows] += 1
    total /= seen
    return total

  timestamps = [
    geometry.timestamp_s(i // len(offsets), offsets[i % len(offsets)])
    for i in range(num_frames)
  ]
  return Embedding(
    embedding=mean("embedding"),
    frames=columns("frames"),
    timestamps_s=np.array(timestamps),
    layers=columns("layers"),
    z=mean("z"),
    logits=mean("logits"),
  )


class WindowRun:
  """Windows on their way through the device, and what came back of each clip.

  Windows that run in the same program wait for one another; batches are
  computed while the host goes on.
  """

  def __init__(
    self,
    compute: Callable[[np.ndarray, np.ndarray], dict[str, jax.Array]],
    geometry: Geometry,
    offsets: Sequence[int],
    *,
    row_sizes: Sequence[int],
    column_sizes: Sequence[int],
    frames: bool,
  ):
    """Starts without a window.

    Args:
      compute: (waveform [B, S], num_frames [B]) -> outputs [B, ...].
      geometry: of the encoder.
      offsets: shifts of the grid.
      row_sizes: batches that programs exist for, rising.
      column_sizes: lengths of window that programs exist for, rising.
      frames: keep what a window has a row for each column of; without it,
        clips that wait for others take no memory.
    """
    self._compute, self._geometry, self._offsets = compute, geometry, offsets
    self._row_sizes, self._column_sizes = row_sizes, column_sizes
    self._left_out = () if frames else PER_COLUMN
    self._waiting = collections.defaultdict(list)
    self._in_flight = collections.deque()
    self._pending = collections.Counter()
    self._parts = collections.defaultdict(list)
    self._closed: set[int] = set()

  def add(self, clip: int, window: Window) -> None:
    """Queues a window, and computes its queue if it is full."""
    columns = self._geometry.num_columns(window.num_frames)
    bucket = next(size for size in self._column_sizes if size >= columns)
    self._pending[clip] += 1
    # A copy, because samples are part of a block that would stay with them.
    window = window._replace(samples=window.samples.copy())
    self._waiting[bucket].append((clip, window))
    if len(self._waiting[bucket]) == self._row_sizes[-1]:
      self._dispatch(bucket)

  def close(self, clip: int) -> None:
    """Notes that a clip has no more windows."""
    self._closed.add(clip)

  def drop(self, clip: int) -> None:
    """Forgets a clip."""
    for bucket, queue in self._waiting.items():
      self._waiting[bucket] = [item for item in queue if item[0] != clip]
    self._closed.discard(clip)
    self._pending.pop(clip, None)
    self._parts.pop(clip, None)

  def flush(self) -> None:
    """Computes everything that waits."""
    for bucket, queue in list(self._waiting.items()):
      if queue:
        self._dispatch(bucket)
    while self._in_flight:
      self._collect()

  def finished(self) -> Iterator[tuple[int, Embedding]]:
    """Yields the clips whose last window has come back."""
    for clip in [c for c in self._closed if not self._pending[c]]:
      self._closed.remove(clip)
      self._pending.pop(clip)
      yield clip, join(self._parts.pop(clip), self._geometry, self._offsets)

  def _dispatch(self, bucket: int) -> None:
    queue, self._waiting[bucket] = self._waiting[bucket], []
    rows = next(size for size in self._row_sizes if size >= len(queue))
    waveform = np.zeros((rows, self._geometry.span(bucket)), np.float32)
    num_frames = np.zeros(rows, np.int32)
    for row, (_, window) in enumerate(queue):
      waveform[row, : len(window.samples)] = window.samples
      num_frames[row] = window.num_frames
    out = self._compute(waveform, num_frames)
    self._in_flight.append((queue, out))
    if len(self._in_flight) > IN_FLIGHT:
      self._collect()

  def _collect(self) -> None:
    queue, out = self._in_flight.popleft()
    out = jax.device_get(out)
    for row, (clip, window) in enumerate(queue):
      if clip not in self._pending:
        continue  # It was dropped.
      self._pending[clip] -= 1
      columns = self._geometry.num_columns(window.num_frames)
      part = {
        name: array[row]
        for name, array in out.items()
        if name not in self._left_out
      }
      for name in part.keys() & set(PER_COLUMN):
        part[name] = part[name][..., :columns, :].copy()
      # Its place is all that joining needs; the samples of hours are large.
      self._parts[clip].append((window._replace(samples=None), part))
