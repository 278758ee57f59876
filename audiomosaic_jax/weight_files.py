"""Opens files of tensors without reading them.

  tensors = open_weights("vicuna-7b")
  tensors["lm_head.weight"].shape
  tensors["lm_head.weight"].read((slice(0, 10), slice(None)))

A language model does not fit one device, and often not one host: each process
reads the parts that its devices hold. Files are .safetensors or of torch.save,
one or several with an index. Nothing that is stored is executed.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import safetensors

from audiomosaic_jax import torch_files, torch_zip


class Tensor(NamedTuple):
  """A tensor on disk.

  Attributes:
    shape: of the whole.
    read: returns the part at a tuple of slices, one per axis.
  """

  shape: tuple[int, ...]
  read: Callable[[tuple[slice, ...]], np.ndarray]


def open_weights(path: str | pathlib.Path) -> dict[str, Tensor]:
  """Opens a file, or a folder in the form of the Hugging Face Hub.

  Args:
    path: on this machine.

  Returns:
    Stored names to tensors.

  Raises:
    FileNotFoundError: there is nothing, or a file of an index is missing.
    ValueError: a file is damaged or of another kind, or an index and its
      files differ.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; give a file of {torch_files.SUFFIXES} or a "
      "folder that huggingface_hub.snapshot_download returned"
    )
  if path.is_dir():
    path = torch_files.weights_of(path)
  if path.suffix != ".json":
    return _open_file(path)
  tensors: dict[str, Tensor] = {}
  for name, expected in torch_files.read_index(path).items():
    shard = _open_file(path.parent / name)
    torch_files.check_shard(path, name, expected, shard)
    tensors |= shard
  return tensors


def read_whole(tensor: Tensor) -> np.ndarray:
  """Reads all of a tensor."""
  return tensor.read((slice(None),) * len(tensor.shape))


def _open_file(path: pathlib.Path) -> dict[str, Tensor]:
  if path.suffix == ".safetensors":
    try:
      file = safetensors.safe_open(path, "numpy")
      slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"{path} is damaged: {error}; copy or download it again"
      ) from error
    return {
      name: Tensor(tuple(part.get_shape()), part.__getitem__)
      for name, part in slices.items()
    }
  if path.suffix in torch_files.TORCH_SUFFIXES:
    views = torch_zip.read_views(path)
    return {name: Tensor(x.shape, _reader(x)) for name, x in views.items()}
  raise ValueError(
    f"cannot read {path}: it ends in {path.suffix!r}, not in one of "
    f"{torch_files.SUFFIXES}"
  )


def _reader(view: np.ndarray) -> Callable[[tuple[slice, ...]], np.ndarray]:
  return lambda index: np.array(view[index])
