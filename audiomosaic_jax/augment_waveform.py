"""Waveform augmentations on the device: one jitted function for a whole batch.

Every function takes (key, waveform [B, S]) and returns a waveform of the same
shape. Each example draws its own decision and its own parameters; shapes never
depend on them, so a transform is computed for all examples and kept for those
that drew it. Parameters have the names and the meaning of `audiomentations`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from audiomosaic_jax import augment, dsp, filters

Waveform = Float[Array, "batch samples"]


def _uniform(
  key: Key[Array, ""], batch: int, low: float, high: float
) -> Float[Array, "batch"]:
  """Draws one parameter per example."""
  return jax.random.uniform(key, (batch,), minval=low, maxval=high)


def _decibels_to_ratio(db: Float[Array, "batch"]) -> Float[Array, "batch"]:
  return jnp.exp(db * (math.log(10.0) / 20.0))


def roll_and_scale(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  alpha: float,
  beta: float,
  offset: float,
) -> Waveform:
  """Rolls in time by a random offset and scales: g roll(x, n).

  n is uniform over the clip and g = Beta(alpha, beta) + offset, for every
  example (there is no probability: the published recipe always does it).

  Args:
    key: random key.
    waveform: samples.
    alpha: first parameter of the Beta distribution.
    beta: its second parameter.
    offset: added to the draw; 0.5 centres symmetric gains at 1.

  Returns:
    The waveform, rolled and scaled.

  Reference: the `roll_mag_aug` of the released data set class.
  """
  batch, samples = waveform.shape
  key_shift, key_gain = jax.random.split(key)
  shift = jax.random.randint(key_shift, (batch,), 0, samples)
  scale = jax.random.beta(key_gain, alpha, beta, (batch, 1)) + offset
  return jax.vmap(jnp.roll)(waveform, shift) * scale.astype(waveform.dtype)


def polarity_inversion(
  key: Key[Array, ""], waveform: Waveform, *, p: float
) -> Waveform:
  """Flips the sign: -x, with probability p.

  Args:
    key: random key.
    waveform: samples.
    p: probability.

  Returns:
    The waveform or its negative, per example.
  """
  return augment.choose(key, p, -waveform, waveform)


def gaussian_snr(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  p: float,
  min_snr_db: float,
  max_snr_db: float,
) -> Waveform:
  """Adds white noise at a random signal-to-noise ratio.

  x + n with n ~ N(0, s^2), s = rms(x) 10^(-snr / 20), snr uniform in decibels.

  Args:
    key: random key.
    waveform: samples; silence stays silent.
    p: probability.
    min_snr_db: loudest noise.
    max_snr_db: quietest noise.

  Returns:
    The noisy waveform, or the input, per example.

  Reference: audiomentations.AddGaussianSNR.
  """
  key_apply, key_snr, key_noise = jax.random.split(key, 3)
  snr_db = _uniform(key_snr, waveform.shape[0], min_snr_db, max_snr_db)
  rms = jnp.sqrt(jnp.mean(jnp.square(waveform), axis=1, keepdims=True))
  scale = rms * _decibels_to_ratio(-snr_db)[:, None]
  noise = jax.random.normal(key_noise, waveform.shape, waveform.dtype)
  return augment.choose(key_apply, p, waveform + scale * noise, waveform)


def gain(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  p: float,
  min_gain_db: float,
  max_gain_db: float,
) -> Waveform:
  """Scales by 10^(g / 20), g uniform in decibels, without clipping.

  Args:
    key: random key.
    waveform: samples.
    p: probability.
    min_gain_db: smallest gain.
    max_gain_db: largest gain.

  Returns:
    The scaled waveform, or the input, per example.

  Reference: audiomentations.Gain.
  """
  key_apply, key_gain = jax.random.split(key)
  gain_db = _uniform(key_gain, waveform.shape[0], min_gain_db, max_gain_db)
  changed = waveform * _decibels_to_ratio(gain_db)[:, None]
  return augment.choose(key_apply, p, changed, waveform)


def _mel_uniform(
  key: Key[Array, ""], batch: int, low_hz: float, high_hz: float
) -> Float[Array, "batch"]:
  """Draws frequencies uniformly on the mel scale, 2595 log10(1 + f / 700)."""
  low, high = (math.log1p(hz / 700.0) for hz in (low_hz, high_hz))
  return 700.0 * jnp.expm1(_uniform(key, batch, low, high))


def _filter_order(
  key: Key[Array, ""], batch: int, min_rolloff: int, max_rolloff: int
) -> Int[Array, "batch"]:
  """Draws filter orders: a Butterworth filter falls 6 dB/octave per order."""
  if min_rolloff % 6 or max_rolloff % 6 or not 0 < min_rolloff <= max_rolloff:
    raise ValueError(
      f"min_rolloff={min_rolloff} and max_rolloff={max_rolloff} dB/octave "
      "must be positive multiples of 6 in ascending order; for example 12, 24"
    )
  low, high = min_rolloff // 6, max_rolloff // 6
  return jax.random.randint(key, (batch,), low, high + 1)


def high_pass(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  sample_rate_hz: int,
  p: float,
  min_cutoff_freq: float,
  max_cutoff_freq: float,
  min_rolloff: int,
  max_rolloff: int,
) -> Waveform:
  """Removes what lies below a random cut-off, uniform in mel.

  Differs from upstream: the same magnitude but zero phase, since filter banks
  see magnitudes only: two FFTs and no recursion.

  Args:
    key: random key.
    waveform: samples.
    sample_rate_hz: sample rate.
    p: probability.
    min_cutoff_freq: lowest cut-off in Hz.
    max_cutoff_freq: highest cut-off in Hz.
    min_rolloff: gentlest slope in dB/octave, a multiple of 6.
    max_rolloff: steepest slope in dB/octave, a multiple of 6.

  Returns:
    The filtered waveform, or the input, per example.

  Raises:
    ValueError: a slope that is not a multiple of 6.

  Reference: audiomentations.HighPassFilter(zero_phase=False).
  """
  batch = waveform.shape[0]
  key_apply, key_order, key_cutoff = jax.random.split(key, 3)
  changed = filters.high_pass_filter(
    waveform,
    _mel_uniform(key_cutoff, batch, min_cutoff_freq, max_cutoff_freq),
    _filter_order(key_order, batch, min_rolloff, max_rolloff),
    sample_rate_hz=sample_rate_hz,
  )
  return augment.choose(key_apply, p, changed, waveform)


def band_stop(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  sample_rate_hz: int,
  p: float,
  min_center_freq: float,
  max_center_freq: float,
  min_bandwidth_fraction: float,
  max_bandwidth_fraction: float,
  min_rolloff: int,
  max_rolloff: int,
) -> Waveform:
  """Removes a random band, its centre uniform in mel.

  Its edges are center (1 -+ fraction / 2). Differs from upstream: zero phase,
  as in `high_pass`.

  Args:
    key: random key.
    waveform: samples.
    sample_rate_hz: sample rate.
    p: probability.
    min_center_freq: lowest centre in Hz.
    max_center_freq: highest centre in Hz.
    min_bandwidth_fraction: narrowest band, as a fraction of its centre.
    max_bandwidth_fraction: widest band, below 2.
    min_rolloff: gentlest slope in dB/octave, a multiple of 6.
    max_rolloff: steepest slope in dB/octave, a multiple of 6.

  Returns:
    The filtered waveform, or the input, per example.

  Raises:
    ValueError: a slope that is not a multiple of 6, or a band that reaches
      below 0 Hz.

  Reference: audiomentations.BandStopFilter(zero_phase=False).
  """
  if not 0.0 < min_bandwidth_fraction <= max_bandwidth_fraction < 2.0:
    raise ValueError(
      f"min_bandwidth_fraction={min_bandwidth_fraction} and "
      f"max_bandwidth_fraction={max_bandwidth_fraction} must satisfy "
      "0 < min <= max < 2, or a band would reach below 0 Hz"
    )
  batch = waveform.shape[0]
  key_apply, key_order, key_center, key_width = jax.random.split(key, 4)
  center_hz = _mel_uniform(key_center, batch, min_center_freq, max_center_freq)
  half = 0.5 * _uniform(
    key_width, batch, min_bandwidth_fraction, max_bandwidth_fraction
  )
  changed = filters.band_stop_filter(
    waveform,
    center_hz * (1.0 - half),
    center_hz * (1.0 + half),
    _filter_order(key_order, batch, min_rolloff, max_rolloff),
    sample_rate_hz=sample_rate_hz,
  )
  return augment.choose(key_apply, p, changed, waveform)


def time_stretch(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  sample_rate_hz: int,
  p: float,
  min_rate: float,
  max_rate: float,
) -> Waveform:
  """Changes the tempo by a random rate, keeping pitch and length.

  Above rate 1 zeros follow its early end; below, its end is cut off.

  Args:
    key: random key.
    waveform: samples.
    sample_rate_hz: sample rate.
    p: probability.
    min_rate: slowest; 0.5 takes twice as long.
    max_rate: fastest.

  Returns:
    The stretched waveform, or the input, per example.

  Reference: audiomentations.TimeStretch(leave_length_unchanged=True).
  """
  key_apply, key_rate = jax.random.split(key)
  changed = dsp.stretch_time(
    waveform,
    _uniform(key_rate, waveform.shape[0], min_rate, max_rate),
    samples=waveform.shape[1],
    sample_rate_hz=sample_rate_hz,
  )
  return augment.choose(key_apply, p, changed, waveform)


def pitch_shift(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  sample_rate_hz: int,
  p: float,
  min_semitones: float,
  max_semitones: float,
) -> Waveform:
  """Moves the pitch by a random interval, keeping tempo and length.

  Args:
    key: random key.
    waveform: samples.
    sample_rate_hz: sample rate.
    p: probability.
    min_semitones: largest shift down, negative.
    max_semitones: largest shift up.

  Returns:
    The shifted waveform, or the input, per example.

  Reference: audiomentations.PitchShift.
  """
  key_apply, key_shift = jax.random.split(key)
  changed = dsp.shift_pitch(
    waveform,
    _uniform(key_shift, waveform.shape[0], min_semitones, max_semitones),
    min_semitones=min_semitones,
    max_semitones=max_semitones,
    sample_rate_hz=sample_rate_hz,
  )
  return augment.choose(key_apply, p, changed, waveform)


AUGMENTATIONS: dict[str, Callable[..., Waveform]] = {
  "roll_and_scale": roll_and_scale,
  "polarity_inversion": polarity_inversion,
  "time_stretch": time_stretch,
  "gaussian_snr": gaussian_snr,
  "gain": gain,
  "high_pass": high_pass,
  "band_stop": band_stop,
  "pitch_shift": pitch_shift,
}


def augment_waveform(
  key: Key[Array, ""],
  waveform: Waveform,
  *,
  sample_rate_hz: int,
  order: Sequence[str],
  **parameters: Any,
) -> Waveform:
  """Applies the named augmentations one after the other.

  Args:
    key: random key; the i-th step uses fold_in(key, i).
    waveform: samples.
    sample_rate_hz: sample rate.
    order: names from AUGMENTATIONS; a name may occur more than once.
    **parameters: mappings of keyword arguments; those not in `order` may stay.

  Returns:
    The augmented waveform, same shape.

  Raises:
    ValueError: a name that is not in AUGMENTATIONS, or one without parameters.
  """
  known = {"sample_rate_hz": sample_rate_hz}
  return augment.in_order(
    AUGMENTATIONS, key, waveform, known, order, parameters
  )
