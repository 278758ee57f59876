"""The log-mel filter bank in NumPy, for tools that must not start JAX.

An audit runs in threads on a login node, or next to a training that holds the
accelerator; training computes the same numbers with `features.log_mel_fbank`,
and a test holds the two together.
"""

import functools

import numpy as np
from jaxtyping import Float

# The published settings, as configs/common.py has them.
FBANK = {
  "frame_length_ms": 25.0,
  "frame_shift_ms": 10.0,
  "num_mel_bins": 128,
  "low_freq_hz": 20.0,
  "high_freq_hz": 8_000.0,
  "preemphasis": 0.97,
}
EPSILON = float(np.finfo(np.float32).eps)


@functools.lru_cache(maxsize=8)
def _mel_filters(
  sample_rate_hz: int,
  fft_length: int,
  num_mel_bins: int,
  low_freq_hz: float,
  high_freq_hz: float,
) -> Float[np.ndarray, "fft_bins mel_bins"]:
  """Returns Kaldi's triangles, equally spaced on the mel scale."""

  def mel(hz):
    return 1127.0 * np.log1p(np.asarray(hz) / 700.0)

  points = np.linspace(mel(low_freq_hz), mel(high_freq_hz), num_mel_bins + 2)
  left, center, right = points[:-2], points[1:-1], points[2:]
  bins = mel(np.arange(fft_length // 2) * sample_rate_hz / fft_length)[:, None]
  rise = (bins - left) / (center - left)
  fall = (right - bins) / (right - center)
  return np.maximum(np.minimum(rise, fall), 0.0).astype(np.float32)


def log_mel_fbank(
  waveform: Float[np.ndarray, " samples"],
  *,
  sample_rate_hz: int,
  frame_length_ms: float,
  frame_shift_ms: float,
  num_mel_bins: int,
  low_freq_hz: float,
  high_freq_hz: float,
  preemphasis: float,
) -> Float[np.ndarray, "frames mel_bins"]:
  """Returns what `features.log_mel_fbank` returns, for one waveform.

  Args:
    waveform: samples, at least one frame.
    sample_rate_hz: sample rate.
    frame_length_ms: length of a frame.
    frame_shift_ms: time from one frame to the next.
    num_mel_bins: number of filters.
    low_freq_hz: lower edge of the first filter.
    high_freq_hz: upper edge of the last filter.
    preemphasis: coefficient of the first difference.
  """
  length = int(sample_rate_hz * frame_length_ms * 1e-3)
  shift = int(sample_rate_hz * frame_shift_ms * 1e-3)
  fft_length = 1 << (length - 1).bit_length()
  windows = np.lib.stride_tricks.sliding_window_view(waveform, length)
  frames = windows[::shift] - windows[::shift].mean(axis=1, keepdims=True)
  previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
  frames = (frames - preemphasis * previous) * np.hanning(length)
  spectrum = np.fft.rfft(frames.astype(np.float32), fft_length)
  spectrum = spectrum[:, : fft_length // 2]
  power = np.square(spectrum.real) + np.square(spectrum.imag)
  filters = _mel_filters(
    sample_rate_hz, fft_length, num_mel_bins, low_freq_hz, high_freq_hz
  )
  energies = power.astype(np.float32) @ filters
  return np.log(np.maximum(energies, np.float32(EPSILON)))
