"""A folder in the form of the Hugging Face Hub: config.json, model.safetensors.

  encoder = audiomosaic_jax.load_encoder("runs/demo")
  huggingface.save_pretrained(encoder, "my-encoder")
  encoder = huggingface.from_pretrained("my-encoder")

The config says what the encoder is and hears, and no path of the run. Tensors
have the names and layouts of the published PyTorch model. Reading executes no
code of the folder, and nothing here goes online: upload and download with
`huggingface_hub`.

Reference: embeddings are equal, bit by bit, after a round trip.
"""

import json
import os
import pathlib

from audiomosaic_jax import (
  embed_program,
  experiment,
  files,
  torch_files,
  torch_params,
)
from audiomosaic_jax.encoder import Encoder

WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "audiomosaic-jax"


def save_pretrained(encoder: Encoder, folder: str | os.PathLike) -> None:
  """Writes an encoder into a folder, which is created.

  Args:
    encoder: of `load_encoder`.
    folder: where; what an earlier call wrote is replaced.

  Raises:
    ValueError: the folder is of something else, such as a run.
  """
  folder = pathlib.Path(folder)
  if (folder / experiment.CONFIG_FILE).exists():
    check_type(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = torch_params.to_torch(encoder.variables, ignored={})
  torch_files.write_tensors(tensors, folder / WEIGHTS_FILE)
  config = {
    "model_type": MODEL_TYPE,
    **embed_program.front_end(encoder.config),
    "class_names": encoder.class_names,
  }
  files.write_text(
    folder / experiment.CONFIG_FILE, json.dumps(config, indent=2) + "\n"
  )


def from_pretrained(
  folder: str | os.PathLike, *, dtype: str = "float32", batch_size: int = 16
) -> Encoder:
  """Reads what `save_pretrained` wrote.

  Args:
    folder: on this machine, such as `huggingface_hub.snapshot_download`
      returns.
    dtype: as of `load_encoder`.
    batch_size: as of `load_encoder`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the folder holds another kind of model, or tensors that do not
      fit its config.
  """
  folder = pathlib.Path(folder)
  for name in (experiment.CONFIG_FILE, WEIGHTS_FILE):
    if not (folder / name).exists():
      raise FileNotFoundError(
        f"{folder} has no {name}; give a folder that save_pretrained wrote, "
        "on this machine"
      )
  check_type(folder)
  config = experiment.load_config(folder)
  num_classes = len(config.class_names)
  model = embed_program.build_embedder(config, num_classes, dtype)
  variables, _ = torch_params.from_torch(
    torch_files.read_tensors(folder / WEIGHTS_FILE),
    embed_program.abstract_variables(model, config),
    ignore=(),
  )
  return Encoder(
    config,
    variables,
    config.class_names,
    dtype=dtype,
    batch_size=batch_size,
  )


def check_type(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder holds a model of another library."""
  described = json.loads((folder / experiment.CONFIG_FILE).read_text())
  found = described.get("model_type")
  if found != MODEL_TYPE:
    raise ValueError(
      f"{folder} has model_type {found!r}, not {MODEL_TYPE!r}; give another "
      "folder, or import a published checkpoint with "
      "python -m audiomosaic_jax.import_torch"
    )
