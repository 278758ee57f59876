"""PyTorch checkpoints of AudioMosaic to Flax variables and back, strictly.

A checkpoint is a flat mapping of names to numpy arrays; nothing of PyTorch is
imported. Every leaf of the model has exactly one reference tensor (a stacked
encoder block has one per layer), found by the table `MODULES` and the leaf
names of `KINDS`, both in `reference_names`. Nothing is skipped in silence: each
source tensor is used or named as ignored, each target leaf is filled, each
shape and dtype fits.

All heads of the reference are covered; those that read all layers need parity
"released". `import_torch` reads the files and finds out what the model is. For
spectrograms of another length, resize the position embeddings first:
`models.positions`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from audiomosaic_jax.reference_names import KINDS, MODULES

StateDict = Mapping[str, np.ndarray]

# What wrappers for data-parallel training and compilation put before a name.
PREFIXES = ("module.", "_orig_mod.")

# A counter that nothing reads, and the head timm builds but never uses.
IGNORED = (r".*\.num_batches_tracked", r"head\..*")

# What the published AASIST model builds and never trains, for `ignore`: the
# norm of a classifier, and the first norms of the residual blocks.
AASIST_UNUSED = (r"fc_norm\..*", r"encoder\.\d\.0\.bn1\..*")


class Entry(NamedTuple):
  """One row of the rename table.

  Attributes:
    path: of the Flax leaf, starting with its collection.
    names: of its reference tensors, one per block for a stacked leaf.
    shape: of each reference tensor.
    is_kernel: True if the axes are (*kernel, in, out) here and
      (out, in, *kernel) there.
    is_stacked: True if the leaf has the blocks on axis 0.
  """

  path: tuple[str, ...]
  names: tuple[str, ...]
  shape: tuple[int, ...]
  is_kernel: bool
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


def bare_names(names: Iterable[str]) -> dict[str, str]:
  """Returns name without wrapper prefixes -> name.

  Raises:
    ValueError: if two names differ in their prefixes alone.
  """
  pattern = f"^({'|'.join(map(re.escape, PREFIXES))})+"
  found = {}
  for name in names:
    bare = re.sub(pattern, "", name)
    if bare in found:
      raise ValueError(
        f"{found[bare]} and {name} are both {bare} without the prefixes "
        f"{PREFIXES}; the checkpoint holds two models, keep one"
      )
    found[bare] = name
  return found


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
  source = {
    bare: state_dict[name] for bare, name in bare_names(state_dict).items()
  }
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
    entry.path: _to_flax(entry, source, flat_target[entry.path])
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
    for name, layer in zip(entry.names, layers, strict=True):
      if entry.is_kernel:
        outputs, inputs, *size = entry.shape
        layer = layer.reshape(*size, inputs, outputs)
        layer = np.moveaxis(layer, (-1, -2), (0, 1))
      # A copy in C order: a transposed view would not serialise as the bytes
      # that were read.
      state_dict[name] = np.array(layer.reshape(entry.shape), order="C")
  return state_dict


def _entry(path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
  """Returns the row of the table for one leaf."""
  *module, leaf = path[1:]
  if "/".join(path[1:]) in MODULES:  # the leaf is a module's whole content
    module, leaf = path[1:], ""
  reference, kind = MODULES.get("/".join(module), ("", ""))
  if leaf not in KINDS.get(kind, {}):
    raise ValueError(
      f"{'/'.join(path)} {tuple(shape)} has no counterpart in the reference; "
      "add its module to reference_names.MODULES"
    )
  stacked = "*" in reference
  name = reference + "." * bool(leaf) + KINDS[kind][leaf]
  names = (
    tuple(name.replace("*", str(i)) for i in range(shape[0]))
    if stacked
    else (name,)
  )
  shape = tuple(shape[1:] if stacked else shape)
  is_kernel = leaf == "kernel"
  if is_kernel:
    *size, inputs, outputs = shape
    if kind == "patch":  # [time * freq, out] here, [out, 1, time, freq] there
      size, inputs = 2 * [math.isqrt(inputs)], 1
    shape = (outputs, inputs, *size)
  return Entry(path, names, shape, is_kernel, stacked)


def _to_flax(entry: Entry, source: StateDict, leaf: Any) -> np.ndarray:
  """Returns one leaf from its reference tensors, after checking them."""
  for name in entry.names:
    tensor = source[name]
    where = f"{name} for {'/'.join(entry.path)}"
    if tensor.shape != entry.shape:
      raise ValueError(
        f"{where} has shape {tensor.shape}, the model needs {entry.shape}; "
        "build the model that was saved"
      )
    if tensor.dtype != leaf.dtype:
      raise ValueError(
        f"{where} is {tensor.dtype}, the model needs {np.dtype(leaf.dtype)}; "
        "convert the checkpoint first"
      )
  layers = np.stack([source[name] for name in entry.names])
  if entry.is_kernel:
    layers = np.moveaxis(layers, (1, 2), (-1, -2))
  return np.array(layers.reshape(leaf.shape), order="C")


def _some(names: Sequence[str]) -> str:
  """Returns the first few names as text."""
  return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
