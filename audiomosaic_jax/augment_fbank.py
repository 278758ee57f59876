"""Spectrogram augmentations on the device, for a batch of log-mel fbanks.

Every function takes (key, fbank [B, T, F] of natural-log energies, before
standardisation) and returns the same shape; each example draws for itself.
What costs Fourier transforms on a waveform is here a small matrix product: on
two CPU cores 64 clips of 1.3 s took 9 ms to move in pitch and tempo, and 136 ms
to be shifted in pitch alone as waveforms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from audiomosaic_jax import augment

Fbank = Float[Array, "batch frames mel_bins"]


def _mel(hz: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Kaldi's mel scale, as in `features.mel_filter_bank`."""
  return 1127.0 * jnp.log1p(hz / 700.0)


def pitch_and_tempo(
  key: Key[Array, ""],
  fbank: Fbank,
  *,
  low_freq_hz: float,
  high_freq_hz: float,
  p: float,
  min_semitones: float,
  max_semitones: float,
  min_rate: float,
  max_rate: float,
) -> Fbank:
  """Moves the spectrum along both axes: another pitch, another speed.

  With r = 2^(semitones / 12), y[k, f] = x[k rate, f / r]: what was at 1 kHz
  lies at r kHz, what happened at 1 s happens at 1 / rate s. Energies between
  two bands or frames are interpolated. Beyond the last band the floor of the
  clip continues, beyond the last frame the clip starts again.

  Args:
    key: random key.
    fbank: log-mel energies.
    low_freq_hz: lower edge of the first filter.
    high_freq_hz: upper edge of the last filter.
    p: probability.
    min_semitones: largest shift down, negative.
    max_semitones: largest shift up; uniform in semitones.
    min_rate: slowest; 0.5 takes twice as long.
    max_rate: fastest; uniform on a logarithmic scale.

  Returns:
    The moved spectrogram, or the input, per example.

  Reference: random resize crop of BYOL for Audio (Niizumi et al. 2021), which
    stands for pitch shift and time stretch; here in their units.
  """
  batch, _, num_bins = fbank.shape
  key_apply, key_pitch, key_rate = jax.random.split(key, 3)
  semitones = jax.random.uniform(
    key_pitch, (batch,), minval=min_semitones, maxval=max_semitones
  )
  rate = jnp.exp(
    jax.random.uniform(
      key_rate, (batch,), minval=np.log(min_rate), maxval=np.log(max_rate)
    )
  )
  low, high = _mel(jnp.float32(low_freq_hz)), _mel(jnp.float32(high_freq_hz))
  spacing = (high - low) / (num_bins + 1)
  centers = 700.0 * jnp.expm1(
    (low + spacing * jnp.arange(1, num_bins + 1)) / 1127.0
  )
  source_hz = centers * jnp.exp2(-semitones / 12.0)[:, None]
  position = (_mel(source_hz) - low) / spacing - 1.0
  changed = _read_frames(_read_bands(fbank, position), rate)
  return augment.choose(key_apply, p, changed, fbank)


def _read_bands(
  fbank: Fbank, position: Float[Array, "batch mel_bins"]
) -> Fbank:
  """Interpolates energies at fractional bands; above the last is silence."""
  num_bins = fbank.shape[2]
  inside = jnp.clip(position, 0.0, num_bins - 1.0)
  distance = inside[:, None, :] - jnp.arange(num_bins)[:, None]
  weights = jnp.maximum(1.0 - jnp.abs(distance), 0.0)
  moved = jnp.matmul(fbank, weights, precision=lax.Precision.HIGHEST)
  silence = fbank.min(axis=(1, 2), keepdims=True)
  return jnp.where((position > num_bins - 1)[:, None], silence, moved)


def _read_frames(fbank: Fbank, rate: Float[Array, "batch"]) -> Fbank:
  """Interpolates energies at the frames k rate, starting again at the end."""
  num_frames = fbank.shape[1]
  position = jnp.arange(num_frames) * rate[:, None]
  index = jnp.floor(position).astype(jnp.int32)
  fraction = (position - index)[..., None]

  def rows(index):
    return jnp.take_along_axis(
      fbank, (index % num_frames)[..., None], axis=1, mode="clip"
    )

  here = rows(index)
  return here + fraction * (rows(index + 1) - here)


def frequency_mask(
  key: Key[Array, ""], fbank: Fbank, *, max_width: int
) -> Fbank:
  """Fills a random range of bands with 0, in all frames of an example.

  The range has width floor(u max_width) and starts at floor(v (F - width)),
  u and v uniform in [0, 1).

  Parity: 0 is a log energy before standardisation, so what is masked becomes
  louder than the average clip, not silent. The published encoders are
  fine-tuned so.

  Args:
    key: random key.
    fbank: log-mel energies.
    max_width: in bands, exclusive; 0 masks nothing.

  Returns:
    The masked spectrograms.

  Reference: torchaudio.transforms.FrequencyMasking; Park et al. 2019
    (SpecAugment).
  """
  hidden = _random_ranges(key, fbank.shape[0], fbank.shape[2], max_width)
  return jnp.where(hidden[:, None, :], 0.0, fbank)


def time_mask(key: Key[Array, ""], fbank: Fbank, *, max_width: int) -> Fbank:
  """Fills a random range of frames with 0; see `frequency_mask`.

  Args:
    key: random key.
    fbank: log-mel energies.
    max_width: in frames, exclusive; 0 masks nothing.

  Returns:
    The masked spectrograms.

  Reference: torchaudio.transforms.TimeMasking.
  """
  hidden = _random_ranges(key, fbank.shape[0], fbank.shape[1], max_width)
  return jnp.where(hidden[:, :, None], 0.0, fbank)


def _random_ranges(
  key: Key[Array, ""], batch: int, length: int, max_width: int
) -> Bool[Array, "batch length"]:
  """Returns True in one range per example, as torchaudio draws it."""
  if not 0 <= max_width <= length:
    raise ValueError(
      f"max_width {max_width} of a mask does not fit an axis of {length}; "
      f"use 0 to {length}"
    )
  u, v = jax.random.uniform(key, (2, batch))
  width = jnp.floor(u * max_width)
  start = jnp.floor(v * (length - width))
  place = jnp.arange(length)
  inside = place >= start[:, None]
  return inside & (place < (start + width)[:, None])


def uniform_noise(
  key: Key[Array, ""], fbank: Fbank, *, max_scale: float
) -> Fbank:
  """Adds s n, n uniform in [0, 1) everywhere, s in [0, max_scale) per example.

  Args:
    key: random key.
    fbank: spectrograms; the published recipe does this after standardisation.
    max_scale: largest s.

  Returns:
    The spectrograms with noise.

  Reference: the noise of the released Speech Commands recipe, 0.1.
  """
  key_noise, key_scale = jax.random.split(key)
  scale = jax.random.uniform(key_scale, (fbank.shape[0], 1, 1))
  noise = jax.random.uniform(key_noise, fbank.shape)
  return fbank + max_scale * scale * noise


def roll_frames(key: Key[Array, ""], fbank: Fbank, *, max_shift: int) -> Fbank:
  """Rolls in time by a whole number from -max_shift to max_shift - 1.

  Args:
    key: random key.
    fbank: spectrograms.
    max_shift: in frames; 0 leaves them alone.

  Returns:
    The rolled spectrograms.

  Reference: numpy's randint(-10, 10) of the released Speech Commands recipe.
  """
  if not max_shift:
    return fbank
  shift = jax.random.randint(key, fbank.shape[:1], -max_shift, max_shift)
  return jax.vmap(lambda x, n: jnp.roll(x, n, axis=0))(fbank, shift)


AUGMENTATIONS: dict[str, Callable[..., Fbank]] = {
  "pitch_and_tempo": pitch_and_tempo,
  "frequency_mask": frequency_mask,
  "time_mask": time_mask,
  "uniform_noise": uniform_noise,
  "roll_frames": roll_frames,
}


def augment_fbank(
  key: Key[Array, ""],
  fbank: Fbank,
  *,
  low_freq_hz: float,
  high_freq_hz: float,
  order: Sequence[str],
  **parameters: Any,
) -> Fbank:
  """Applies the named augmentations one after the other.

  Args:
    key: random key; the i-th step uses fold_in(key, i).
    fbank: log-mel energies, not yet standardised.
    low_freq_hz: lower edge of the first filter.
    high_freq_hz: upper edge of the last filter.
    order: names from AUGMENTATIONS; a name may occur more than once.
    **parameters: mappings of keyword arguments; those not in `order` may stay.

  Returns:
    The augmented spectrograms, same shape.

  Raises:
    ValueError: a name that is not in AUGMENTATIONS, or one without parameters.
  """
  known = {"low_freq_hz": low_freq_hz, "high_freq_hz": high_freq_hz}
  return augment.in_order(AUGMENTATIONS, key, fbank, known, order, parameters)
