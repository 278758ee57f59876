"""Which parameters of an audio-language model learn, by their paths.

  learned, fixed = split(params, (r"projector/.*", r"encoder/norm/.*"))
  params = join(learned, fixed)

A pattern matches a whole path, "encoder/norm/scale", so that the one for the
last norm of the encoder leaves those of its blocks alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

Params = dict[str, Any]


def split(
  params: Mapping[str, Any], patterns: Sequence[str]
) -> tuple[Params, Params]:
  """Returns what matches a pattern, and the rest: trees that share no leaf.

  Args:
    params: arrays or shapes.
    patterns: regular expressions of whole paths.

  Raises:
    ValueError: a pattern that matches nothing.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for pattern in patterns:
    if not any(re.fullmatch(pattern, path) for path in flat):
      raise ValueError(
        f"pattern {pattern!r} matches none of {len(flat)} parameters; it must "
        f"match a whole path such as {next(iter(flat))!r}"
      )
  chosen = {
    path: leaf
    for path, leaf in flat.items()
    if any(re.fullmatch(pattern, path) for pattern in patterns)
  }
  rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
  unflatten = traverse_util.unflatten_dict
  return unflatten(chosen, sep="/"), unflatten(rest, sep="/")


def join(*trees: Mapping[str, Any]) -> Params:
  """Returns one tree of trees that share no leaf."""
  flat = {}
  for tree in trees:
    flat |= traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(flat)


def count(params: Any) -> int:
  """Returns how many numbers a tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
