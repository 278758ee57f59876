"""Reads the tensors of PyTorch checkpoints, and writes them, as NumPy arrays.

What can be read: .safetensors; a state dict that torch.save wrote, with
PyTorch installed; a folder as `huggingface_hub.snapshot_download` leaves it,
also with weights in several files. Nothing that is stored is executed: torch
loads with weights_only=True, and Python files in a folder are not looked at.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from audiomosaic_jax.files import temporary_path

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# Of a folder: its description, and the first of these that is there.
SETTINGS_FILE = "config.json"
WEIGHT_FILES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
# Before it weights_only=True does not keep its promise: CVE-2025-32434.
MIN_TORCH = (2, 6)
# Training loops save their state dict under one of these.
WRAPPERS = ("model", "state_dict", "model_state_dict")


class Checkpoint(NamedTuple):
  """What was read.

  Attributes:
    tensors: stored names to arrays.
    settings: of the folder's config.json; empty without one.
    files: that hold the tensors.
  """

  tensors: dict[str, np.ndarray]
  settings: dict[str, Any]
  files: tuple[pathlib.Path, ...]


def read(path: str | pathlib.Path) -> Checkpoint:
  """Reads a file, or a folder in the form of the Hugging Face Hub.

  Args:
    path: on this machine.

  Raises:
    FileNotFoundError: there is nothing, or a folder without weights.
    ValueError: a file is damaged or of another kind, or an index and its
      files differ.
    ImportError: as `read_tensors`.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; give a file of {SUFFIXES} or a folder that "
      "huggingface_hub.snapshot_download returned"
    )
  settings = {}
  if path.is_dir():
    if (path / SETTINGS_FILE).exists():
      settings = _read_json(path / SETTINGS_FILE)
    path = weights_of(path)
  if path.suffix == ".json":
    tensors, files = _read_shards(path)
  else:
    tensors, files = read_tensors(path), (path,)
  return Checkpoint(tensors, settings, files)


def read_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads one file of tensors.

  Args:
    path: ends in one of SUFFIXES.

  Returns:
    Names, as stored, to arrays.

  Raises:
    ValueError: it is damaged or of another kind.
    ImportError: a file of torch.save, and PyTorch is not installed or older
      than MIN_TORCH.
  """
  path = pathlib.Path(path)
  if path.suffix == ".safetensors":
    try:
      return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"{path} is damaged: {error}; copy or download it again"
      ) from error
  if path.suffix in TORCH_SUFFIXES:
    return _read_torch(path)
  raise ValueError(
    f"cannot read {path}: it ends in {path.suffix!r}, not in one of {SUFFIXES}"
  )


def write_tensors(
  tensors: Mapping[str, np.ndarray], path: str | pathlib.Path
) -> None:
  """Writes a .safetensors file, which appears when it is complete."""
  path = pathlib.Path(path)
  temporary = temporary_path(path)
  # Libraries of PyTorch refuse a file that does not say whose layout it has.
  safetensors.numpy.save_file(
    {name: np.asarray(x, order="C") for name, x in tensors.items()},
    temporary,
    metadata={"format": "pt"},
  )
  temporary.replace(path)


def weights_of(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file of a folder that holds its tensors, or their index."""
  for name in WEIGHT_FILES:
    if (folder / name).exists():
      return folder / name
  inside = sorted(path.name for path in folder.iterdir())
  raise FileNotFoundError(
    f"{folder} holds none of {WEIGHT_FILES}, but {inside}; give the file itself"
  )


def read_index(index: pathlib.Path) -> dict[str, list[str]]:
  """Returns the files that an index names, each with its tensors.

  Raises:
    ValueError: it is no index, or names a file that is not beside it.
    FileNotFoundError: a file is missing.
  """
  weight_map = _read_json(index).get("weight_map")
  if not isinstance(weight_map, dict):
    raise ValueError(f"{index} has no weight_map of names to files")
  suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
  names = sorted(set(map(str, weight_map.values())))
  for name in names:
    # Links are followed: snapshots are links into a cache.
    inside = pathlib.PurePath(name).name == name and "\\" not in name
    if not inside or not name.endswith(f".{suffix}"):
      raise ValueError(
        f"{index} names the file {name!r}; only .{suffix} files beside it are "
        "read"
      )
    if not (index.parent / name).exists():
      raise FileNotFoundError(
        f"{index} names {name}, which is not there; download it too"
      )
  return {
    name: [key for key, file in weight_map.items() if file == name]
    for name in names
  }


def check_shard(index: pathlib.Path, name: str, expected, found) -> None:
  """Raises ValueError unless a file holds what its index says."""
  if differing := sorted(set(expected) ^ set(found)):
    raise ValueError(
      f"{index} and {name} differ in {len(differing)} tensors, the first is "
      f"{differing[0]}; download both again"
    )


def _read_shards(
  index: pathlib.Path,
) -> tuple[dict[str, np.ndarray], tuple[pathlib.Path, ...]]:
  """Returns the tensors of all files that an index names, and the files."""
  tensors: dict[str, np.ndarray] = {}
  shards = read_index(index)
  for name, expected in shards.items():
    shard = read_tensors(index.parent / name)
    check_shard(index, name, expected, shard)
    tensors |= shard
  return tensors, tuple(index.parent / name for name in shards)


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path} was written by PyTorch, which is not installed; pip install "
      "torch, or convert it with safetensors.torch.save_file elsewhere"
    ) from error
  if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
    raise ImportError(
      f"PyTorch {torch.__version__} may run code that is stored in {path}; "
      f"this needs {'.'.join(map(str, MIN_TORCH))} or later: pip install -U "
      "torch, or convert it with safetensors.torch.save_file elsewhere"
    )
  try:
    stored = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # Of many kinds, some of them pickle's.
    reason = str(error).strip().partition("\n")[0]
    raise ValueError(
      f"cannot read {path}: {type(error).__name__}: {reason}; it is damaged, "
      "or holds more than tensors: save model.state_dict() alone"
    ) from error
  state = unwrapped(stored, path)
  for name, value in state.items():
    if not isinstance(value, torch.Tensor):
      raise ValueError(
        f"{path}: {name} is a {type(value).__name__} and no tensor; save "
        "model.state_dict() alone"
      )
  return {name: _to_numpy(tensor, torch) for name, tensor in state.items()}


def unwrapped(stored: Any, path: pathlib.Path) -> Mapping[str, Any]:
  """Returns the state dict in what a training loop has saved."""
  if not isinstance(stored, Mapping):
    raise ValueError(
      f"{path} holds a {type(stored).__name__}, not a state dict; save "
      "model.state_dict()"
    )
  found = [key for key in WRAPPERS if isinstance(stored.get(key), Mapping)]
  if len(found) > 1:
    raise ValueError(f"{path} holds the state dicts {found}; keep one of them")
  return stored[found[0]] if found else stored


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
  tensor = tensor.detach().contiguous()
  if tensor.dtype == torch.bfloat16:
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
  return content
