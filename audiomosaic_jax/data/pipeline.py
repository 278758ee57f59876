"""From a source to batches of 16-bit waveforms, the same on any machine.

Training order and crops are functions of the seed and the step alone: the
stream of clips is shuffled, repeated and cropped *before* the processes share
it out, so the global batch does not depend on how many processes, threads or
workers there are. Everything is lazy, so a process decodes its share only.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent import futures

import grain
import numpy as np

from audiomosaic_jax.data import audio_io, sampling
from audiomosaic_jax.data.sources import Source

# At most so many clips are a thread's piece of work: few, so that all threads
# read the same batch, but more than one, as to hand over a piece takes longer
# than to cut a second out of a clip.
PIECE_CLIPS = 16
# Threads that copy clips into a batch; one copies some 2 GB a second.
STACK_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Crop(grain.transforms.RandomMap):
  """Cuts or fills a clip to `clip_samples` and rounds it to 16 bits.

  Attributes:
    clip_samples: length of the result.
    crop: "random" takes any part of a long clip and, if `pad` is "repeat",
      starts a short one anywhere; "start" takes the beginning.
    pad: what fills a short clip: "pad" zeros, "repeat" itself.
  """

  clip_samples: int
  crop: str
  pad: str

  def __post_init__(self):
    if self.crop not in ("random", "start"):
      raise ValueError(f"crop={self.crop!r}; choose 'random' or 'start'")
    if self.pad not in ("pad", "repeat"):
      raise ValueError(f"pad={self.pad!r}; choose 'pad' or 'repeat'")

  def random_map(self, element: dict, rng: np.random.Generator) -> dict:
    waveform = element["waveform"]
    length = len(waveform)
    if length >= self.clip_samples:
      num_offsets = length - self.clip_samples + 1
    else:
      num_offsets = length if self.pad == "repeat" else 1
    offset = int(rng.integers(num_offsets)) if self.crop == "random" else 0
    clip = audio_io.fit_length(
      waveform, self.clip_samples, mode=self.pad, offset=offset
    )
    clip = audio_io.as_pcm16(clip)
    # A view would keep the whole recording until the batch is put together.
    if length > 4 * self.clip_samples and clip.base is not None:
      clip = clip.copy()
    return {**element, "waveform": clip}


def train_iterator(
  source: Source,
  *,
  seed: int,
  batch_size: int,
  clip_samples: int,
  crop: str,
  pad: str,
  process_index: int,
  process_count: int,
  num_threads: int,
  prefetch_size: int,
  num_workers: int,
  weights: np.ndarray | sampling.WithoutReplacement | None,
) -> "TrainIterator":
  """An endless, checkpointable stream of one process's training batches.

  Without weights, every epoch visits each clip once, in another order; a
  batch may span two epochs, so a source may be smaller than a batch. Batch k
  over all processes, one after the other, is the same for any
  `process_count`, with weights and without.

  Args:
    source: clips.
    seed: of the order and the crops.
    batch_size: clips per batch of this process.
    clip_samples: samples per clip.
    crop: "random" or "start", see `Crop`.
    pad: "pad" or "repeat", see `Crop`.
    process_index: which process this is.
    process_count: how many there are.
    num_threads: threads that decode, each up to `PIECE_CLIPS` clips at a time.
    prefetch_size: batches made ahead; one more is being put together. A batch
      takes 2 batch_size clip_samples bytes.
    num_workers: worker processes; 0 is threads only, which is enough unless
      profiling says otherwise. Parse absl flags before using workers.
    weights: None visits all clips alike. [n] draws with replacement, in
      proportion to `sampling.clip_weights` or others of your own;
      `sampling.WithoutReplacement` makes the draws of an epoch distinct. An
      epoch is then as many draws as the caller says.

  Returns:
    Iterator of {"waveform": int16 [B, clip_samples], "label": [B] or [B, C],
    "id": int32 [B]}. Its state fits any number of processes and workers.
    Close it when done.

  Raises:
    ValueError: sizes, counts or weights that cannot work.
  """
  if len(source) == 0:
    raise ValueError(f"{source!r} is empty; there is nothing to train on")
  if batch_size < 1:
    raise ValueError(
      f"batch_size {batch_size} per process is not positive; use at least as "
      f"many clips per global batch as there are processes ({process_count})"
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index {process_index} is not in 0 to {process_count - 1}"
    )
  if num_threads < 1 or prefetch_size < 1:
    raise ValueError(
      f"num_threads={num_threads} and prefetch_size={prefetch_size} must be "
      "at least 1, or nobody would read"
    )
  clips = grain.MapDataset.source(source).seed(seed)
  if weights is None:
    stream = clips.shuffle().repeat()
  else:
    stream = sampling.WeightedDraws(clips, weights, seed=seed)
  stream = stream.random_map(
    Crop(clip_samples=clip_samples, crop=crop, pad=pad)
  )
  rows = ProcessRows(
    stream,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )
  return TrainIterator(
    rows,
    batch_size=batch_size,
    num_threads=num_threads,
    prefetch_size=prefetch_size,
    num_workers=num_workers,
  )


class ProcessRows(grain.MapDataset):
  """One process's rows of every global batch of a stream of clips.

  Process p holds rows p b ... (p + 1) b - 1 of each global batch, which is
  where `jax.make_array_from_process_local_data` puts them: row i of the
  batch, and with it whatever is drawn for row i, is the same clip for any
  number of processes.
  """

  def __init__(
    self,
    stream: grain.MapDataset,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
  ):
    super().__init__(stream)
    self._stream = stream
    self._batch_size = batch_size
    self._global_batch_size = batch_size * process_count
    self._first_row = batch_size * process_index

  def __len__(self) -> int:
    return len(self._stream) // self._global_batch_size * self._batch_size

  def __getitem__(self, index: int | slice):
    if isinstance(index, slice):
      return self.slice(index)
    step, row = divmod(index, self._batch_size)
    return self._stream[step * self._global_batch_size + self._first_row + row]


def _stack(
  pieces: Sequence[list[dict]], pool: futures.Executor
) -> dict[str, np.ndarray]:
  """Returns the clips of all pieces of a batch as rows, copied side by side."""
  rows = {
    name: np.empty((len(pieces), len(pieces[0]), *value.shape), value.dtype)
    for name, value in pieces[0][0].items()
  }

  def fill(index: int) -> None:
    for name, out in rows.items():
      np.stack([clip[name] for clip in pieces[index]], out=out[index])

  list(pool.map(fill, range(len(pieces))))
  return {name: out.reshape(-1, *out.shape[2:]) for name, out in rows.items()}


class TrainIterator(grain.DatasetIterator):
  """Reads batches in order; its whole state is the index of the next one.

  Threads, or workers with threads, decode pieces of a batch, which are then
  put together. Grain alone would give each thread a batch of its own: 16 of
  6144 clips of 10 s are 31 GB.

  Grain's own iterator over worker processes has a state per worker, which
  does not fit another number of workers. Rows are random access, so this one
  starts new workers at any batch instead.
  """

  def __init__(
    self,
    rows: grain.MapDataset,
    *,
    batch_size: int,
    num_threads: int,
    prefetch_size: int,
    num_workers: int,
  ):
    super().__init__()
    piece = max(n for n in range(1, PIECE_CLIPS + 1) if batch_size % n == 0)
    self._pieces = rows.batch(piece, drop_remainder=True, batch_fn=list)
    self._pieces_per_batch = batch_size // piece
    self._read_options = grain.ReadOptions(
      num_threads=num_threads,
      # So that a slow clip does not stop the other threads.
      prefetch_buffer_size=2 * num_threads,
    )
    self._prefetch_size = prefetch_size
    self._num_workers = num_workers
    self._pool = futures.ThreadPoolExecutor(STACK_THREADS)
    self._step = 0
    self._reader = None

  def start_prefetch(self) -> None:
    """Starts reading, if that has not happened yet."""
    if self._reader is None:
      rest = self._pieces[self._step * self._pieces_per_batch :]
      rest = rest.to_iter_dataset(self._read_options)
      if self._num_workers:
        rest = rest.mp_prefetch(
          grain.MultiprocessingOptions(num_workers=self._num_workers)
        )
      batches = grain.experimental.ThreadPrefetchIterDataset(
        rest.batch(
          self._pieces_per_batch,
          batch_fn=functools.partial(_stack, pool=self._pool),
        ),
        prefetch_buffer_size=self._prefetch_size,
      )
      self._reader = iter(batches)
      self._reader.start_prefetch()

  def __next__(self) -> dict[str, np.ndarray]:
    self._assert_not_closed()
    self.start_prefetch()
    batch = next(self._reader)
    self._step += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """Returns the index of the next batch."""
    return {"next_index": self._step}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to the batch of a state that `get_state` returned."""
    self._stop_reader()
    self._step = int(state["next_index"])

  def close(self) -> None:
    """Stops threads and workers; there is no next batch afterwards."""
    super().close()
    self._stop_reader()
    self._pool.shutdown()

  def _stop_reader(self) -> None:
    if self._reader is not None:
      self._reader.close()
      self._reader = None


def set_step(iterator: TrainIterator, step: int) -> None:
  """Repositions a training iterator so that its next batch is `step`.

  Args:
    iterator: what `train_iterator` returned.
    step: index of the next batch.
  """
  iterator.set_state({"next_index": step})
