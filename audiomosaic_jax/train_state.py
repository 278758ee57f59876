"""The arrays that training carries from step to step, and how they start."""

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax

PyTree = Any


@flax.struct.dataclass
class TrainState:
  """Everything a checkpoint needs to continue; arrays only.

  Attributes:
    step: int32 scalar, number of updates made.
    params: trainable and frozen parameters.
    batch_stats: BatchNorm running statistics.
    opt_state: optimiser state, trainable parameters only.
    memory: projections of earlier steps, see `memory_queue.py`; empty without.
  """

  step: PyTree
  params: PyTree
  batch_stats: PyTree
  opt_state: optax.OptState
  memory: PyTree

  @property
  def variables(self) -> dict[str, PyTree]:
    """The Flax variable collections of the model."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def create(
  variables: PyTree, tx: optax.GradientTransformation, memory: PyTree
) -> TrainState:
  """Returns the state before the first update.

  Args:
    variables: result of `model.init`, with `params` and maybe `batch_stats`.
    tx: optimiser over `variables["params"]`.
    memory: from `memory_queue.create`, or {}.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    batch_stats=variables.get("batch_stats", {}),
    opt_state=tx.init(variables["params"]),
    memory=memory,
  )
