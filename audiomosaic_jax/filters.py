"""High-pass and band-stop filters for a batch of waveforms, a setting each.

They are magnitudes on the spectrum of the whole clip: every function takes
waveform [B, S] and one parameter per example [B], has static shapes, and uses
no scan over samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Waveform = Float[Array, "batch samples"]


def _fast_length(samples: int) -> int:
  """Returns the smallest 2^a 3^b 5^c that is at least `samples`."""
  odd_parts = (3**b * 5**c for b in range(9) for c in range(6))
  return min(odd << (-(-samples // odd) - 1).bit_length() for odd in odd_parts)


def _warp(
  hz: Float[Array, "*batch"], sample_rate_hz: int
) -> Float[Array, "*batch"]:
  """The bilinear transform's frequency axis, tan(pi f / sample rate)."""
  highest_hz = 0.9999 * sample_rate_hz / 2
  return jnp.tan(jnp.pi * jnp.minimum(hz, highest_hz) / sample_rate_hz)


def _filter(
  waveform: Waveform, magnitude: Float[Array, "batch bins"], length: int
) -> Waveform:
  """Multiplies the spectrum of the whole clip by a zero-phase magnitude.

  A circular convolution puts the end of the clip next to its beginning. Half
  a cosine bridges the two, so nothing rings across and a constant is removed
  without a transient.
  """
  samples = waveform.shape[1]
  angle = np.linspace(0.0, np.pi, length - samples + 2)[1:-1]
  fade = (0.5 - 0.5 * np.cos(angle)).astype(np.float32)
  first, last = waveform[:, :1], waveform[:, -1:]
  bridged = jnp.concatenate([waveform, last + (first - last) * fade], axis=1)
  filtered = jnp.fft.irfft(jnp.fft.rfft(bridged) * magnitude, length)
  return filtered[:, :samples]


def _filter_axis(samples: int) -> tuple[Float[np.ndarray, "bins"], int]:
  """Returns the warped frequency of every bin, and the FFT's length."""
  length = _fast_length(samples + max(samples // 64, 1024))
  # Divided first: pi k / length can round to above pi / 2, where tan < 0.
  omega = np.tan(np.pi * (np.arange(length // 2 + 1) / length))
  return omega.astype(np.float32), length


def _butterworth(
  log_ratio: Float[Array, "batch bins"], order: Int[Array, "batch"]
) -> Float[Array, "batch bins"]:
  """Returns (1 + w^(2 order))^(-1/2) of the prototype's frequency w = e^x."""
  exponent = 2.0 * order.astype(jnp.float32)[:, None]
  return jnp.sqrt(jax.nn.sigmoid(-exponent * log_ratio))


def high_pass_filter(
  waveform: Waveform,
  cutoff_hz: Float[Array, "batch"],
  order: Int[Array, "batch"],
  *,
  sample_rate_hz: int,
) -> Waveform:
  """Removes what lies below the cut-off.

  |H|^2 = 1 / (1 + (tan(pi fc / fs) / tan(pi f / fs))^(2 order)): the digital
  Butterworth filter, -3 dB at fc and 6 dB/octave per order below it.

  Args:
    waveform: samples.
    cutoff_hz: cut-off frequency of each example.
    order: order of each example's filter.
    sample_rate_hz: sample rate.

  Returns:
    The filtered waveform, with the phases of the input.

  Reference: scipy.signal.butter(order, fc, "highpass"), magnitude to 0.1 dB.
  """
  omega, length = _filter_axis(waveform.shape[1])
  cutoff = _warp(cutoff_hz, sample_rate_hz)[:, None]
  log_ratio = jnp.log(cutoff) - jnp.log(omega)
  return _filter(waveform, _butterworth(log_ratio, order), length)


def band_stop_filter(
  waveform: Waveform,
  low_hz: Float[Array, "batch"],
  high_hz: Float[Array, "batch"],
  order: Int[Array, "batch"],
  *,
  sample_rate_hz: int,
) -> Waveform:
  """Removes what lies between two edges.

  |H|^2 = 1 / (1 + ((h - l) W / (l h - W^2))^(2 order)), W = tan(pi f / fs) and
  l, h its values at the edges: the digital Butterworth band-stop, -3 dB at
  both edges.

  Args:
    waveform: samples.
    low_hz: lower edge of each example's band.
    high_hz: upper edge; one above the Nyquist frequency is moved to it.
    order: order of each example's filter.
    sample_rate_hz: sample rate.

  Returns:
    The filtered waveform, with the phases of the input.

  Reference: scipy.signal.butter(order, edges, "bandstop"), magnitude to
    0.1 dB.
  """
  omega, length = _filter_axis(waveform.shape[1])
  low = _warp(low_hz, sample_rate_hz)[:, None]
  high = _warp(high_hz, sample_rate_hz)[:, None]
  distance = jnp.abs(low * high - jnp.square(omega))
  log_ratio = jnp.log((high - low) * omega) - jnp.log(distance)
  return _filter(waveform, _butterworth(log_ratio, order), length)
