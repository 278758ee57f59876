"""Moves Llama decoders between Hugging Face folders and devices.

  model = Llama(**from_hf_config(read_settings(folder)), lora_rank=8, ...)
  base = read_params(open_weights(folder), model, mesh)

A layer of the file is [out, in] and stands alone; here it is [in, out] and
stacked with the others. Every process reads only the parts that its devices
hold, and never more than one parameter's at a time.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from audiomosaic_jax import files, sharding, torch_files
from audiomosaic_jax.models import lora
from audiomosaic_jax.models.llama import Llama, abstract_params
from audiomosaic_jax.weight_files import Tensor

# Files may hold what is computed here, or, with tied embeddings, a copy.
BUFFERS = r"\.rotary_emb\.inv_freq$"
HEAD = "lm_head.weight"
WEIGHTS_FILE = "model.safetensors"
SHOWN = 5

Path = tuple[str, ...]


def read_settings(folder: str | pathlib.Path) -> dict[str, Any]:
  """Returns what a folder's config.json holds.

  Raises:
    FileNotFoundError: there is none.
  """
  path = pathlib.Path(folder).expanduser() / torch_files.SETTINGS_FILE
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; give a folder that "
      "huggingface_hub.snapshot_download returned"
    )
  return json.loads(path.read_text(encoding="utf-8"))


def read_params(
  tensors: Mapping[str, Tensor],
  model: Llama,
  mesh: jax.sharding.Mesh,
  *,
  ignore: str | None = None,
) -> dict[str, Any]:
  """Reads the base of a decoder onto devices.

  Args:
    tensors: of `weight_files.open_weights`.
    model: its adapters are left out; see `lora.init_adapters`.
    mesh: the parameters are split over it by `sharding.decoder_sharding`.
    ignore: pattern, found anywhere in the names of tensors that are not the
      decoder's and may be there, such as "audio_".

  Returns:
    Parameters in the type that `model` wants.

  Raises:
    ValueError: tensors are missing, too many, or of other shapes.
  """
  base = lora.split(abstract_params(model))[1]
  places = traverse_util.flatten_dict(sharding.decoder_sharding(base, mesh))
  shapes = traverse_util.flatten_dict(base)
  _check(tensors, shapes, model.tie_word_embeddings, ignore)
  params = {}
  # One process talks.
  quiet = jax.process_index() != 0
  for path, leaf in tqdm(shapes.items(), "read weights", disable=quiet):
    params[path] = jax.make_array_from_callback(
      leaf.shape, places[path], _reader(tensors, path, leaf)
    )
  return traverse_util.unflatten_dict(params)


def write_folder(
  params: Mapping[str, Any],
  settings: Mapping[str, Any],
  folder: str | pathlib.Path,
  *,
  shard_bytes: int,
) -> None:
  """Writes a decoder as a Hugging Face folder.

  Args:
    params: without adapters; `lora.merge` adds them to the base.
    settings: of the config.json, such as that of the base.
    folder: that does not exist.
    shard_bytes: a file holds no more, unless it holds a single tensor.

  Raises:
    ValueError: there are adapters.
    FileExistsError: the folder is there.
  """
  folder = pathlib.Path(folder).expanduser()
  if folder.exists():
    raise FileExistsError(f"{folder} is there; remove it or give another")
  if lora.split(params)[0]:
    raise ValueError("the parameters have adapters; merge them first")
  flat = traverse_util.flatten_dict(params)
  places = hf_names(flat)
  shards = _shards(flat, places, shard_bytes)
  temporary = files.temporary_path(folder)
  temporary.mkdir(parents=True)
  for file, names in tqdm(shards.items(), "write weights"):
    content = {name: _host(flat, *places[name]) for name in names}
    torch_files.write_tensors(content, temporary / file)
  if len(shards) > 1:
    index = {
      "metadata": {"total_size": sum(x.nbytes for x in flat.values())},
      "weight_map": {n: file for file, names in shards.items() for n in names},
    }
    _write_json(temporary / f"{WEIGHTS_FILE}.index.json", index)
  kept = {name: x for name, x in settings.items() if name != "dtype"}
  dtype = next(iter(flat.values())).dtype.name
  _write_json(
    temporary / torch_files.SETTINGS_FILE, {**kept, "torch_dtype": dtype}
  )
  temporary.rename(folder)


def hf_name(path: Path, layer: int | None) -> str:
  """Returns the Hugging Face name of a parameter, of one layer if stacked."""
  parts = [part for part in path if part not in ("kernel", "scale")]
  if layer is not None:
    parts.insert(1, str(layer))
  root = [] if parts[0] == "lm_head" else ["model"]
  return ".".join([*root, *parts, "weight"])


def hf_names(leaves: Mapping[Path, Any]) -> dict[str, tuple[Path, int | None]]:
  """Returns Hugging Face names to (path, layer), a layer after the other."""
  names = {}
  for path, leaf in leaves.items():
    stacked = path[0] == "layers"
    for layer in range(leaf.shape[0]) if stacked else (None,):
      names[hf_name(path, layer)] = (path, layer)
  # Files are written, and read by people, in this order.
  return dict(sorted(names.items(), key=lambda item: item[1][1] or 0))


def _transposed(path: Path) -> bool:
  return path[-1] in ("kernel", "lm_head")


def _reader(tensors, path: Path, leaf):
  """Returns a function of an index into a parameter, that reads that part."""
  dtype, turned = leaf.dtype, _transposed(path)

  def read_one(layer, index):
    tensor = tensors[hf_name(path, layer)]
    part = tensor.read(index[::-1] if turned else index)
    return part.T if turned else part

  def read_part(index):
    if path[0] != "layers":
      return np.ascontiguousarray(read_one(None, index), dtype)
    layers = range(*index[0].indices(leaf.shape[0]))
    first = read_one(layers[0], index[1:])
    part = np.empty((len(layers), *first.shape), dtype)
    for row, layer in enumerate(layers):
      part[row] = first if row == 0 else read_one(layer, index[1:])
    return part

  # Devices that hold the same part share one reading.
  parts: dict[tuple, np.ndarray] = {}

  def read(index):
    key = tuple((part.start, part.stop) for part in index)
    if key not in parts:
      parts[key] = read_part(index)
    return parts[key]

  return read


def _check(tensors, shapes, tied: bool, ignore: str | None) -> None:
  """Raises ValueError unless the files hold what the decoder needs."""
  wanted = hf_names(shapes)
  patterns = [BUFFERS, *([ignore] if ignore else [])]
  if tied:
    patterns.append(f"^{re.escape(HEAD)}$")
  extra = [
    name
    for name in sorted(set(tensors) - set(wanted))
    if not any(re.search(pattern, name) for pattern in patterns)
  ]
  problems = [
    *_listed("missing", [name for name in wanted if name not in tensors]),
    *_listed("not of this model", extra),
  ]
  for name, (path, layer) in wanted.items():
    shape = shapes[path].shape[0 if layer is None else 1 :]
    shape = shape[::-1] if _transposed(path) else shape
    if name in tensors and tensors[name].shape != shape:
      problems.append(f"{name} is {tensors[name].shape}, wanted {shape}")
  if problems:
    raise ValueError(
      f"the weights do not fit the model: {'; '.join(problems[:SHOWN])}; give "
      "the folder whose config.json built the model"
    )


def _listed(what: str, names: list[str]) -> list[str]:
  """Returns a line on the first names, if there are any."""
  if not names:
    return []
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return [f"{len(names)} tensors {what}: {', '.join(names[:SHOWN])}{more}"]


def _shards(flat, places, shard_bytes: int) -> dict[str, list[str]]:
  """Returns file names to the tensors that they hold."""
  groups: list[list[str]] = [[]]
  filled = 0
  for name, (path, layer) in places.items():
    leaf = flat[path]
    size = leaf.nbytes // (1 if layer is None else leaf.shape[0])
    if groups[-1] and filled + size > shard_bytes:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  if len(groups) == 1:
    return {WEIGHTS_FILE: groups[0]}
  stem, suffix = WEIGHTS_FILE.split(".")
  return {
    f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}": names
    for number, names in enumerate(groups, 1)
  }


def _host(flat, path: Path, layer: int | None) -> np.ndarray:
  """Returns a tensor as files hold it."""
  leaf = flat[path]
  part = np.asarray(leaf if layer is None else leaf[layer])
  return part.T if _transposed(path) else part


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  files.write_text(path, json.dumps(content, indent=2) + "\n")
