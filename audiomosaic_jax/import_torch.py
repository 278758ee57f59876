"""PyTorch checkpoints of AudioMosaic to Flax variables and back, strictly.

A checkpoint is a flat mapping of names to numpy arrays; nothing of PyTorch is
imported. Every leaf of the model has exactly one reference tensor (a stacked
encoder block has one per layer), found by the table `MODULES` and the leaf
names of `KINDS`. Nothing is skipped in silence: each source tensor is used or
named as ignored, each target leaf is filled, each shape and dtype fits.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

StateDict = Mapping[str, np.ndarray]

# Flax module -> (reference module, kind). "*" stands for the block number.
MODULES = {
  "encoder/cls_token": ("cls_token", "array"),
  "encoder/pos_embed": ("pos_embed", "array"),
  "encoder/patch_embed/proj": ("patch_embed.proj", "conv"),
  "encoder/patch_embed/norm": ("patch_embed.norm", "norm"),
  "encoder/norm_pre": ("norm_pre", "norm"),
  "encoder/blocks/norm1": ("blocks.*.norm1", "norm"),
  "encoder/blocks/attn/qkv": ("blocks.*.attn.qkv", "linear"),
  "encoder/blocks/attn/q_norm": ("blocks.*.attn.q_norm", "norm"),
  "encoder/blocks/attn/k_norm": ("blocks.*.attn.k_norm", "norm"),
  "encoder/blocks/attn/proj": ("blocks.*.attn.proj", "linear"),
  "encoder/blocks/norm2": ("blocks.*.norm2", "norm"),
  "encoder/blocks/mlp/fc1": ("blocks.*.mlp.fc1", "linear"),
  "encoder/blocks/mlp/fc2": ("blocks.*.mlp.fc2", "linear"),
  "encoder/norm": ("norm", "norm"),
  "fc_norm": ("fc_norm", "norm"),
  "projector/dense_0": ("projector.0", "linear"),
  "projector/norm_0": ("projector.1", "norm"),
  "projector/dense_1": ("projector.3", "linear"),
  "projector/norm_1": ("projector.4", "norm"),
  "online_classifier": ("online_classifier", "linear"),
  "logit_scale": ("logit_scale", "array"),
  "logit_bias": ("logit_bias", "array"),
}

# Kind -> Flax leaf -> reference leaf.
KINDS = {
  "array": {"": ""},
  "linear": {"kernel": "weight", "bias": "bias"},
  "conv": {"kernel": "weight", "bias": "bias"},
  "norm": {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
  },
}

# What wrappers for data-parallel training and compilation put before a name.
PREFIXES = ("module.", "_orig_mod.")

# A counter that nothing reads, and the head timm builds but never uses.
IGNORED = (r".*\.num_batches_tracked", r"head\..*")


class Entry(NamedTuple):
  """One row of the rename table.

  Attributes:
    path: of the Flax leaf, starting with its collection.
    names: of its reference tensors, one per block for a stacked leaf.
    shape: of each reference tensor.
    is_matrix: True if the two layouts are transposes of each other.
    is_stacked: True if the leaf has the blocks on axis 0.
  """

  path: tuple[str, ...]
  names: tuple[str, ...]
  shape: tuple[int, ...]
  is_matrix: bool
  is_stacked: bool


def rename_table(variables: Any) -> tuple[Entry, ...]:
  """Returns the reference tensors behind every leaf of a model.

  Args:
    variables: collections "params" and maybe "batch_stats" of AudioMosaic;
      arrays or `jax.eval_shape` results, only shapes are read.

  Returns:
    One entry per leaf.

  Raises:
    ValueError: if a leaf has no counterpart in the reference.
  """
  flat = traverse_util.flatten_dict(variables)
  return tuple(_entry(path, leaf.shape) for path, leaf in flat.items())


def from_torch(
  state_dict: StateDict, target: Any, *, ignore: Sequence[str]
) -> tuple[dict, dict[str, np.ndarray]]:
  """Renames and re-lays a reference checkpoint for a Flax model.

  Args:
    state_dict: reference names to arrays, wrapper prefixes allowed.
    target: variables of the model (arrays or shapes) that must be filled.
    ignore: regular expressions, matched against whole reference names, of
      tensors to leave out besides IGNORED.

  Returns:
    The filled variables as numpy arrays, and the tensors left out by name:
    report them, and hand them to `to_torch` for an identical checkpoint.

  Raises:
    ValueError: if a leaf finds no tensor, a tensor finds no leaf, or shapes
      or dtypes differ; the message names the tensor and both values.
  """
  source = _without_prefixes(state_dict)
  flat_target = traverse_util.flatten_dict(target)
  table = rename_table(target)
  used = {name for entry in table for name in entry.names}
  ignored = {
    name: tensor
    for name, tensor in source.items()
    if name not in used
    and any(re.fullmatch(pattern, name) for pattern in (*IGNORED, *ignore))
  }
  if missing := sorted(used - set(source)):
    raise ValueError(
      f"{len(missing)} tensors that the model needs are not in the "
      f"checkpoint: {_some(missing)}; build the model that was saved"
    )
  if unused := sorted(set(source) - used - set(ignored)):
    raise ValueError(
      f"{len(unused)} tensors of the checkpoint have no place in the model: "
      f"{_some(unused)}; build the model that was saved or name them in ignore"
    )
  filled = {
    entry.path: _to_flax(entry, source, flat_target[entry.path].dtype)
    for entry in table
  }
  return traverse_util.unflatten_dict(filled), ignored


def to_torch(variables: Any, *, ignored: StateDict) -> dict[str, np.ndarray]:
  """Renames and re-lays Flax variables to reference names; undoes `from_torch`.

  Args:
    variables: collections "params" and maybe "batch_stats" of AudioMosaic.
    ignored: tensors to add as they are, what `from_torch` left out.

  Returns:
    Reference names, without prefixes, to arrays.
  """
  flat = traverse_util.flatten_dict(variables)
  state_dict = dict(ignored)
  for entry in rename_table(variables):
    leaf = np.asarray(flat[entry.path])
    layers = leaf if entry.is_stacked else leaf[None]
    if entry.is_matrix:
      layers = layers.swapaxes(-1, -2)
    for name, layer in zip(entry.names, layers, strict=True):
      # A copy in C order: a transposed view would not serialise as the bytes
      # that were read.
      state_dict[name] = np.array(layer.reshape(entry.shape), order="C")
  return state_dict


def load_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a checkpoint in safetensors form.

  Args:
    path: file ending in ".safetensors".

  Returns:
    Names, as stored, to arrays.

  Raises:
    ValueError: if the file is of another kind.
  """
  if pathlib.Path(path).suffix != ".safetensors":
    raise ValueError(
      f"cannot read {path}: only .safetensors is supported; convert it with "
      "safetensors.torch.save_file where PyTorch is installed"
    )
  import safetensors.numpy

  return safetensors.numpy.load_file(path)


def _entry(path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
  """Returns the row of the table for one leaf."""
  *module, leaf = path[1:]
  if "/".join(path[1:]) in MODULES:  # the leaf is a module's whole content
    module, leaf = path[1:], ""
  reference, kind = MODULES.get("/".join(module), ("", ""))
  if leaf not in KINDS.get(kind, {}):
    raise ValueError(
      f"{'/'.join(path)} {tuple(shape)} has no counterpart in the reference; "
      "add its module to import_torch.MODULES"
    )
  stacked = "*" in reference
  name = reference + "." * bool(leaf) + KINDS[kind][leaf]
  names = (
    tuple(name.replace("*", str(i)) for i in range(shape[0]))
    if stacked
    else (name,)
  )
  shape = tuple(shape[1:] if stacked else shape)
  is_matrix = leaf == "kernel"
  if is_matrix:
    rows, cols = shape
    side = math.isqrt(rows)
    # A patch kernel is [time * freq, out] here, [out, 1, time, freq] there.
    shape = (cols, 1, side, side) if kind == "conv" else (cols, rows)
  return Entry(path, names, shape, is_matrix, stacked)


def _to_flax(entry: Entry, source: StateDict, dtype: np.dtype) -> np.ndarray:
  """Returns one leaf from its reference tensors, after checking them."""
  for name in entry.names:
    tensor = source[name]
    where = f"{name} for {'/'.join(entry.path)}"
    if tensor.shape != entry.shape:
      raise ValueError(
        f"{where} has shape {tensor.shape}, the model needs {entry.shape}; "
        "build the model that was saved"
      )
    if tensor.dtype != dtype:
      raise ValueError(
        f"{where} is {tensor.dtype}, the model needs {np.dtype(dtype)}; "
        "convert the checkpoint first"
      )
  layers = np.stack([source[name] for name in entry.names])
  if entry.is_matrix:
    layers = layers.reshape(*layers.shape[:2], -1).swapaxes(-1, -2)
  return np.array(layers if entry.is_stacked else layers[0], order="C")


def _without_prefixes(state_dict: StateDict) -> dict[str, np.ndarray]:
  """Returns the same tensors under names without wrapper prefixes."""
  pattern = f"^({'|'.join(map(re.escape, PREFIXES))})+"
  source = {}
  for name, tensor in state_dict.items():
    bare = re.sub(pattern, "", name)
    if bare in source:
      raise ValueError(
        f"{name} and another tensor are both {bare} without the prefixes "
        f"{PREFIXES}; the checkpoint holds two models, keep one"
      )
    source[bare] = tensor
  return source


def _some(names: Sequence[str]) -> str:
  """Returns the first few names as text."""
  return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
