"""Where arrays live: one data axis over every device of every host.

Batches are split over it by rows. Parameters and optimiser state are on every
device, or split as `STATE_RULES` say, which is for models whose state is large
against a device's memory: the step then gathers the parameters it needs, and
every device updates its own part (fully sharded data parallelism).

Losses and BatchNorm are written for the global batch under `jax.jit`; the
shardings below are all that makes them distributed. What treats examples one
by one, from augmentation to encoder, is mapped over the rows of each device
with `jax.shard_map`, and communicates nothing. The mesh asks for `Auto`
axes, because `jax.make_mesh` now defaults to `Explicit`, which rejects the
contrastive product of two batch-sharded matrices.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"

# (pattern of a leaf's path, axis to split over the devices). They match
# parameters and what the optimiser keeps for them. Kernels of the blocks,
# [depth, in, out], are nearly all of a ViT; their inputs are a multiple of the
# width.
STATE_RULES = ((r"encoder/blocks/.*kernel$", 1),)
_WHOLE = -1

# (pattern of a leaf's path, mesh axis -> axis of the leaf) of a frozen language
# model. Over "data" its kernels are stored in parts and gathered for each use;
# over "tensor" heads and hidden channels stay apart, which suits generation.
# What no pattern names, adapters and norms, is on every device.
TENSOR_AXIS = "tensor"
DECODER_RULES = (
  (r"(q|k|v|gate|up)_proj/kernel$", {DATA_AXIS: -2, TENSOR_AXIS: -1}),
  (r"(o|down)_proj/kernel$", {DATA_AXIS: -1, TENSOR_AXIS: -2}),
  (r"embed_tokens$", {DATA_AXIS: -1, TENSOR_AXIS: -2}),
  (r"lm_head$", {DATA_AXIS: -2, TENSOR_AXIS: -1}),
)

# A process that is lost without notice ends the others after this time, which
# until then wait for it in a sum over devices. A thread of its own sends the
# heartbeats, so that a long compilation or a slow disk delays none.
HEARTBEAT_TIMEOUT_S = 60
# A process that is done waits this long for the others, as long as they live:
# one writes the report. JAX's 300 seconds would end a slow one.
SHUTDOWN_TIMEOUT_S = 3600


def initialize_distributed(environ: Mapping[str, str] = os.environ) -> bool:
  """Joins the other processes when the environment describes a cluster.

  `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` works
  anywhere; Cloud TPU pods and multi-task SLURM steps are detected by JAX.

  Args:
    environ: environment variables.

  Returns:
    True if `jax.distributed.initialize` was called. Must run before the first
    use of a device.

  Raises:
    ValueError: the coordinator is set but the process count or id is missing.
  """
  if environ.get("JAX_COORDINATOR_ADDRESS"):
    missing = [
      name
      for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
      if not environ.get(name)
    ]
    if missing:
      raise ValueError(
        f"JAX_COORDINATOR_ADDRESS={environ['JAX_COORDINATOR_ADDRESS']} is set "
        f"but {' and '.join(missing)} is not; set all three, or none to run "
        "on this machine alone"
      )
    jax.distributed.initialize(
      environ["JAX_COORDINATOR_ADDRESS"],
      num_processes=int(environ["JAX_NUM_PROCESSES"]),
      process_id=int(environ["JAX_PROCESS_ID"]),
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
      shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    return True
  tpu_pod = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or environ.get(
    "MEGASCALE_COORDINATOR_ADDRESS"
  )
  slurm = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
  if tpu_pod or slurm:
    jax.distributed.initialize(
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
      shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    return True
  return False


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """Returns a one-axis mesh over `devices` (default: all, on every host)."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def make_decoder_mesh(
  tensor: int, devices: list[jax.Device] | None = None
) -> Mesh:
  """Returns a mesh of two axes for language models.

  Args:
    tensor: devices that share each layer's products; the others see other
      rows of a batch.
    devices: all, on every host, by default.

  Raises:
    ValueError: `tensor` does not divide the devices.
  """
  devices = jax.devices() if devices is None else devices
  if len(devices) % tensor:
    raise ValueError(
      f"{len(devices)} devices cannot be split by tensor {tensor}; use a "
      "divisor of them"
    )
  axes = (DATA_AXIS, TENSOR_AXIS)
  grid = np.asarray(devices).reshape(-1, tensor)
  return Mesh(grid, axes, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of parameters and scalars: a copy per device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: axis 0 split over the devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def state_sharding(state: Any, mesh: Mesh, *, split: bool) -> Any:
  """Returns where each leaf of a training state lives.

  Args:
    state: the state, or its shapes.
    mesh: from `make_mesh`.
    split: follow `STATE_RULES`; False is a copy per device of everything.

  Returns:
    A sharding per leaf. A leaf whose axis the devices do not divide is on
    every device, too.
  """

  def place(path, leaf):
    spec = _leaf_spec(_split_axis(path, leaf, mesh, split))
    return NamedSharding(mesh, spec)

  return jax.tree.map_with_path(place, state)


def decoder_sharding(params: Any, mesh: Mesh) -> Any:
  """Returns where each parameter of a language model lives.

  Args:
    params: the parameters, or their shapes.
    mesh: from `make_decoder_mesh`, or from `make_mesh`.

  Returns:
    A sharding per leaf, by DECODER_RULES. An axis that the devices do not
    divide is not split.
  """

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = [None] * leaf.ndim
    for pattern, axes in DECODER_RULES:
      if re.search(pattern, name):
        for mesh_axis, size in mesh.shape.items():
          axis = axes[mesh_axis]
          spec[axis] = mesh_axis if leaf.shape[axis] % size == 0 else None
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map_with_path(place, params)


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


def _split_axis(path: tuple, leaf: Any, mesh: Mesh, split: bool) -> int:
  """Returns the axis of a leaf that is split, or _WHOLE."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  for pattern, axis in STATE_RULES if split else ():
    if re.search(pattern, name) and leaf.shape[axis] % mesh.devices.size == 0:
      return axis
  return _WHOLE


def _leaf_spec(axis: int) -> PartitionSpec:
  """Returns what splits an axis over the devices."""
  if axis == _WHOLE:
    return PartitionSpec()
  return PartitionSpec(*(None,) * axis, DATA_AXIS)


def compiler_options(mesh: Mesh) -> dict[str, int]:
  """Returns what a program for these devices is compiled with."""
  if mesh.devices.flat[0].platform != "tpu":
    return {}
  # The limit on what one all-reduce combines, about 110 MiB by default, which
  # would cut the gradients of a ViT-B in four.
  return {"xla_jf_crs_combiner_threshold_in_bytes": 2**40}


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


def map_examples(
  function: Callable, mesh: Mesh, at_once: int | None = None
) -> Callable:
  """Returns `function` applied to each example on the device that holds it.

  XLA has no partition rule for Fourier transforms: a jitted function of a
  sharded batch that contains one gathers the whole batch on every device.
  Here every device maps its own rows and nothing is communicated.

  Args:
    function: of arrays without batch axis, to arrays without batch axis.
    mesh: from `make_mesh`.
    at_once: how many examples a device maps at a time; None is all it has.

  Returns:
    The same function of arrays [B, ...], each sharded over the mesh.
  """

  def map_own(*examples):
    return _map_rows(lambda row: function(*row), examples, at_once)

  return map_shards(map_own, mesh, rows_in=True, rows_out=True)


def map_examples_with(
  function: Callable, mesh: Mesh, *, at_once: int | None, split: bool
) -> Callable:
  """Returns `function` of shared parameters and one example, mapped likewise.

  A gradient for the parameters is summed over the device's own examples
  first, in the type of the parameters, and over the devices once at the end.
  A jitted function of a sharded batch would add up devices inside the loop
  over layers, in the type of the layer.

  With `at_once`, memory grows with that many examples and not with the batch:
  the backward pass computes `function` again, a group at a time. As `function`
  takes one example, the gradients stay those of the whole batch.

  Args:
    function: of parameters and a pytree of arrays without batch axis.
    mesh: from `make_mesh`.
    at_once: how many examples a device maps at a time; None is all it has.
    split: the parameters are split as `STATE_RULES` say. They are gathered
      here, and their gradients come back split.

  Returns:
    The same function of parameters and of a pytree of arrays [B, ...], each
    sharded over the mesh.

  Reference: with `at_once`, gradient caching (Gao et al. 2021, arXiv
    2101.06983) by `jax.checkpoint`.
  """

  def mapped(params, examples):
    axes = jax.tree.map_with_path(
      lambda path, leaf: _split_axis(path, leaf, mesh, split), params
    )

    def map_own(params, examples):
      params = jax.tree.map(_spread, params, axes)
      apply = jax.checkpoint(function) if at_once else function
      return _map_rows(functools.partial(apply, params), examples, at_once)

    rows = PartitionSpec(DATA_AXIS)
    return jax.shard_map(
      map_own,
      mesh=mesh,
      in_specs=(jax.tree.map(_leaf_spec, axes), rows),
      out_specs=rows,
    )(params, examples)

  return mapped


def _spread(leaf: jax.Array, axis: int) -> jax.Array:
  """Returns a whole parameter for the use of one device."""
  if axis == _WHOLE:
    # The transpose of this cast is the sum over devices,
    return jax.lax.pcast(leaf, DATA_AXIS, to="varying")
  # and of this the sum of which every device gets its part.
  return jax.lax.all_gather(leaf, DATA_AXIS, axis=axis, tiled=True)


def map_shards(
  function: Callable, mesh: Mesh, *, rows_in: Any, rows_out: Any
) -> Callable:
  """Returns `function` run by every device on what it holds.

  Args:
    function: of one device's arrays; may communicate over `DATA_AXIS`.
    mesh: from `make_mesh`.
    rows_in: for each argument, or for all, True where the arrays are split by
      rows and False where every device has all of them.
    rows_out: the same for the results.

  Returns:
    The same function of global arrays.
  """

  def specs(rows):
    return jax.tree.map(
      lambda split: PartitionSpec(DATA_AXIS) if split else PartitionSpec(), rows
    )

  return jax.shard_map(
    function, mesh=mesh, in_specs=specs(rows_in), out_specs=specs(rows_out)
  )


def check_at_once(at_once: int | None, local_batch: int) -> None:
  """Raises ValueError unless a device's clips are a multiple of `at_once`."""
  if at_once and local_batch % at_once:
    below = max(n for n in range(1, at_once) if local_batch % n == 0)
    raise ValueError(
      f"micro_batch_size {at_once} does not divide the {local_batch} clips of "
      f"a device; use {below}"
    )


def _map_rows(function: Callable, examples: Any, at_once: int | None) -> Any:
  """Returns `function` of each row, `at_once` rows at a time."""
  if at_once and at_once < len(jax.tree.leaves(examples)[0]):
    return jax.lax.map(function, examples, batch_size=at_once)
  return jax.vmap(function)(examples)
