"""X-ARES: the encoder class that its runner imports.

  export AUDIOMOSAIC_ENCODER=runs/demo
  python -m xares.run audiomosaic_jax/adapters/xares.py tasks/*.py --max-jobs 0

The runner makes a module name of the path, so it imports the installed package
from any folder. Unless --max-jobs is 0 it gives each task a process and one of
PyTorch's GPUs, and fails where there are none.

Reference: xares 0.1.3; its `check_audio_encoder` and a run of its own are in
tests/clients/xares_test.py.
"""

import torch

from audiomosaic_jax.adapters import tensors


# The runner takes the only name in this file that ends in "Encoder".
class AudioMosaicEncoder(torch.nn.Module):
  """Frames of a batch of audio.

  Attributes:
    sampling_rate: of the audio it takes, Hz.
    output_dim: channels of a frame.
    hop_size_in_ms: from one frame to the next.
  """

  def __init__(self, path: str | None = None, hop_ms: float = 40.0):
    """Loads an encoder.

    Args:
      path: as of `load_encoder`; None reads AUDIOMOSAIC_ENCODER.
      hop_ms: from one frame to the next. 40 as the baseline of the benchmark;
        160, the hop of the patches, is four times faster.
    """
    super().__init__()
    self.encoder = tensors.load(path)
    self.sampling_rate = self.encoder.sample_rate_hz
    self.output_dim = self.encoder.width
    self.hop_size_in_ms = hop_ms

  def forward(self, audio: torch.Tensor) -> torch.Tensor:
    """Returns frames, float32 [B, T, output_dim].

    Args:
      audio: [B, samples] in [-1, 1] at `sampling_rate`.
    """
    outs = self.encoder.embed_batch(
      tensors.to_clips(audio), self.sampling_rate, hop_ms=self.hop_size_in_ms
    )
    return tensors.to_tensor([out.frames for out in outs], like=audio)
