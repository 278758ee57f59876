"""Negatives from earlier steps, for batches that are too small.

A first-in, first-out queue of projections. They come from an encoder that
changes slowly, an exponential moving average of the trained one,

  slow <- momentum * slow + (1 - momentum) * params

so that the oldest of them are still comparable. With momentum 0 the trained
encoder's own projections are kept, which costs neither memory for a second
encoder nor a second forward pass.

Reference: He et al. 2020 (MoCo, arXiv 1911.05722); with momentum 0, Wang et al.
2020 (cross-batch memory, arXiv 1912.06798). Differs from upstream: the queue
adds to the negatives of the batch instead of replacing them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PyTree = Any


def create(
  key: jax.Array, params: PyTree, *, width: int, size: int, momentum: float
) -> dict[str, PyTree]:
  """Returns the memory before the first step.

  Args:
    key: random key; the queue starts as random directions.
    params: parameters of the model.
    width: features of a projection.
    size: rows of the queue; 0 is none.
    momentum: of the slow encoder, from 0 to less than 1.

  Returns:
    {} without a queue, else "rows" [size, width] and, with a momentum, the
    "params" of the slow encoder.

  Raises:
    ValueError: momentum is not in [0, 1).
  """
  if not size:
    return {}
  if not 0 <= momentum < 1:
    raise ValueError(
      f"loss.queue.momentum is {momentum}; use 0 up to less than 1"
    )
  memory = {"rows": jax.random.normal(key, (size, width))}
  if momentum:
    memory["params"] = jax.tree.map(jnp.copy, params)
  return memory


def follow(slow: PyTree, params: PyTree, momentum: float) -> PyTree:
  """Returns the slow encoder's parameters, moved towards the trained ones."""
  return jax.tree.map(
    lambda s, p: momentum * s + (1 - momentum) * p, slow, params
  )


def push(
  rows: Float[Array, "Q E"], views: tuple[Float[Array, "B E"], ...]
) -> Float[Array, "Q E"]:
  """Returns the queue with new rows at its head and the oldest gone."""
  return jnp.concatenate([*views, rows])[: len(rows)]
