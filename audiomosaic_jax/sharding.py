"""Where arrays live: on a data axis over all devices, or a tensor axis besides.

Batches are split over the devices by rows. Parameters and optimiser state are
on every device, or split as `ENCODER_RULES` say, which is for models whose
state is large against a device's memory. Over the data axis the step gathers
the parameters it needs, and every device updates its own part (fully sharded
data parallelism). Over the tensor axis they stay apart: each device computes
its own heads and hidden channels of all examples of its neighbours, and the
sums of a block cross the axis (Shoeybi et al. 2019, arXiv 1909.08053).

Losses and BatchNorm are written for the global batch under `jax.jit`; the
shardings below are all that makes them distributed. What treats examples one
by one is mapped over the rows of each device by `per_device`. The mesh asks for
`Auto` axes, because `jax.make_mesh` now defaults to `Explicit`, which rejects
the contrastive product of two batch-sharded matrices.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
TENSOR_AXIS = "tensor"

# (pattern of a leaf's path, mesh axis -> axis of the leaf). They match
# parameters and what the optimiser keeps for them. Kernels of the blocks,
# [depth, in, out], are nearly all of a ViT. That of q, k and v is whole on the
# tensor axis, because a part of it is no whole number of heads.
ENCODER_RULES = (
  (r"encoder/blocks/attn/qkv/kernel$", {DATA_AXIS: -2}),
  (r"encoder/blocks/mlp/fc1/kernel$", {DATA_AXIS: -2, TENSOR_AXIS: -1}),
  (
    r"encoder/blocks/(attn/proj|mlp/fc2)/kernel$",
    {DATA_AXIS: -1, TENSOR_AXIS: -2},
  ),
)

# The same of a frozen language model. Over "data" its kernels are stored in
# parts and gathered for each use; over "tensor" heads and hidden channels stay
# apart, which suits generation. What no pattern names, adapters and norms, is
# on every device.
DECODER_RULES = (
  (r"(q|k|v|gate|up)_proj/kernel$", {DATA_AXIS: -2, TENSOR_AXIS: -1}),
  (r"(o|down)_proj/kernel$", {DATA_AXIS: -1, TENSOR_AXIS: -2}),
  (r"embed_tokens$", {DATA_AXIS: -1, TENSOR_AXIS: -2}),
  (r"lm_head$", {DATA_AXIS: -2, TENSOR_AXIS: -1}),
)


COMPILER_OPTIONS = {
  # The limit on what one all-reduce combines, about 110 MiB by default, which
  # would cut the gradients of a ViT-B in four.
  "tpu": {"xla_jf_crs_combiner_threshold_in_bytes": 2**40},
  # A product that Triton might have compiled leaves its bias to another kernel,
  # even where cuBLAS turns out to be faster and could have added it.
  "gpu": {"xla_gpu_enable_triton_gemm": False},
}


def make_mesh(
  devices: list[jax.Device] | None = None, *, tensor: int = 1
) -> Mesh:
  """Returns a mesh with a data axis and, above 1, a tensor axis.

  Args:
    devices: all, on every host, by default.
    tensor: devices that share each layer's products; the others see other
      rows of a batch. They are neighbours in the list of devices.

  Raises:
    ValueError: `tensor` does not divide the devices.
  """
  devices = jax.devices() if devices is None else devices
  if len(devices) % tensor:
    raise ValueError(
      f"{len(devices)} devices cannot be split by tensor {tensor}; use a "
      "divisor of them"
    )
  grid, axes = np.asarray(devices), (DATA_AXIS,)
  if tensor > 1:
    grid, axes = grid.reshape(-1, tensor), (DATA_AXIS, TENSOR_AXIS)
  return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of parameters and scalars: a copy per device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: axis 0 split over all devices."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_sharding(state: Any, mesh: Mesh, *, split: bool) -> Any:
  """Returns where each leaf of a training state lives.

  Args:
    state: the state, or its shapes.
    mesh: from `make_mesh`.
    split: follow `ENCODER_RULES` on the data axis; False is a copy of
      everything along it. The tensor axis, if there is one, is followed.

  Returns:
    A sharding per leaf. An axis that the devices do not divide is not split.
  """
  axes = [name for name in mesh.axis_names if split or name != DATA_AXIS]
  return _place(state, mesh, ENCODER_RULES, axes)


def decoder_sharding(params: Any, mesh: Mesh) -> Any:
  """Returns where each parameter of a language model lives.

  Args:
    params: the parameters, or their shapes.
    mesh: from `make_mesh`.

  Returns:
    A sharding per leaf, by DECODER_RULES. An axis that the devices do not
    divide is not split.
  """
  return _place(params, mesh, DECODER_RULES, mesh.axis_names)


def _place(tree: Any, mesh: Mesh, rules: tuple, axes: Iterable[str]) -> Any:
  """Returns the sharding of each leaf by rules for these axes of the mesh."""
  return jax.tree.map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, leaf_spec(path, leaf, mesh, rules, axes)
    ),
    tree,
  )


def leaf_spec(
  path: tuple, leaf: Any, mesh: Mesh, rules: tuple, axes: Iterable[str]
) -> PartitionSpec:
  """Returns the axes of the mesh that each axis of a leaf is split over.

  Args:
    path: of the leaf.
    leaf: the leaf, or its shape.
    mesh: from `make_mesh`.
    rules: ENCODER_RULES or DECODER_RULES.
    axes: of the mesh, that are followed.
  """
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  spec = [None] * leaf.ndim
  for pattern, split in rules:
    if re.search(pattern, name):
      for axis in set(split) & set(axes):
        if leaf.shape[split[axis]] % mesh.shape[axis] == 0:
          spec[split[axis]] = axis
  return PartitionSpec(*spec)


@dataclasses.dataclass(frozen=True)
class Everywhere:
  """Brings an array whole to all devices, for the moment of its use.

  A product of rows that are split with a kernel that is split on the same
  axis of the mesh can gather either. The compiler weighs them, and for short
  texts takes the rows: every device then computes on all of them.
  """

  mesh: Mesh

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, replicated(self.mesh))


def compiler_options(mesh: Mesh) -> dict[str, int | bool]:
  """Returns what a program for these devices is compiled with."""
  return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


def local_batch_size(global_batch_size: int, mesh: Mesh) -> int:
  """Returns this process's share of the batch.

  Raises:
    ValueError: the batch does not divide evenly over the devices.
  """
  devices = mesh.devices.size
  if global_batch_size % devices:
    below = global_batch_size // devices * devices
    options = [b for b in (below, below + devices) if b > 0]
    raise ValueError(
      f"batch_size {global_batch_size} is not divisible by {devices} devices; "
      f"use {' or '.join(map(str, options))}"
    )
  return global_batch_size // jax.process_count()


def put_batch(
  batch: Mapping[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array]:
  """Assembles global arrays from the rows that each process read.

  Args:
    batch: name -> [B / processes, ...] rows of this process.
    sharding: from `batch_sharded`.

  Returns:
    name -> [B, ...] sharded over all devices.
  """
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }
