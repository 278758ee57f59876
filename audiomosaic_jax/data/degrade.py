"""Clips as other microphones, rooms and files would have them.

For tests of a finished classifier: what is done to a clip depends on the seed
and the clip alone, so every classifier hears the same.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import soundfile
import soxr
from jaxtyping import Float
from scipy import signal

from audiomosaic_jax.data import audio_io, wrappers
from audiomosaic_jax.data.sources import Source

Waveform = Float[np.ndarray, " n"]
# (waveform, generator of random numbers) -> waveform of the same length.
Degradation = Callable[[Waveform, np.random.Generator], Waveform]

CLEAN = "clean"
# Name -> (format, subtype) of libsndfile.
CODECS = {
  "mp3": ("MP3", "MPEG_LAYER_III"),
  "vorbis": ("OGG", "VORBIS"),
  "opus": ("OGG", "OPUS"),
}


class DegradedSource(wrappers.Wrapper):
  """The clips of a source, each degraded."""

  def __init__(self, source: Source, degradation: Degradation, *, seed: int):
    """Wraps a source.

    Args:
      source: where clips come from.
      degradation: what is done to each.
      seed: of what is random in it.
    """
    super().__init__(source)
    self.degradation, self.seed = degradation, seed

  def __getitem__(self, index: int) -> dict:
    element = self.source[index]
    rng = np.random.default_rng([self.seed, int(element["id"])])
    waveform = audio_io.as_float(element["waveform"])
    waveform = self.degradation(waveform, rng)
    return {**element, "waveform": waveform.astype(np.float32)}


def white_noise(
  waveform: Waveform, rng: np.random.Generator, *, snr_db: float
) -> Waveform:
  """Adds Gaussian noise so many decibels below the mean power of the clip."""
  power = np.mean(np.square(waveform)) * 10 ** (-snr_db / 10)
  return waveform + np.sqrt(power) * rng.standard_normal(len(waveform))


def simulated_room(
  waveform: Waveform,
  rng: np.random.Generator,
  *,
  t60_s: float,
  sample_rate_hz: int,
) -> Waveform:
  """Convolves with noise that decays by 60 dB in `t60_s` seconds.

  The direct sound and all that follows it have the same energy.
  """
  time_s = np.arange(round(t60_s * sample_rate_hz)) / sample_rate_hz
  tail = rng.standard_normal(len(time_s)) * 10 ** (-3 * time_s / t60_s)
  tail /= np.linalg.norm(tail)
  return room(waveform, rng, impulse_response=np.append(1.0, tail))


def room(
  waveform: Waveform,
  rng: np.random.Generator,
  *,
  impulse_response: Float[np.ndarray, " m"],
) -> Waveform:
  """Convolves with a measured response; level and length stay."""
  del rng
  # What sounds before the loudest sample of the response is travel time.
  start = int(np.abs(impulse_response).argmax())
  wet = signal.fftconvolve(waveform, impulse_response[start:])
  wet = wet[: len(waveform)]
  level = np.linalg.norm(waveform) / max(np.linalg.norm(wet), 1e-12)
  return level * wet


def codec(
  waveform: Waveform,
  rng: np.random.Generator,
  *,
  name: str,
  compression: float,
  sample_rate_hz: int,
) -> Waveform:
  """Encodes as a lossy file and decodes it again.

  Args:
    waveform: samples.
    rng: not used.
    name: of CODECS.
    compression: from 0, best, to 1, smallest.
    sample_rate_hz: of the samples; the codec must know it.
  """
  del rng
  file_format, subtype = CODECS[name]
  file = io.BytesIO()
  soundfile.write(
    file,
    np.clip(waveform, -1.0, 1.0),
    sample_rate_hz,
    format=file_format,
    subtype=subtype,
    compression_level=compression,
  )
  file.seek(0)
  decoded, _ = soundfile.read(file, dtype="float32")
  return audio_io.fit_length(decoded, len(waveform), mode="pad", offset=0)


def resampled(
  waveform: Waveform,
  rng: np.random.Generator,
  *,
  rate_hz: int,
  sample_rate_hz: int,
) -> Waveform:
  """Resamples to another rate and back: what lies above half of it is lost."""
  del rng
  there = soxr.resample(waveform, sample_rate_hz, rate_hz, quality="HQ")
  back = soxr.resample(there, rate_hz, sample_rate_hz, quality="HQ")
  return audio_io.fit_length(back, len(waveform), mode="pad", offset=0)


def degradations(
  *,
  noise_snr_db: Sequence[float],
  room_t60_s: Sequence[float],
  impulse_responses: Sequence[str],
  codecs: Sequence[str],
  codec_compression: float,
  resample_hz: Sequence[int],
  sample_rate_hz: int,
) -> Mapping[str, Degradation]:
  """Returns name -> degradation, for tables; the first leaves clips alone.

  Args:
    noise_snr_db: signal-to-noise ratios of white noise.
    room_t60_s: reverberation times of simulated rooms.
    impulse_responses: audio files with the responses of real ones.
    codecs: names of CODECS.
    codec_compression: from 0, best, to 1, smallest.
    resample_hz: sample rates to go through.
    sample_rate_hz: of the clips.

  Raises:
    BadClipError: a response that cannot be read.
    ValueError: an unknown codec, or one that the installed library lacks.
  """
  rate = {"sample_rate_hz": sample_rate_hz}
  found: dict[str, Degradation] = {CLEAN: lambda waveform, rng: waveform}
  for snr_db in noise_snr_db:
    found[f"noise at {snr_db:g} dB"] = functools.partial(
      white_noise, snr_db=snr_db
    )
  for t60_s in room_t60_s:
    found[f"room of {t60_s:g} s"] = functools.partial(
      simulated_room, t60_s=t60_s, **rate
    )
  for path in impulse_responses:
    response = audio_io.load_audio(path, **rate)
    found[f"room {path}"] = functools.partial(room, impulse_response=response)
  for name in codecs:
    if name not in CODECS:
      raise ValueError(f"codec {name!r} is unknown; use one of {[*CODECS]}")
    found[name] = functools.partial(
      codec, name=name, compression=codec_compression, **rate
    )
    _check_codec(found[name], sample_rate_hz)
  for rate_hz in resample_hz:
    found[f"through {rate_hz} Hz"] = functools.partial(
      resampled, rate_hz=rate_hz, **rate
    )
  return found


def _check_codec(encode: functools.partial, sample_rate_hz: int) -> None:
  """Raises ValueError if the library cannot do it."""
  try:
    encode(np.zeros(sample_rate_hz // 10), np.random.default_rng(0))
  except (soundfile.LibsndfileError, ValueError) as error:
    raise ValueError(
      f"libsndfile {soundfile.__libsndfile_version__} cannot encode "
      f"{encode.keywords} ({error}); leave the codec out, compress by less, "
      "or test at another sample rate"
    ) from error
