"""What adapters for PyTorch clients share: tensors in, tensors out."""

import os

import numpy as np
import torch

import audiomosaic_jax
from audiomosaic_jax.encoder import Encoder

# Where clients that construct encoders without arguments find theirs.
VARIABLE = "AUDIOMOSAIC_ENCODER"


def load(path: str | None) -> Encoder:
  """Loads the encoder at a path, or at the one in the environment.

  Args:
    path: as of `load_encoder`; None or "" reads AUDIOMOSAIC_ENCODER.

  Raises:
    ValueError: neither is given.
  """
  path = path or os.environ.get(VARIABLE)
  if not path:
    raise ValueError(
      f"no encoder is given: pass the path of a run, or set {VARIABLE} to it"
    )
  return audiomosaic_jax.load_encoder(path)


def to_clips(audio: torch.Tensor) -> list[np.ndarray]:
  """Returns the rows of a batch [B, samples] as arrays of float32."""
  return list(audio.detach().to("cpu", torch.float32).numpy())


def to_tensor(rows: list[np.ndarray], like: torch.Tensor) -> torch.Tensor:
  """Returns float32 rows, stacked, on the device of another tensor."""
  return torch.from_numpy(np.stack(rows).astype(np.float32)).to(like.device)
