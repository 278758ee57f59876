"""The function that is exported: clips of one length to their embeddings.

  fbank     = log_mel(waveform)                        of the whole clip
  windows   = fbank, with zeros behind it, cut every num_frames
  out       = Embedder((windows - mean) / (2 std), columns with a frame)
  embedding = sum over the windows of  columns / all columns * out.embedding
  frames    = out.frames of the columns with a frame

It is what `Encoder.embed_batch` says of the same clips, as one program without
Python around it. Neither batch nor length need be known when it is traced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from audiomosaic_jax import features
from audiomosaic_jax.encoder import Encoder

# What the program returns; the last only of a classifier.
OUTPUTS = ("embedding", "frames", "logits")


def output_names(encoder: Encoder) -> tuple[str, ...]:
  """Returns what the program of an encoder returns."""
  return OUTPUTS if encoder.model.num_classes else OUTPUTS[:-1]


def make_program(
  encoder: Encoder, log_mel: Callable[..., Float[Array, "B T F"]]
) -> Callable[[Float[Array, "B S"]], dict[str, jax.Array]]:
  """Returns the function from waveforms to embeddings.

  Args:
    encoder: its parameters become constants of the program.
    log_mel: `fft_log_mel` or `conv_log_mel`.

  Returns:
    waveform [B, S], at the rate of the encoder and at least a frame long, to
    "embedding" [B, E], "frames" [B, T, D] and of a classifier "logits"
    [B, classes].

  Reference: `Encoder.embed_batch`, tested to 5e-6 with `fft_log_mel`.
  """
  config, names = encoder.config, output_names(encoder)
  # A scan in steps of several blocks is more than jax2onnx knows, and a kernel
  # of cuDNN runs on one kind of machine.
  plain = encoder.model.encoder.clone(scan_unroll=1, attention="xla")
  model = encoder.model.clone(projector=None, encoder=plain)
  length, size = config.spectrogram.num_frames, config.model.encoder.patch_size
  mean, std = config.spectrogram.mean, config.spectrogram.std
  columns = length // size

  def program(waveform):
    fbank = log_mel(waveform, **config.fbank)
    batch, frames, bins = fbank.shape
    windows = (frames + length - 1) // length
    # No jnp.pad on the batch here: jax2onnx needs its size for that.
    missing = jnp.zeros((batch, windows * length - frames, bins))
    fbank = (jnp.concatenate([fbank, missing], axis=1) - mean) / (2.0 * std)
    total = (frames + size - 1) // size
    counts = jnp.minimum(total - columns * jnp.arange(windows), columns)
    out = model.apply(
      encoder.variables,
      fbank.reshape(batch * windows, length, bins),
      jnp.broadcast_to(counts, (batch, windows)).reshape(batch * windows),
      max_columns=columns,
      return_layers=False,
    )
    weights = (counts / total)[None, :, None]

    def average(rows):
      rows = rows.reshape(batch, windows, rows.shape[-1])
      return jnp.sum(rows * weights, axis=1)

    width = out["frames"].shape[-1]
    frames = out["frames"].reshape(batch, windows * columns, width)
    joined = {name: average(out[name]) for name in names if name != "frames"}
    return joined | {"frames": frames[:, :total]}

  return program


def fft_log_mel(
  waveform: Float[Array, "B S"], **fbank: Any
) -> Float[Array, "B T F"]:
  """Is `features.log_mel_fbank` for a length that may be a symbol.

  Args:
    waveform: clips.
    **fbank: other arguments of `features.log_mel_fbank`.

  Returns:
    fbank, bit for bit the same.
  """
  length, shift = _frame(**fbank)
  blocks = -(-length // shift)
  frames = 1 + (waveform.shape[-1] - length) // shift
  # Whole blocks: what is missing from the last is no longer asked, since a
  # symbol cannot tell.
  waveform = jnp.pad(waveform, ((0, 0), (0, blocks * shift - length)))
  waveform = waveform[:, : (frames + blocks - 1) * shift]
  return features.log_mel_fbank(waveform, **fbank)


def conv_log_mel(
  waveform: Float[Array, "B S"], **fbank: Any
) -> Float[Array, "B T F"]:
  """Is `features.log_mel_fbank` without a Fourier transform.

  All between the samples of a frame and its spectrum is linear, so it is one
  matrix, and frames with a hop are a convolution with a stride:
    spectrum = conv(waveform, kernel_matrix);  |spectrum|^2, mel, ln as ever

  Args:
    waveform: clips.
    **fbank: other arguments of `features.log_mel_fbank`.

  Returns:
    fbank.

  Reference: `features.log_mel_fbank`; on recordings 1e-5 away on average and
    5e-3 at worst, in bands far below the loudest, where float32 ends. Most of
    it is the rounding of the FFT: from float64 this one is 3e-3 away at worst.
  """
  length, shift = _frame(**fbank)
  kernel = kernel_matrix(length, fbank["preemphasis"])
  bins = kernel.shape[1] // 2
  # As an image one pixel wide: not all tool-chains know 1-D convolutions.
  spectrum = lax.conv_general_dilated(
    waveform[:, :, None, None],
    jnp.asarray(kernel)[:, None, None, :],
    window_strides=(shift, 1),
    padding="VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=lax.Precision.HIGHEST,
  )[:, :, 0]
  square = jnp.square(spectrum)
  weights = features.mel_filter_bank(
    sample_rate_hz=fbank["sample_rate_hz"],
    fft_length=2 * bins,
    num_mel_bins=fbank["num_mel_bins"],
    low_freq_hz=fbank["low_freq_hz"],
    high_freq_hz=fbank["high_freq_hz"],
  )
  energies = jnp.matmul(
    square[..., :bins] + square[..., bins:],
    weights,
    precision=lax.Precision.HIGHEST,
  )
  return jnp.log(jnp.maximum(energies, features.EPSILON))


def kernel_matrix(
  length: int, preemphasis: float
) -> Float[np.ndarray, "length parts"]:
  """Returns the map from a frame to the spectrum that Kaldi takes of it.

  Removal of the mean, pre-emphasis, symmetric Hann window and the Fourier
  transform of the next power of two, multiplied in float64.

  Args:
    length: samples of a frame.
    preemphasis: as of `features.log_mel_fbank`.

  Returns:
    float32; the real parts of all bins below Nyquist, then the imaginary ones.
  """
  fft_length = 1 << (length - 1).bit_length()
  rows = np.eye(length) - 1.0 / length
  previous = np.concatenate([rows[:, :1], rows[:, :-1]], axis=1)
  windowed = (rows - preemphasis * previous) * np.hanning(length)
  spectrum = np.fft.rfft(windowed, fft_length)[:, : fft_length // 2]
  parts = np.concatenate([spectrum.real, spectrum.imag], axis=1)
  return parts.astype(np.float32)


def _frame(
  *, sample_rate_hz: int, frame_length_ms: float, frame_shift_ms: float, **_
) -> tuple[int, int]:
  """Returns samples of a frame, and from one to the next."""
  return (
    int(sample_rate_hz * frame_length_ms * 1e-3),
    int(sample_rate_hz * frame_shift_ms * 1e-3),
  )
