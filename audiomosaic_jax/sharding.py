"""Where arrays live: one data axis over every device of every host.

Losses and BatchNorm are written for the global batch under `jax.jit`; the
shardings below are all that makes them distributed. What treats examples one
by one, from augmentation to encoder, is mapped over the rows of each device
with `jax.shard_map`, and communicates nothing. The mesh asks for `Auto`
axes, because `jax.make_mesh` now defaults to `Explicit`, which rejects the
contrastive product of two batch-sharded matrices.
"""

import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"

# A launcher that wants several processes sets one of these; a plain
# `python -m audiomosaic_jax.main` on one machine sets none of them.
_CLUSTER_VARIABLES = (
  "JAX_COORDINATOR_ADDRESS",
  "TPU_WORKER_HOSTNAMES",
  "MEGASCALE_COORDINATOR_ADDRESS",
)


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
    )
    return True
  tpu_pod = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or environ.get(
    "MEGASCALE_COORDINATOR_ADDRESS"
  )
  slurm = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
  if tpu_pod or slurm:
    jax.distributed.initialize()
    return True
  return False


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """Returns a one-axis mesh over `devices` (default: all, on every host)."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of parameters and scalars: a copy per device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: axis 0 split over the devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


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


def map_examples(function: Callable, mesh: Mesh) -> Callable:
  """Returns `function` applied to each example on the device that holds it.

  XLA has no partition rule for Fourier transforms: a jitted function of a
  sharded batch that contains one gathers the whole batch on every device.
  Here every device maps its own rows and nothing is communicated.

  Args:
    function: of arrays without batch axis, to arrays without batch axis.
    mesh: from `make_mesh`.

  Returns:
    The same function of arrays [B, ...], each sharded over the mesh.
  """
  rows = PartitionSpec(DATA_AXIS)
  return jax.shard_map(
    jax.vmap(function), mesh=mesh, in_specs=rows, out_specs=rows
  )


def map_examples_with(function: Callable, mesh: Mesh) -> Callable:
  """Returns `function` of shared parameters and one example, mapped likewise.

  A gradient for the parameters is summed over the device's own examples
  first, in the type of the parameters, and over the devices once at the end.
  A jitted function of a sharded batch would add up devices inside the loop
  over layers, in the type of the layer.

  Args:
    function: of parameters and a pytree of arrays without batch axis.
    mesh: from `make_mesh`.

  Returns:
    The same function of parameters that are on every device and of a pytree
    of arrays [B, ...], each sharded over the mesh.
  """
  rows = PartitionSpec(DATA_AXIS)

  def map_own(params, examples):
    # The transpose of this cast is the sum over devices.
    params = jax.lax.pcast(params, DATA_AXIS, to="varying")
    return jax.vmap(function, in_axes=(None, 0))(params, examples)

  return jax.shard_map(
    map_own, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows
  )
