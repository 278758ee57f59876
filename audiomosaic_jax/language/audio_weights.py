"""The audio side of an audio-language model, in files of the published form.

  tensors = weight_files.open_weights("ltu/pytorch_model.bin")
  audio = from_tensors(tensors, shapes)      {"encoder": ..., "projector": ...}

The published training keeps encoder, projector and adapters in one file, with
or without the prefix of PEFT; `peft_adapters.from_tensors` reads the adapters
of the same file.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from audiomosaic_jax import torch_params, weight_files
from audiomosaic_jax.language.peft_adapters import PREFIX
from audiomosaic_jax.weight_files import Tensor

ENCODER = "model.audio_encoder."
PROJECTOR = "model.audio_proj.1."
# Anywhere in a name: not the decoder's.
AUDIO = r"audio_(encoder|proj)\."

Params = dict[str, Any]


def from_tensors(tensors: Mapping[str, Tensor], target: Params) -> Params:
  """Reads encoder and projector.

  Args:
    tensors: stored names to tensors; those of other parts are passed over.
    target: parameters or shapes, "encoder" and "projector".

  Returns:
    The same tree as arrays of the host.

  Raises:
    ValueError: tensors are missing, too many, or of other shapes.
  """
  bare = {name.removeprefix(PREFIX): x for name, x in tensors.items()}

  def read(prefix):
    return {
      name.removeprefix(prefix): weight_files.read_whole(tensor)
      for name, tensor in bare.items()
      if name.startswith(prefix)
    }

  wanted = {"params": {"encoder": target["encoder"]}}
  encoder, _ = torch_params.from_torch(read(ENCODER), wanted, ignore=())
  return {
    **encoder["params"],
    "projector": _projector(read(PROJECTOR), target["projector"]["proj"]),
  }


def to_tensors(params: Params) -> dict[str, np.ndarray]:
  """Returns encoder and projector under their published names."""
  variables = {"params": {"encoder": jax.device_get(params["encoder"])}}
  encoder = torch_params.to_torch(variables, ignored={})
  dense = jax.device_get(params["projector"]["proj"])
  return {
    **{ENCODER + name: x for name, x in encoder.items()},
    f"{PROJECTOR}weight": np.ascontiguousarray(dense["kernel"].T),
    f"{PROJECTOR}bias": dense["bias"],
  }


def _projector(found: Mapping[str, np.ndarray], target: Params) -> Params:
  shapes = {
    "weight": tuple(target["kernel"].shape[::-1]),
    "bias": tuple(target["bias"].shape),
  }
  given = {name: x.shape for name, x in found.items()}
  if given != shapes:
    raise ValueError(
      f"the projector {PROJECTOR}* has {given}, wanted {shapes}; give the "
      "weights of a model with this encoder and decoder"
    )
  kernel, bias = found["weight"].T, found["bias"]
  dense = {"kernel": kernel.astype(np.float32), "bias": bias}
  return {"proj": dense}
