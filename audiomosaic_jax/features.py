"""Waveform to log-mel filter bank: Kaldi's fbank in JAX, batched, on device.

Everything here is a pure function of arrays and can be jitted, vmapped and
differentiated; only `check_waveform` runs on the host.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int16, Shaped

AnyArray = Array | np.ndarray

# Kaldi's floor before the logarithm.
EPSILON = float(np.finfo(np.float32).eps)


def pcm_to_float(
  pcm: Int16[AnyArray, "*batch samples"] | Float[AnyArray, "*batch samples"],
) -> Float[Array, "*batch samples"]:
  """Converts 16-bit PCM to float32 in [-1, 1); floating point passes through.

  x = pcm / 32768, the convention of soundfile and torchaudio.

  Args:
    pcm: int16 samples, or samples that are floating point already.

  Returns:
    float32 samples.
  """
  if jnp.issubdtype(pcm.dtype, jnp.floating):
    return jnp.asarray(pcm, jnp.float32)
  return jnp.asarray(pcm).astype(jnp.float32) * (1.0 / 32768.0)


def check_waveform(
  waveform: Shaped[AnyArray, "*batch samples"],
  *,
  sample_rate_hz: int,
  expected_sample_rate_hz: int,
  min_samples: int,
) -> None:
  """Refuses audio that would give a wrong or an empty filter bank.

  Reads the samples, so call it on the host and not under `jit`.

  Args:
    waveform: samples, time last.
    sample_rate_hz: rate at which the waveform was sampled.
    expected_sample_rate_hz: rate that the model was trained at.
    min_samples: smallest usable length, at least one analysis frame.

  Raises:
    ValueError: another sample rate, too short, NaN or infinite.
  """
  if sample_rate_hz != expected_sample_rate_hz:
    raise ValueError(
      f"waveform is sampled at {sample_rate_hz} Hz but the model expects "
      f"{expected_sample_rate_hz} Hz; resample it, for example with "
      f"librosa.resample(x, orig_sr={sample_rate_hz}, "
      f"target_sr={expected_sample_rate_hz})"
    )
  samples = np.asarray(waveform)
  if samples.shape[-1] < min_samples:
    raise ValueError(
      f"waveform has {samples.shape[-1]} samples but at least {min_samples} "
      f"are needed ({1e3 * min_samples / sample_rate_hz:g} ms); pad it with "
      "zeros or drop the clip"
    )
  finite = np.isfinite(samples)
  if not finite.all():
    raise ValueError(
      f"waveform has {np.size(finite) - np.sum(finite)} NaN or infinite of "
      f"{np.size(finite)} samples; fix the decoder or use np.nan_to_num"
    )


@functools.lru_cache(maxsize=32)
def mel_filter_bank(
  *,
  sample_rate_hz: int,
  fft_length: int,
  num_mel_bins: int,
  low_freq_hz: float,
  high_freq_hz: float,
) -> Float[np.ndarray, "fft_bins mel_bins"]:
  """Returns Kaldi's triangular filters, equally spaced on the mel scale.

  mel(f) = 1127 ln(1 + f / 700); filter k rises from mel point k to k + 1 and
  falls to k + 2, linearly in mel. The Nyquist bin has no weight in Kaldi and
  is left out. Filters narrower than the spacing of the FFT are all zero.

  Args:
    sample_rate_hz: sample rate.
    fft_length: even number of points of the FFT.
    num_mel_bins: number of filters.
    low_freq_hz: lower edge of the first filter.
    high_freq_hz: upper edge of the last filter.

  Returns:
    float32 weights of the bins 0 .. fft_length // 2 - 1. Read-only: cached.

  Raises:
    ValueError: the edges are not 0 <= low < high <= Nyquist.

  Reference: torchaudio.compliance.kaldi.get_mel_banks, tested bit for bit.
    The arithmetic is float32 there and here, 1.4e-5 from exact filters.
  """
  if not 0.0 <= low_freq_hz < high_freq_hz <= sample_rate_hz / 2:
    raise ValueError(
      f"low_freq_hz={low_freq_hz:g} and high_freq_hz={high_freq_hz:g} must "
      f"satisfy 0 <= low < high <= {sample_rate_hz / 2:g} (half the sample "
      "rate)"
    )
  low = 1127.0 * math.log(1.0 + low_freq_hz / 700.0)
  high = 1127.0 * math.log(1.0 + high_freq_hz / 700.0)
  spacing = (high - low) / (num_mel_bins + 1)
  index = np.arange(num_mel_bins, dtype=np.float32)
  left, center, right = (
    np.float32(low) + (index + np.float32(i)) * np.float32(spacing)
    for i in range(3)
  )
  hz = np.arange(fft_length // 2, dtype=np.float32) * np.float32(
    sample_rate_hz / fft_length
  )
  # A correctly rounded float32 logarithm, which numpy's own is not.
  log = np.log(np.float64(np.float32(1.0) + hz / np.float32(700.0)))
  mel = (np.float32(1127.0) * log.astype(np.float32))[:, None]
  weights = np.minimum(
    (mel - left) / (center - left), (right - mel) / (right - center)
  )
  weights = np.maximum(weights, 0.0).astype(np.float32)
  weights.flags.writeable = False
  return weights


def _frames(
  waveform: Float[Array, "*batch samples"], *, length: int, shift: int
) -> Float[Array, "*batch frames length"]:
  """Cuts overlapping frames that lie entirely inside the waveform.

  The waveform is cut into blocks of `shift` samples, and a frame is a few
  neighbouring blocks side by side: contiguous copies instead of a gather.
  """
  *batch, samples = waveform.shape
  num_frames = 1 + (samples - length) // shift
  blocks_per_frame = -(-length // shift)
  num_blocks = num_frames + blocks_per_frame - 1
  missing = max(num_blocks * shift - samples, 0)
  padding = [(0, 0)] * len(batch) + [(0, missing)]
  blocks = jnp.pad(waveform, padding)[..., : num_blocks * shift]
  blocks = blocks.reshape(*batch, num_blocks, shift)
  frames = [
    blocks[..., i : i + num_frames, : min(shift, length - i * shift)]
    for i in range(blocks_per_frame)
  ]
  return jnp.concatenate(frames, axis=-1)


def log_mel_fbank(
  waveform: Float[AnyArray, "*batch samples"],
  *,
  sample_rate_hz: int,
  frame_length_ms: float,
  frame_shift_ms: float,
  num_mel_bins: int,
  low_freq_hz: float,
  high_freq_hz: float,
  preemphasis: float,
) -> Float[Array, "*batch frames mel_bins"]:
  """Returns the natural logarithm of Kaldi's mel filter-bank energies.

  Per frame x of `frame_length_ms` every `frame_shift_ms`:
    x = x - mean(x);  y[n] = x[n] - preemphasis x[max(n - 1, 0)];
    fbank = ln max(eps, |rfft(hanning y)|^2 @ mel_filter_bank)
  with the symmetric Hann window, an FFT of the next power of two, no dither
  and no energy column. Frames that would reach past the end are dropped
  (Kaldi's snip_edges). Silence gives ln eps and a zero gradient.

  Args:
    waveform: samples, time last. A constant offset has no effect.
    sample_rate_hz: sample rate.
    frame_length_ms: length of a frame.
    frame_shift_ms: time from one frame to the next.
    num_mel_bins: number of filters.
    low_freq_hz: lower edge of the first filter.
    high_freq_hz: upper edge of the last filter.
    preemphasis: coefficient of the first difference, 0 for none.

  Returns:
    fbank, time before frequency; frames = 1 + (samples - length) // shift.

  Raises:
    ValueError: the waveform is shorter than one frame.

  Reference: torchaudio.compliance.kaldi.fbank(htk_compat=True, dither=0,
    window_type="hanning") in float64: mean absolute error 1e-6; 1.6e-4 on a
    chirp, where Kaldi in float32 has 1.8e-4.
  """
  length = int(sample_rate_hz * frame_length_ms * 1e-3)
  shift = int(sample_rate_hz * frame_shift_ms * 1e-3)
  if waveform.shape[-1] < length:
    raise ValueError(
      f"waveform has {waveform.shape[-1]} samples but one frame of "
      f"{frame_length_ms:g} ms needs {length}; pad it with zeros or drop it"
    )
  fft_length = 1 << (length - 1).bit_length()
  window = np.hanning(length).astype(np.float32)
  weights = mel_filter_bank(
    sample_rate_hz=sample_rate_hz,
    fft_length=fft_length,
    num_mel_bins=num_mel_bins,
    low_freq_hz=low_freq_hz,
    high_freq_hz=high_freq_hz,
  )
  waveform = jnp.asarray(waveform, jnp.float32)
  frames = _frames(waveform, length=length, shift=shift)
  frames = frames - frames.mean(axis=-1, keepdims=True)
  previous = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
  frames = (frames - preemphasis * previous) * window
  spectrum = jnp.fft.rfft(frames, fft_length)[..., : fft_length // 2]
  power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
  # TPUs multiply float32 in bfloat16 unless told otherwise.
  energies = jnp.matmul(power, weights, precision=lax.Precision.HIGHEST)
  return jnp.log(jnp.maximum(energies, EPSILON))


def standardize(
  fbank: Float[AnyArray, "*batch frames mel_bins"],
  *,
  num_frames: int,
  mean: float,
  std: float,
) -> Float[Array, "*batch fixed_frames mel_bins"]:
  """Fits the filter bank to `num_frames`, then standardises it.

  fbank is cut, or padded with zeros at its end, and then (x - mean) / (2 std).
  Padding comes first, so a padded frame is -mean / (2 std): that is what the
  published encoders have seen.

  Args:
    fbank: log-mel filter bank.
    num_frames: number of frames of the result.
    mean: mean of the training set's filter banks.
    std: their standard deviation.

  Returns:
    The filter bank that an encoder takes.

  Reference: section 4.1 and the released data set class, tested to 1e-4.
  """
  fbank = jnp.asarray(fbank)[..., :num_frames, :]
  missing = num_frames - fbank.shape[-2]
  padding = [(0, 0)] * (fbank.ndim - 2) + [(0, missing), (0, 0)]
  return (jnp.pad(fbank, padding) - mean) / (2.0 * std)
