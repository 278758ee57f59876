"""What every device does to its own rows, with `jax.shard_map`.

What treats examples one by one, from augmentation to encoder, is mapped here
and communicates nothing but gradients, once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from audiomosaic_jax import sharding


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
    if at_once and at_once < len(jax.tree.leaves(examples)[0]):
      return jax.lax.map(
        lambda row: function(*row), examples, batch_size=at_once
      )
    return jax.vmap(function)(*examples)

  rows = sharding.batch_sharded(mesh).spec
  return jax.shard_map(map_own, mesh=mesh, in_specs=rows, out_specs=rows)


def map_rows_with(
  function: Callable, mesh: Mesh, *, at_once: int | None, split: bool
) -> Callable:
  """Returns `function` of shared parameters and of rows, run likewise.

  Unlike `map_examples` it hands over all the rows of a device, or `at_once` of
  them: products of parameters are fastest with all rows in one matrix.

  A gradient for the parameters is summed over the device's own examples
  first, in the type of the parameters, and over the devices once at the end.
  A jitted function of a sharded batch would add up devices inside the loop
  over layers, in the type of the layer.

  With `at_once`, memory grows with that many examples and not with the batch:
  the backward pass computes `function` again, a group at a time. As what
  `function` makes of a row depends on no other, the gradients stay those of
  the whole batch.

  Args:
    function: of parameters and a pytree of arrays [R, ...], to such arrays.
      What it makes of a row depends on no other row.
    mesh: from `make_mesh`.
    at_once: R, which divides the rows of a device; None is all it has.
    split: the parameters are split as `ENCODER_RULES` say on the data axis.
      They are gathered here, and their gradients come back split.

  Returns:
    The same function of parameters and of a pytree of arrays [B, ...], each
    split by rows over the data axis. Devices along the tensor axis have the
    same rows, and share the work as the parameters are split.

  Reference: with `at_once`, gradient caching (Gao et al. 2021, arXiv
    2101.06983) by `jax.checkpoint`.
  """

  def run_groups(params, examples):
    count = len(jax.tree.leaves(examples)[0])
    if not at_once or at_once == count:
      return function(params, examples)
    groups = jax.tree.map(
      lambda rows: rows.reshape(-1, at_once, *rows.shape[1:]), examples
    )
    again = functools.partial(jax.checkpoint(function), params)
    return jax.tree.map(_joined, jax.lax.map(again, groups))

  def mapped(params, examples):
    specs = jax.tree.map_with_path(
      lambda path, leaf: sharding.leaf_spec(
        path,
        leaf,
        mesh,
        sharding.ENCODER_RULES,
        (sharding.DATA_AXIS,) if split else (),
      ),
      params,
    )

    def map_own(params, examples):
      params = jax.tree.map(_spread, params, specs)
      examples = _same_rows(examples, mesh)
      return _same_rows(run_groups(params, examples), mesh)

    rows = PartitionSpec(sharding.DATA_AXIS)
    return jax.shard_map(
      map_own,
      mesh=mesh,
      in_specs=(specs, rows),
      out_specs=rows,
      # The compiler follows the tensor axis, if there is one, by itself.
      axis_names={sharding.DATA_AXIS},
    )(params, examples)

  return mapped


def _joined(groups: jax.Array) -> jax.Array:
  """Returns the rows of groups [G, R, ...], one after the other."""
  return groups.reshape(-1, *groups.shape[2:])


def _same_rows(rows: Any, mesh: Mesh) -> Any:
  """Keeps rows whole along the tensor axis, if there is one.

  Left to choose, the compiler shares out the rows, not the heads, of attention
  and gathers the kernels that are split.
  """
  if sharding.TENSOR_AXIS not in mesh.axis_names:
    return rows
  return jax.lax.with_sharding_constraint(rows, PartitionSpec())


def _spread(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
  """Returns a parameter that is whole along the data axis, for one device."""
  if sharding.DATA_AXIS in spec:
    # The transpose of this is the sum of which every device gets its part,
    axis = spec.index(sharding.DATA_AXIS)
    return jax.lax.all_gather(leaf, sharding.DATA_AXIS, axis=axis, tiled=True)
  # and of this cast the sum over devices.
  return jax.lax.pcast(leaf, sharding.DATA_AXIS, to="varying")


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
      lambda split: (
        PartitionSpec(sharding.DATA_AXIS) if split else PartitionSpec()
      ),
      rows,
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
