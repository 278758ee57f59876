"""One audio file, or part of one, to a mono waveform at the wanted rate.

Everything libsndfile decodes is read: wav, flac, ogg (Vorbis and Opus), mp3,
aiff and a dozen more, at any rate and channel count, from a path or from
bytes.
"""

import io
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr
from jaxtyping import Float, Int16

# Sound that libsndfile cannot decode.
OTHER_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".wma", ".mka", ".mkv")

# Below half a step of a 16-bit sample a clip becomes all zeros in a batch.
SILENCE = 0.5 / 32768

# MP3 frames borrow bits from earlier ones, so the first samples after a seek
# come out wrong; starting this many samples early makes partial reads exact.
MP3_PREROLL = 18 * 1152

# A header may be off by a frame or two; beyond this share, data are missing.
MAX_MISSING_FRACTION = 0.1


class BadClipError(ValueError):
  """A clip that cannot be used for training, and why."""

  def __init__(self, path: str, reason: str):
    super().__init__(path, reason)
    self.path = path
    self.reason = reason

  def __str__(self) -> str:
    return f"{self.path}: {self.reason}"


def load_audio(
  audio: str | os.PathLike | bytes,
  *,
  sample_rate_hz: int,
  start_s: float | None = None,
  end_s: float | None = None,
  name: str | None = None,
) -> Float[np.ndarray, " n"]:
  """Decodes a clip, averages its channels and resamples it.

  Args:
    audio: path of a file, or the contents of one.
    sample_rate_hz: rate of the result.
    start_s: where the clip begins in the file; None is the beginning. Only
      the wanted part is decoded.
    end_s: where it ends; None, or beyond the file, is the end.
    name: what to call the clip in an error; None is its path.

  Returns:
    Samples in about [-1, 1] at `sample_rate_hz`.

  Raises:
    BadClipError: missing, undecodable, truncated, empty, silent or not finite.
  """
  if isinstance(audio, bytes):
    handle, name = io.BytesIO(audio), name or "<bytes>"
  else:
    # As bytes, because a file name need not be text.
    handle, name = os.fsencode(audio), name or os.fspath(audio)
    if not os.path.isfile(handle):
      raise BadClipError(name, "no such file")
  try:
    samples, rate_hz = _read(handle, name, start_s, end_s)
  except soundfile.LibsndfileError as error:
    raise BadClipError(name, _explain(error, name)) from error
  waveform = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
  _check(waveform, name)
  if rate_hz != sample_rate_hz:
    waveform = soxr.resample(waveform, rate_hz, sample_rate_hz, quality="HQ")
    if waveform.size == 0:
      raise BadClipError(name, f"empty at {sample_rate_hz} Hz")
  return np.ascontiguousarray(waveform, dtype=np.float32)


def duration_s(path: str | os.PathLike) -> float:
  """Returns the seconds of a file, as its header tells; decodes nothing.

  Raises:
    BadClipError: missing, or no audio.
  """
  name = os.fspath(path)
  if not os.path.isfile(path):
    raise BadClipError(name, "no such file")
  try:
    return soundfile.info(os.fsencode(path)).duration
  except soundfile.LibsndfileError as error:
    raise BadClipError(name, _explain(error, name)) from error


def stream_audio(
  path: str | os.PathLike,
  *,
  sample_rate_hz: int,
  block_s: float,
  start_s: float | None = None,
  end_s: float | None = None,
  name: str | None = None,
) -> Iterator[Float[np.ndarray, " n"]]:
  """Decodes a file of any length, block by block.

  Args:
    path: of a file.
    sample_rate_hz: rate of the result.
    block_s: seconds of a block, about; memory is that of one.
    start_s: as of `load_audio`.
    end_s: as of `load_audio`.
    name: as of `load_audio`.

  Yields:
    Mono samples, which joined are what `load_audio` returns, but for rounding
    where the rate changes.

  Raises:
    BadClipError: as `load_audio`, possibly only after some blocks.
  """
  name = name or os.fspath(path)
  if not os.path.isfile(path):
    raise BadClipError(name, "no such file")
  peak, decoded, produced = 0.0, 0, 0
  try:
    with soundfile.SoundFile(os.fsencode(path)) as file:
      promised, rate_hz = _seek(file, name, start_s, end_s), file.samplerate
      resampler = soxr.ResampleStream(
        rate_hz, sample_rate_hz, num_channels=1, quality="HQ"
      )
      while decoded < promised:
        size = min(round(block_s * rate_hz), promised - decoded)
        samples = file.read(size, dtype="float32", always_2d=True)
        if not len(samples):
          break
        decoded += len(samples)
        waveform = samples.mean(axis=1)
        peak = float(np.maximum(peak, np.abs(waveform).max()))
        if not np.isfinite(peak):
          _check_peak(peak, name, decoded)
        if rate_hz != sample_rate_hz:
          waveform = resampler.resample_chunk(waveform)
        produced += len(waveform)
        yield waveform
      if decoded and rate_hz != sample_rate_hz:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        produced += len(rest)
        yield rest
  except soundfile.LibsndfileError as error:
    raise BadClipError(name, _explain(error, name)) from error
  if decoded < (1 - MAX_MISSING_FRACTION) * promised:
    raise BadClipError(
      name, f"truncated: {decoded} of {promised} samples decode"
    )
  _check_peak(peak, name, produced)


def _read(handle, name: str, start_s: float | None, end_s: float | None):
  """Returns [frames, channels] float32 and the rate of the file."""
  with soundfile.SoundFile(handle) as file:
    rate_hz = file.samplerate
    promised = _seek(file, name, start_s, end_s)
    samples = file.read(promised, dtype="float32", always_2d=True)
  if len(samples) < (1 - MAX_MISSING_FRACTION) * promised:
    raise BadClipError(
      name, f"truncated: {len(samples)} of {promised} samples decode"
    )
  return samples, rate_hz


def _seek(
  file: soundfile.SoundFile,
  name: str,
  start_s: float | None,
  end_s: float | None,
) -> int:
  """Goes to the beginning of a part of a file; returns its frames."""
  rate_hz = file.samplerate
  start = round(start_s * rate_hz) if start_s else 0
  stop = file.frames
  if end_s is not None:
    stop = min(stop, round(end_s * rate_hz))
  if stop <= start:
    raise BadClipError(
      name,
      f"empty: samples {start} to {stop} of {file.frames} at {rate_hz} Hz",
    )
  preroll = min(start, MP3_PREROLL) if file.format == "MP3" else 0
  if start:
    file.seek(start - preroll)
    file.read(preroll)
  return stop - start


def _explain(error: soundfile.LibsndfileError, name: str) -> str:
  """Says what libsndfile said, and what to do about formats it lacks."""
  reason = f"cannot decode: {error.error_string}"
  suffix = pathlib.Path(name).suffix.lower()
  if suffix in OTHER_SUFFIXES:
    reason += (
      f" ({suffix} is not an audio format of libsndfile; convert it with"
      " `ffmpeg -i IN -ac 1 OUT.flac`)"
    )
  return reason


def _check(waveform: np.ndarray, name: str) -> None:
  """Raises BadClipError for samples nothing can be learnt from."""
  peak = float(np.abs(waveform).max()) if waveform.size else 0.0
  _check_peak(peak, name, waveform.size)


def _check_peak(peak: float, name: str, num_samples: int) -> None:
  if not num_samples:
    raise BadClipError(name, "empty: no samples")
  if not np.isfinite(peak):
    raise BadClipError(name, "holds NaN or infinite samples")
  if peak < SILENCE:
    raise BadClipError(name, f"silent: peak {peak:.1e} is 0 in 16 bits")


def fit_length(
  waveform: np.ndarray,
  num_samples: int,
  *,
  mode: str,
  offset: int,
) -> np.ndarray:
  """Cuts or lengthens a clip to `num_samples`.

  Args:
    waveform: [n], any dtype, at least one sample.
    num_samples: length of the result.
    mode: what a short clip is filled with: "pad" zeros at the end, "repeat"
      itself.
    offset: index of the first sample. A long clip is cut there; a short one
      is rotated there in mode "repeat" and left in place in mode "pad".

  Returns:
    [num_samples] of the same dtype.

  Raises:
    ValueError: unknown mode, empty clip, or a cut past the end.
  """
  if mode not in ("pad", "repeat"):
    raise ValueError(f"mode={mode!r}; choose 'pad' or 'repeat'")
  length = len(waveform)
  if length == 0:
    raise ValueError(f"an empty waveform cannot be fitted to {num_samples}")
  if length >= num_samples:
    if not 0 <= offset <= length - num_samples:
      raise ValueError(
        f"offset {offset} + {num_samples} samples leaves a clip of {length}; "
        f"use 0 to {length - num_samples}"
      )
    return waveform[offset : offset + num_samples]
  if mode == "pad":
    return np.pad(waveform, (0, num_samples - length))
  end = offset + num_samples
  return np.tile(waveform, -(-end // length))[offset:end]


def float_to_pcm16(
  waveform: Float[np.ndarray, " *n"],
) -> Int16[np.ndarray, " *n"]:
  """Rounds [-1, 1) to 16-bit integers; louder samples are clipped."""
  return np.clip(np.rint(waveform * 32768), -32768, 32767).astype(np.int16)


def as_pcm16(
  waveform: Float[np.ndarray, " *n"] | Int16[np.ndarray, " *n"],
) -> Int16[np.ndarray, " *n"]:
  """Returns 16-bit integers as they are, else what they round to."""
  if waveform.dtype == np.int16:
    return waveform
  return float_to_pcm16(waveform)


def as_float(
  waveform: Float[np.ndarray, " *n"] | Int16[np.ndarray, " *n"],
) -> Float[np.ndarray, " *n"]:
  """Returns floats as they are, and 16-bit integers in [-1, 1)."""
  if waveform.dtype == np.int16:
    return pcm16_to_float(waveform)
  return waveform


def pcm16_to_float(
  waveform: Int16[np.ndarray, " *n"],
) -> Float[np.ndarray, " *n"]:
  """The inverse of `float_to_pcm16` for samples that were not clipped."""
  return waveform.astype(np.float32) / np.float32(32768)
