"""Tempo and pitch of a batch of waveforms, with a setting each.

The deterministic half of `augment`: every function takes waveform [B, S] and
one parameter per example [B], has static shapes, and uses no scan over samples
and no gather of single samples, so that it runs well on a TPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, Float, Int, Shaped

Waveform = Float[Array, "batch samples"]
Spectra = Complex[Array, "batch frames bins"]

# Window of the phase vocoder; four of them overlap at every sample.
_WINDOW_S = 0.064
# Pitch ratios are multiples of 1 / 256: at most 4 cents from the one asked for
# shifts of four semitones.
_RATIO_STEPS = 256
# Length of the resampling kernel on either side, in input samples.
_KERNEL_RADIUS = 24
# Samples per row of the gather in `_slices_by_rows`: a TPU register's width.
_ROW = 128
# Spectra of a power below this are silence, of phase zero.
_SILENCE = 1e-24


def _stft(waveform: Waveform, window: Float[np.ndarray, "window"]) -> Spectra:
  """Short-time spectra a quarter window apart, the first centred on sample 0.

  They run on past the end of the clip until the last two are zero. A frame is
  four neighbouring blocks side by side.
  """
  batch, samples = waveform.shape
  half, hop = len(window) // 2, len(window) // 4
  num_frames = -(-(samples + half) // hop) + 2
  num_blocks = num_frames + 3
  padding = ((0, 0), (half, num_blocks * hop - samples - half))
  blocks = jnp.pad(waveform, padding).reshape(batch, num_blocks, hop)
  frames = [blocks[:, i : i + num_frames] for i in range(4)]
  return jnp.fft.rfft(jnp.concatenate(frames, axis=-1) * window)


def _istft(
  spectra: Spectra, window: Float[np.ndarray, "window"], samples: int
) -> Float[Array, "batch out_samples"]:
  """Inverse of `_stft`: overlap-add as the sum of four shifted arrays."""
  batch, num_frames, _ = spectra.shape
  length, hop = len(window), len(window) // 4
  frames = jnp.fft.irfft(spectra, length) * window
  blocks = frames.reshape(batch, num_frames, 4, hop)
  total = sum(
    jnp.pad(blocks[:, :, i], ((0, 0), (i, 3 - i), (0, 0))) for i in range(4)
  )
  weight = np.zeros((num_frames + 3, hop), np.float32)
  for i, quarter in enumerate(np.square(window).reshape(4, hop)):
    weight[i : i + num_frames] += quarter
  keep = slice(length // 2, length // 2 + samples)
  return total.reshape(batch, -1)[:, keep] / weight.reshape(-1)[keep]


def _polar(
  z: Complex[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Complex[Array, "*shape"]]:
  """Returns |z| and z / |z|; 0 and 1 for silence, with finite gradients."""
  power = jnp.square(z.real) + jnp.square(z.imag)
  audible = power > _SILENCE
  inverse = lax.rsqrt(jnp.where(audible, power, 1.0))
  return power * inverse, jnp.where(audible, z * inverse, 1.0)


def _follow(
  x: Shaped[Array, "*frames bins"],
  from_below: Bool[Array, "*frames bins"],
  from_above: Bool[Array, "*frames bins"],
) -> Shaped[Array, "*frames bins"]:
  """Replaces the marked bins by the bin below or above them."""
  padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 1)])
  x = jnp.where(from_above, padded[..., 2:], x)
  return jnp.where(from_below, padded[..., :-2], x)


def _rotations(
  turns: Complex[Array, "batch turns bins"],
) -> Complex[Array, "batch turns+1 bins"]:
  """Accumulates phase over the frames, locked across neighbouring bins.

  r[0] = 1 and r[k + 1] = r[k] unit(turns[k]), both at the loudest of a bin and
  its two neighbours. That keeps the bins of a partial together, and those of
  an onset; left alone they drift apart and the result loses 3 dB. Choosing
  one neighbour, unlike averaging, does not amplify rounding errors.
  """
  loudness, turns = _polar(turns)
  padded = jnp.pad(loudness, ((0, 0), (0, 0), (1, 1)))
  below, above = padded[..., :-2], padded[..., 2:]
  from_below = (below > loudness) & (below >= above)
  from_above = (above > loudness) & (above > below)

  start = jnp.ones_like(turns[:, 0])
  inputs = (turns, from_below, from_above)
  inputs = tuple(x.swapaxes(0, 1) for x in inputs)
  rotations = lax.platform_dependent(
    start, *inputs, cuda=_accumulate_on_gpu, default=_accumulate
  )
  return jnp.concatenate([start[:, None], rotations.swapaxes(0, 1)], axis=1)


def _accumulate(start, *inputs):
  """Returns the rotation after every turn."""

  def step(rotation, inputs):
    turn, *sources = inputs
    # The barrier keeps XLA from computing the product once per neighbour.
    rotation = _follow(lax.optimization_barrier(rotation * turn), *sources)
    return rotation, rotation

  return lax.scan(step, start, inputs)[1]


def _accumulate_on_gpu(start, *inputs):
  """Does the same in one kernel a turn; those of the loop take longer."""

  def step(rotation, inputs):
    turn, *sources = inputs
    # The barrier keeps XLA from fusing turns, with three products per product.
    rotation = lax.optimization_barrier(_follow(rotation * turn, *sources))
    return rotation, rotation

  return lax.scan(step, start, inputs, unroll=8)[1]


def stretch_time(
  waveform: Waveform,
  rate: Float[Array, "batch"],
  *,
  samples: int,
  sample_rate_hz: int,
) -> Float[Array, "batch out_samples"]:
  """Plays each waveform `rate` times as fast and keeps its pitch.

  A phase-locked phase vocoder. Output frame k reads the spectra X at position
  t = k rate, j = floor(t): magnitudes are interpolated between |X[j]| and
  |X[j + 1]|, phases are those of X[j] turned by a rotation r[k]. From k to
  k + 1 the input would go on to X[j + 1] but X[j'] is read instead, so the
  rotation makes up the difference, arg X[j + 1] - arg X[j'].
  Phases are kept as unit complex numbers: no arctangent, sine or unwrapping.

  Args:
    waveform: samples.
    rate: speed of each example; 1 returns the waveform.
    samples: length of the result, cut or filled with zeros.
    sample_rate_hz: sample rate.

  Returns:
    The stretched waveform.

  Reference: Laroche and Dolson, 1999, where every bin follows its peak; here
    it follows its loudest neighbour, and so reaches the peak in a few frames.
  """
  length = 1 << round(math.log2(_WINDOW_S * sample_rate_hz))
  window = np.hanning(length + 1)[:-1].astype(np.float32)
  spectra = _stft(waveform, window)
  num_frames = -(-(samples + length // 2) // (length // 4))
  position = jnp.arange(num_frames) * rate[:, None]
  index = jnp.floor(position).astype(jnp.int32)
  fraction = (position - index)[..., None]
  # Past the end every frame is as empty as the last two.
  index = jnp.minimum(index, spectra.shape[1] - 2)[..., None]
  here = jnp.take_along_axis(spectra, index, axis=1, mode="clip")
  after = jnp.take_along_axis(spectra, index + 1, axis=1, mode="clip")
  rotations = _rotations(after[:, :-1] * here[:, 1:].conj())
  loudness, phase = _polar(here)
  loudness += fraction * (_polar(after)[0] - loudness)
  return _istft(loudness * phase * rotations, window, samples)


def resample(
  waveform: Waveform, step: Int[Array, "batch"], *, min_step: int, max_step: int
) -> Float[Array, "batch out_samples"]:
  """Reads each waveform at the times n step / 256, band-limited.

  With such steps 256 samples of output take a whole number of input samples,
  so each block of output is one small matrix, the same for all blocks, times a
  contiguous slice of input. The kernel is a sinc, cut at the lower of the two
  Nyquist frequencies, under a (1 - u^2)^2 window.

  Args:
    waveform: samples.
    step: 256 times the speed of each example.
    min_step: smallest step that occurs; it sets the length of the result.
    max_step: largest step that occurs.

  Returns:
    256 ceil(S / min_step) samples; zeros after the end of the clip.
  """
  batch, samples = waveform.shape
  num_blocks = -(-samples // min_step)
  slice_length = max_step + 2 * _KERNEL_RADIUS
  ratio = step.astype(jnp.float32)[:, None, None] / _RATIO_STEPS
  source = np.arange(slice_length, dtype=np.float32)[:, None] - _KERNEL_RADIUS
  distance = source - np.arange(_RATIO_STEPS, dtype=np.float32) * ratio
  cutoff = 0.95 * jnp.minimum(1.0, 1.0 / ratio)
  taper = jnp.maximum(1.0 - jnp.square(distance / _KERNEL_RADIUS), 0.0)
  kernel = cutoff * _sinc(cutoff * distance) * jnp.square(taper)
  padded = jnp.pad(waveform, ((0, 0), (_KERNEL_RADIUS, slice_length)))
  # A slice that would start after the end starts at the zeros behind it.
  starts = jnp.minimum(
    jnp.arange(num_blocks) * step[:, None], samples + _KERNEL_RADIUS
  )
  slices = _slices(padded, starts, slice_length)
  blocks = jnp.matmul(slices, kernel, precision=lax.Precision.HIGHEST)
  return blocks.reshape(batch, num_blocks * _RATIO_STEPS)


def _sinc(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """Returns sin(pi x) / (pi x); shard_map refuses that of jax 0.12."""
  angle = jnp.pi * jnp.where(x == 0, 1.0, x)
  return jnp.where(x == 0, 1.0, jnp.sin(angle) / angle)


def _slices(
  x: Float[Array, "batch samples"], starts: Int[Array, "batch n"], length: int
) -> Float[Array, "batch n length"]:
  """Returns x[b, start : start + length] for every start of every example."""
  return lax.platform_dependent(
    x,
    starts,
    cpu=functools.partial(_slices_one_by_one, length=length),
    default=functools.partial(_slices_by_rows, length=length),
  )


def _slices_one_by_one(x, starts, length):
  """Copies each slice: the fastest on a CPU."""

  def cut(row, start):
    return lax.dynamic_slice(row, (start,), (length,))

  return jax.vmap(jax.vmap(cut, in_axes=(None, 0)))(x, starts)


def _slices_by_rows(x, starts, length):
  """Gathers whole rows of samples, then shifts each by its remainder.

  The shift is by 1, 2, 4 ... samples, as the bits of the remainder say. One
  by one, slices compile to a loop on an accelerator, which took two fifths of
  a training step (compiled for TPU v5e).
  """
  batch, num_slices = starts.shape
  num_rows = -(-(length + _ROW - 1) // _ROW)
  rows = jnp.pad(x, ((0, 0), (0, num_rows * _ROW - x.shape[1] % _ROW)))
  rows = rows.reshape(batch, -1, _ROW)
  first, remainder = starts // _ROW, starts % _ROW
  index = (first[:, :, None] + jnp.arange(num_rows)).reshape(batch, -1, 1)
  cut = jnp.take_along_axis(rows, index, axis=1, mode="clip")
  cut = cut.reshape(batch, num_slices, num_rows * _ROW)
  for bit in range(_ROW.bit_length() - 1):
    shift = 1 << bit
    moves = (remainder >> bit & 1)[:, :, None] == 1
    cut = jnp.where(moves, cut[..., shift:], cut[..., :-shift])
  return cut[..., :length]


def shift_pitch(
  waveform: Waveform,
  semitones: Float[Array, "batch"],
  *,
  min_semitones: float,
  max_semitones: float,
  sample_rate_hz: int,
) -> Waveform:
  """Multiplies all frequencies by 2^(semitones / 12) and keeps the tempo.

  Reading the waveform r times as fast moves pitch and tempo; stretching the
  result at rate 1 / r brings the tempo back. r is rounded to 1 / 256.

  Args:
    waveform: samples.
    semitones: shift of each example, up or down.
    min_semitones: lowest shift that occurs.
    max_semitones: highest shift that occurs.
    sample_rate_hz: sample rate.

  Returns:
    The shifted waveform. What would lie above the Nyquist frequency is gone.
  """
  step = jnp.round(_RATIO_STEPS * jnp.exp2(semitones / 12.0)).astype(jnp.int32)
  min_step, max_step = (
    round(_RATIO_STEPS * 2.0 ** (limit / 12.0))
    for limit in (min_semitones, max_semitones)
  )
  faster = resample(waveform, step, min_step=min_step, max_step=max_step)
  rate = _RATIO_STEPS / step.astype(jnp.float32)
  return stretch_time(
    faster, rate, samples=waveform.shape[1], sample_rate_hz=sample_rate_hz
  )
