"""How augmentations are drawn: which in what order, and for which examples.

The augmentations themselves are in `augment_waveform` and `augment_fbank`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def choose(
  key: Key[Array, ""],
  p: float,
  changed: Float[Array, "batch *rest"],
  original: Float[Array, "batch *rest"],
) -> Float[Array, "batch *rest"]:
  """Keeps the changed example with probability p, example by example."""
  shape = (original.shape[0],) + (1,) * (original.ndim - 1)
  return jnp.where(jax.random.bernoulli(key, p, shape), changed, original)


def in_order(
  table: Mapping[str, Callable[..., jax.Array]],
  key: Key[Array, ""],
  x: jax.Array,
  known: Mapping[str, Any],
  order: Sequence[str],
  parameters: Any,
) -> jax.Array:
  """Applies the named augmentations one after the other.

  Args:
    table: name -> function of (key, x, **parameters).
    key: random key; the i-th step uses fold_in(key, i).
    x: what they change.
    known: arguments that every function may ask for by name.
    order: names from the table.
    parameters: mapping of name -> the other arguments.

  Raises:
    ValueError: a name that is not in the table, or one without parameters.
  """
  for name in (*order, *parameters):
    if name not in table:
      raise ValueError(
        f"unknown augmentation {name!r}; choose from {', '.join(sorted(table))}"
      )
  for i, name in enumerate(order):
    if name not in parameters:
      raise ValueError(
        f"order has {name!r} but there are no parameters of that name; "
        f"got parameters of {', '.join(sorted(parameters)) or 'none'}"
      )
    wanted = inspect.signature(table[name]).parameters
    shared = {k: value for k, value in known.items() if k in wanted}
    step_key = jax.random.fold_in(key, i)
    x = table[name](step_key, x, **shared, **parameters[name])
  return x
