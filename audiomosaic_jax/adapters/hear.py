"""HEAR 2021: the module that `hear-validator` and `heareval` import.

  hear-validator audiomosaic_jax.adapters.hear --model runs/demo
  python -m heareval.embeddings.runner audiomosaic_jax.adapters.hear \
    --model runs/demo --tasks-dir tasks

Reference: the common API of HEAR 2021; hearvalidator 2021.0.2 says "Looks
good!" in tests/clients/hear_test.py.
"""

import torch

from audiomosaic_jax.adapters import tensors
from audiomosaic_jax.encoder import Encoder

# The benchmark wants 50 ms or less; a quarter of the hop of 160 ms patches.
HOP_MS = 40.0


class HearModel(torch.nn.Module):
  """What the benchmark passes around; it has no parameters of PyTorch.

  Attributes:
    encoder: the encoder, on JAX's devices.
    sample_rate: of the audio it takes, Hz.
    scene_embedding_size: channels of an embedding.
    timestamp_embedding_size: channels of a frame.
  """

  def __init__(self, encoder: Encoder):
    super().__init__()
    self.encoder = encoder
    self.sample_rate = encoder.sample_rate_hz
    self.scene_embedding_size = encoder.embedding_width
    self.timestamp_embedding_size = encoder.width


def load_model(model_file_path: str = "") -> HearModel:
  """Loads an encoder.

  Args:
    model_file_path: as of `load_encoder`; "" reads AUDIOMOSAIC_ENCODER.
  """
  return HearModel(tensors.load(model_file_path))


def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
  """Returns one embedding per clip.

  Args:
    audio: [n, samples] in [-1, 1] at `model.sample_rate`.
    model: from `load_model`.

  Returns:
    float32 [n, scene_embedding_size] on the device of `audio`.
  """
  outs = model.encoder.embed_batch(tensors.to_clips(audio), model.sample_rate)
  return tensors.to_tensor([out.embedding for out in outs], like=audio)


def get_timestamp_embeddings(
  audio: torch.Tensor, model: HearModel
) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns a frame every 40 ms of each clip.

  Args:
    audio: [n, samples] in [-1, 1] at `model.sample_rate`.
    model: from `load_model`.

  Returns:
    float32 [n, T, timestamp_embedding_size] and the middles of what the
    frames saw, float32 [n, T] in milliseconds, on the device of `audio`.
  """
  outs = model.encoder.embed_batch(
    tensors.to_clips(audio), model.sample_rate, hop_ms=HOP_MS
  )
  return (
    tensors.to_tensor([out.frames for out in outs], like=audio),
    tensors.to_tensor([1e3 * out.timestamps_s for out in outs], like=audio),
  )
