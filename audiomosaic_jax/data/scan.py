"""Decodes every clip of a source once and writes down what it found."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import soundfile
import tqdm

from audiomosaic_jax.data import audio_io, host_fbank, parallel
from audiomosaic_jax.data.sources import Source

# What a clip is found to be; "ok" can be trained on and tested with.
OK, MISSING, UNREADABLE, SILENT = "ok", "missing", "unreadable", "silent"


@dataclasses.dataclass
class Moments:
  """Sums of filter-bank values, which add up over clips.

  Attributes:
    values: how many.
    total: their sum.
    squares: the sum of their squares.
  """

  values: int = 0
  total: float = 0.0
  squares: float = 0.0

  def add(self, other: "Moments") -> None:
    self.values += other.values
    self.total += other.total
    self.squares += other.squares

  def mean_and_std(self) -> tuple[float, float] | None:
    """Returns mean and standard deviation; None of no values."""
    if not self.values:
      return None
    mean = self.total / self.values
    return mean, max(self.squares / self.values - mean**2, 0.0) ** 0.5


class ClipScan(NamedTuple):
  """What is known of a clip after it was decoded.

  Attributes:
    id: its name.
    status: one of OK, MISSING, UNREADABLE, SILENT.
    reason: why it is not OK.
    file_rate_hz: sample rate of its file; 0 if unknown.
    seconds: how long it is; 0 if unknown.
    digest: hash of its decoded samples; empty if there are none.
  """

  id: str
  status: str
  reason: str = ""
  file_rate_hz: int = 0
  seconds: float = 0.0
  digest: str = ""


class SourceScan(NamedTuple):
  """What is known of a source after all of it was decoded.

  Attributes:
    clips: of every clip, in the order of the source.
    real: moments of the filter bank of all frames.
    padded: the same after cutting or zero-padding to the length that an
      encoder sees, which is how the published means were computed.
  """

  clips: list[ClipScan]
  real: Moments
  padded: Moments


def scan_source(
  source: Source,
  *,
  sample_rate_hz: int,
  num_frames: int,
  num_threads: int,
  title: str,
) -> SourceScan:
  """Decodes all clips in threads; a bad one is written down, not raised.

  Args:
    source: clips that decode at `sample_rate_hz`.
    sample_rate_hz: their rate.
    num_frames: length of the filter bank that an encoder sees.
    num_threads: clips decoded at once.
    title: what the progress bar says.
  """

  def scan(index: int):
    return scan_clip(
      source, index, sample_rate_hz=sample_rate_hz, num_frames=num_frames
    )

  found = parallel.parallel_map(scan, range(len(source)), num_threads)
  result = SourceScan([], Moments(), Moments())
  for clip, real, padded in tqdm.tqdm(
    found, desc=title, total=len(source), unit=" clips"
  ):
    result.clips.append(clip)
    result.real.add(real)
    result.padded.add(padded)
  return result


def scan_clip(
  source: Source, index: int, *, sample_rate_hz: int, num_frames: int
) -> tuple[ClipScan, Moments, Moments]:
  """Decodes one clip; see `SourceScan` for the two moments."""
  name = source.ids[index]
  rate_hz = _file_rate(source.path(index))
  try:
    waveform = audio_io.as_float(source[index]["waveform"])
  except (ValueError, OSError, RuntimeError) as error:
    status, reason = _classify(error)
    return ClipScan(name, status, reason, rate_hz), Moments(), Moments()
  clip = ClipScan(
    id=name,
    status=OK,
    file_rate_hz=rate_hz,
    seconds=len(waveform) / sample_rate_hz,
    digest=digest(waveform),
  )
  return clip, *fbank_moments(waveform, sample_rate_hz, num_frames)


def _file_rate(path: str | None) -> int:
  try:
    if path is None:
      return 0
    return soundfile.info(os.fsencode(path)).samplerate
  except (soundfile.LibsndfileError, OSError):
    return 0


def _classify(error: Exception) -> tuple[str, str]:
  """Returns status and reason of a clip that cannot be read."""
  reason = error.reason if isinstance(error, audio_io.BadClipError) else ""
  if reason == "no such file":
    return MISSING, reason
  if reason.startswith("silent"):
    return SILENT, reason
  return UNREADABLE, reason or f"{type(error).__name__}: {error}"


def digest(waveform: np.ndarray) -> str:
  """Returns a hash of the samples as 16-bit integers.

  Of the decoded samples and not of the file, so that the same clip as .wav
  and as .flac, or under another name, has the same hash: 128 bits of sha256.
  """
  samples = audio_io.float_to_pcm16(waveform).astype("<i2").tobytes()
  return hashlib.sha256(samples).hexdigest()[:32]


def fbank_moments(
  waveform: np.ndarray, sample_rate_hz: int, num_frames: int
) -> tuple[Moments, Moments]:
  """Returns the moments of the filter bank of a clip, as is and padded."""
  settings = dict(host_fbank.FBANK, sample_rate_hz=sample_rate_hz)
  settings["high_freq_hz"] = min(settings["high_freq_hz"], sample_rate_hz / 2)
  frame_samples = int(sample_rate_hz * settings["frame_length_ms"] * 1e-3)
  if len(waveform) < frame_samples:
    return Moments(), Moments()
  fbank = host_fbank.log_mel_fbank(waveform, **settings).astype(np.float64)
  padded = _moments(fbank[:num_frames])
  padded.values = num_frames * fbank.shape[1]  # Padding is zeros.
  return _moments(fbank), padded


def _moments(values: np.ndarray) -> Moments:
  return Moments(
    values.size, float(values.sum()), float(np.square(values).sum())
  )


def ids_sha256(ids: Sequence[str]) -> str:
  """Returns what `LC_ALL=C sort ids.txt | sha256sum` prints."""
  text = ids_text(ids).encode(errors="surrogateescape")
  return hashlib.sha256(text).hexdigest()


def ids_text(ids: Sequence[str]) -> str:
  """Returns names sorted, one a line."""
  return "".join(f"{name}\n" for name in sorted(ids))
