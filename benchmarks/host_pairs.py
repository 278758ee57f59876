"""Training pairs made on the host alone, as PyTorch projects make them."""

import functools
from collections.abc import Callable

import ml_collections
import numpy as np
import soundfile as sf

from benchmarks import input_pipeline

ConfigDict = ml_collections.ConfigDict


class HostPairs:
  """Clips of files as pairs of filter banks, all made on the host."""

  def __init__(self, paths: list[str], config: ConfigDict, fbank: Callable):
    """Makes the chain of augmentations.

    Args:
      paths: audio files of one clip each.
      config: the experiment.
      fbank: samples -> filter bank, of `host_fbank`.
    """
    self._paths = paths
    self._samples = config.data.pipeline.clip_samples
    self._spectrogram = config.spectrogram
    self._fbank = fbank
    self._chain = input_pipeline.host_pipeline()

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> np.ndarray:
    """Returns [2, T, F], standardised."""
    pair = input_pipeline.on_the_host(
      self._chain, self._fbank, self._paths[index], 0, self._samples
    )
    frames, mean, std = (
      self._spectrogram[name] for name in ("num_frames", "mean", "std")
    )
    pair = pair[:, :frames]
    pair = np.pad(pair, [(0, 0), (0, frames - pair.shape[1]), (0, 0)])
    return ((pair - mean) / (2 * std)).astype(np.float32)


def host_fbank(config: ConfigDict) -> tuple[str, Callable]:
  """Returns the name of a filter bank of the host, and samples -> bank."""
  settings = config.fbank
  try:
    import torch
    from torchaudio.compliance import kaldi
  except ImportError:
    bank = input_pipeline.mel_bank()
    return "numpy", functools.partial(input_pipeline.numpy_fbank, bank=bank)

  def fbank(samples: np.ndarray) -> np.ndarray:
    waveform = torch.from_numpy(np.ascontiguousarray(samples, np.float32))
    return kaldi.fbank(
      waveform[None],
      sample_frequency=settings.sample_rate_hz,
      num_mel_bins=settings.num_mel_bins,
      frame_length=settings.frame_length_ms,
      frame_shift=settings.frame_shift_ms,
      low_freq=settings.low_freq_hz,
      high_freq=settings.high_freq_hz,
      preemphasis_coefficient=settings.preemphasis,
      htk_compat=True,
      use_energy=False,
      window_type="hanning",
      dither=0.0,
    ).numpy()

  return "torchaudio", fbank


def write_clips(folder: str, source: str, count: int, samples: int) -> None:
  """Writes 16-bit wav files of one clip each, from what is in a folder.

  Args:
    folder: receives the files.
    source: folder of audio files.
    count: files to write.
    samples: of a clip.
  """
  files = input_pipeline.audio_files(source, samples / input_pipeline.RATE)
  rng = np.random.default_rng(0)
  for i in range(count):
    path, frames = files[i % len(files)]
    start = int(rng.integers(frames - samples + 1))
    pcm = input_pipeline.read(path, start, samples, "int16")
    target = f"{folder}/{i:05d}.wav"
    sf.write(target, pcm, input_pipeline.RATE, subtype="PCM_16")
