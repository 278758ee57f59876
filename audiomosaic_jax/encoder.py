"""Audio in, embeddings out: the encoder as a downstream program uses it.

  encoder = encoder_files.load_encoder("runs/demo")
  out = encoder.embed("clip.wav")
  out.embedding, out.frames, out.timestamps_s

A recording of any length is cut into windows on the grid of patches; columns
without sound are seen by neither attention nor pooling. What comes out depends
on the recording alone, not on what it is batched with.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import soxr
from jaxtyping import Float

from audiomosaic_jax import embed_program, predict, sharding
from audiomosaic_jax.data import arrays, audio_io, windows
from audiomosaic_jax.embedding import Embedding, WindowRun
from audiomosaic_jax.trained_classifier import Classifier

ConfigDict = ml_collections.ConfigDict
Audio = str | os.PathLike | np.ndarray

# Shorter windows run in the program of one this long, or of twice this ...
MIN_COLUMNS = 4
# Seconds of a file in memory at once.
BLOCK_S = 60.0


class Encoder:
  """An encoder with its front end.

  Attributes:
    config: of the run that trained it.
    variables: parameters and statistics, host arrays.
    class_names: of the logits; empty without a classifier.
    classifier: the model whose encoder this is, if it is a classifier.
    model: `models.embedder.Embedder` with those variables.
    geometry: frames and columns of its windows.
    sample_rate_hz: rate that recordings are resampled to.
    width: D, channels of a frame.
    embedding_width: E, channels of an embedding.
    depth: blocks.
    hop_ms: from one column of patches to the next.
    window_s: what it can see at once.
  """

  def __init__(
    self,
    config: ConfigDict,
    variables: dict[str, Any],
    class_names: Sequence[str],
    *,
    dtype: str,
    batch_size: int,
    classifier: Classifier | None = None,
  ):
    """Places an encoder on the local devices.

    Args:
      config: of the run.
      variables: of its model; what embedding does not need is left out.
      class_names: of a classifier; empty without one.
      dtype: of matrix products and of the residual stream.
      batch_size: windows computed at once, on all local devices together.
      classifier: the whole model, for `classify`.
    """
    self.config, self.classifier = config, classifier
    self.class_names = tuple(class_names)
    self.model = embed_program.build_embedder(
      config, len(self.class_names), dtype
    )
    self.variables = embed_program.wanted_variables(
      self.model, config, variables
    )
    self._mesh = sharding.make_mesh(jax.local_devices())
    self._placed = jax.device_put(
      self.variables, sharding.replicated(self._mesh)
    )
    self._row_sizes = doubled(self._mesh.devices.size, batch_size)
    self._compute = jax.jit(
      embed_program.make_embed_fn(self.model, config, self._mesh),
      static_argnames=("max_columns", "return_layers"),
    )
    self.geometry = embed_program.geometry(config)
    self.sample_rate_hz = config.fbank.sample_rate_hz
    self.width = config.model.encoder.width
    fusion = self.model.pooling == "fusion"
    self.embedding_width = (1 + fusion) * self.width
    self.depth = config.model.encoder.depth
    # Of the samples, which are whole where the shift of the config is not.
    self.hop_ms = 1e3 * self.geometry.column_samples / self.sample_rate_hz
    full = self.geometry.span(self.geometry.max_columns)
    self.window_s = full / self.sample_rate_hz

  def embed(
    self,
    audio: Audio,
    sample_rate_hz: int | None = None,
    *,
    hop_ms: float | int | None = None,
    overlap: float = 0.0,
    layers: bool = False,
  ) -> Embedding:
    """Embeds one recording.

    Args:
      audio: path of a file, read block by block; or samples [n], floating
        point in [-1, 1] or int16.
      sample_rate_hz: rate of the samples; a file knows its own.
      hop_ms: from one frame to the next; None is that of the patches, and a
        fraction of it encodes the recording as many times, shifted.
      overlap: part of a window that the next one sees again, 0 to below 1;
        frames that were seen twice are averaged.
      layers: also return the frames after every block.

    Raises:
      ValueError: not one channel, NaN, too short, or a hop that does not
        divide that of the patches.
      audio_io.BadClipError: a file without usable sound.
    """
    blocks = self.read(audio, sample_rate_hz)
    [(_, out)] = self.embed_clips(
      [blocks], hop_ms=hop_ms, overlap=overlap, layers=layers
    )
    return out

  def classify(
    self, clips: Sequence[Audio], sample_rate_hz: int | None = None
  ) -> Float[np.ndarray, "N C"]:
    """Returns logits of whole clips, as the classifier was tested.

    Clips are cut and filled up as in training, and what fills them up is seen,
    which `embed` does not show to a linear classifier.

    Args:
      clips: as of `embed_batch`.
      sample_rate_hz: as of `embed`.

    Raises:
      ValueError: this is no classifier.
    """
    if self.classifier is None:
      raise ValueError(
        "this encoder has no classifier; load the workdir of a fine-tuning "
        "run, or an imported classifier"
      )
    waveforms = [
      np.concatenate(list(self.read(clip, sample_rate_hz))) for clip in clips
    ]
    found = self._windows_of(
      self.classifier.variables, arrays.ArraySource(waveforms)
    )
    logits, _ = predict.clip_means(found, len(clips))
    return logits.astype(np.float32)

  def probabilities(
    self, logits: Float[np.ndarray, "N C"]
  ) -> Float[np.ndarray, "N C"]:
    """Returns the probability of each class, calibrated on validation clips.

    Args:
      logits: of `classify`.

    Raises:
      ValueError: this is no classifier, or one that was not calibrated.
    """
    if self.classifier is None or self.classifier.calibration is None:
      raise ValueError(
        "this encoder has no calibration; load a classifier that was trained "
        "with validation clips, or use its logits"
      )
    return self.classifier.calibration.probabilities(logits)

  def stream(self, **settings: Any) -> "streaming.Stream":
    """Returns a stream of this encoder; arguments as of `streaming.Stream`."""
    from audiomosaic_jax import streaming

    return streaming.Stream(self, **settings)

  @functools.cached_property
  def _windows_of(self) -> Callable:
    model, config = self.classifier.model, self.classifier.config
    return predict.make_window_fn(model, config, "__call__")

  def embed_batch(
    self,
    clips: Sequence[Audio],
    sample_rate_hz: int | None = None,
    *,
    hop_ms: float | int | None = None,
    overlap: float = 0.0,
    layers: bool = False,
  ) -> list[Embedding]:
    """Embeds recordings of any lengths, in their order; else as `embed`."""
    found = dict(
      self.embed_clips(
        (self.read(clip, sample_rate_hz) for clip in clips),
        hop_ms=hop_ms,
        overlap=overlap,
        layers=layers,
      )
    )
    return [found[i] for i in range(len(clips))]

  def read(
    self, audio: Audio, sample_rate_hz: int | None
  ) -> Iterable[np.ndarray]:
    """Returns a recording as blocks at the rate of the encoder."""
    if isinstance(audio, str | os.PathLike):
      return audio_io.stream_audio(
        audio, sample_rate_hz=self.sample_rate_hz, block_s=BLOCK_S
      )
    samples = check_samples(audio, sample_rate_hz)
    if sample_rate_hz != self.sample_rate_hz:
      samples = soxr.resample(
        samples, sample_rate_hz, self.sample_rate_hz, quality="HQ"
      )
    return [samples]

  def embed_clips(
    self,
    clips: Iterable[Iterable[np.ndarray]],
    *,
    hop_ms: float | int | None,
    overlap: float,
    layers: bool,
    frames: bool = True,
    full_batches: bool = False,
    on_error: Callable[[int, ValueError], None] | None = None,
  ) -> Iterator[tuple[int, Embedding]]:
    """Embeds a stream of recordings, several at once.

    Args:
      clips: blocks of samples of each, as `read` returns them.
      hop_ms: as of `embed`.
      overlap: as of `embed`.
      layers: as of `embed`.
      frames: False leaves them out, and needs less memory.
      full_batches: compute the last windows in a batch of the full size, too:
        fewer programs to compile, for a few rows too many.
      on_error: called with the index of a recording that cannot be read and
        the reason, and the others go on; None raises.

    Yields:
      (index, embedding) of each as it is finished, in any order.
    """
    hop_columns, offsets = self.hops(hop_ms, overlap)
    run = WindowRun(
      functools.partial(self.compute, return_layers=layers),
      self.geometry,
      offsets,
      row_sizes=self._row_sizes[-1:] if full_batches else self._row_sizes,
      column_sizes=halved(self.geometry.max_columns, MIN_COLUMNS),
      frames=frames,
    )
    for index, blocks in enumerate(clips):
      try:
        for window in windows.cut(
          blocks, self.geometry, hop_columns=hop_columns, offsets=offsets
        ):
          run.add(index, window)
      except ValueError as error:
        if on_error is None:
          raise
        run.drop(index)
        on_error(index, error)
        continue
      run.close(index)
      yield from run.finished()
    run.flush()
    yield from run.finished()

  def compute(
    self, waveform: np.ndarray, num_frames: np.ndarray, return_layers: bool
  ) -> dict[str, jax.Array]:
    """Returns what `Embedder` does of a batch; see `embed_program`."""
    geometry = self.geometry
    max_columns = geometry.num_columns(geometry.num_frames(waveform.shape[1]))
    rows = sharding.batch_sharded(self._mesh)
    return self._compute(
      self._placed,
      jax.device_put(waveform, rows),
      jax.device_put(num_frames, rows),
      max_columns=max_columns,
      return_layers=return_layers,
    )

  def hops(
    self, hop_ms: float | int | None, overlap: float
  ) -> tuple[int, tuple[int, ...]]:
    """Returns columns between windows, and the shifts of the grid in samples.

    Args:
      hop_ms: as of `embed`; rounded to samples.
      overlap: as of `embed`.

    Raises:
      ValueError: as `embed`.
    """
    if not 0 <= overlap < 1:
      raise ValueError(
        f"overlap is {overlap}; use a part of a window, 0 to below 1"
      )
    column = self.geometry.column_samples
    hop = column
    if hop_ms is not None:
      hop = round(hop_ms * self.sample_rate_hz / 1e3)
      if hop < 1 or column % hop:
        raise ValueError(
          f"hop_ms is {hop_ms:g}, which does not divide the {self.hop_ms:g} ms "
          f"of a patch; use {self.hop_ms:g}, {self.hop_ms / 2:g} or "
          f"{self.hop_ms / 4:g}"
        )
    hop_columns = round(self.geometry.max_columns * (1 - overlap))
    return max(1, hop_columns), tuple(range(0, column, hop))


def doubled(size: int, at_least: int) -> list[int]:
  """Returns size, 2 size, 4 size, ... up to the first that is large enough."""
  sizes = [size]
  while sizes[-1] < at_least:
    sizes.append(2 * sizes[-1])
  return sizes


def halved(size: int, at_least: int) -> list[int]:
  """Returns ..., size / 4, size / 2, size, none below a bound."""
  sizes = [size]
  while sizes[0] % 2 == 0 and sizes[0] // 2 >= at_least:
    sizes.insert(0, sizes[0] // 2)
  return sizes


def check_samples(
  samples: np.ndarray, sample_rate_hz: int | None
) -> np.ndarray:
  """Returns samples as float32, if they are one channel of sound.

  Raises:
    ValueError: no rate, not one channel, another type, NaN or infinite.
  """
  if sample_rate_hz is None:
    raise ValueError(
      "the sample rate of an array is not known; give sample_rate_hz="
    )
  samples = np.asarray(samples)
  if samples.ndim != 1:
    raise ValueError(
      f"audio has shape {samples.shape} but must be [samples]; average its "
      "channels, or give several recordings to embed_batch"
    )
  if samples.dtype == np.int16:
    return audio_io.pcm16_to_float(samples)
  if not np.issubdtype(samples.dtype, np.floating):
    raise ValueError(
      f"audio is {samples.dtype}; give floats in [-1, 1], or int16"
    )
  if bad := np.count_nonzero(~np.isfinite(samples)):
    raise ValueError(
      f"audio has {bad} NaN or infinite of {samples.size} samples; fix the "
      "decoder or use np.nan_to_num"
    )
  return samples.astype(np.float32)
