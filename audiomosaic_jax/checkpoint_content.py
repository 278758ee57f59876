"""What a checkpoint must hold: the leaves of the state, bit for bit.

Storage loses bits in silence, and a folder may be copied half. So the
fingerprint of every leaf, and one of the description, are saved with the
description, and what is read is compared with them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from audiomosaic_jax import fingerprint

PyTree = Any

# The one name in a saved description that is not the caller's.
_FINGERPRINTS = "fingerprints"


def leaves(tree: PyTree) -> dict[str, Any]:
  """Returns leaf path -> leaf; attributes, keys and indices look alike."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def add_fingerprints(meta: Mapping[str, Any], state: PyTree) -> dict[str, Any]:
  """Returns the description to save: the caller's, and what was saved.

  Args:
    meta: JSON-serialisable.
    state: pytree of arrays, as it is saved with it.

  Raises:
    ValueError: `meta` already has a field of that name.
  """
  if _FINGERPRINTS in meta:
    raise ValueError(
      f"meta has a field {_FINGERPRINTS!r}, which checkpoints add themselves; "
      "give it another name"
    )
  found = {
    "meta": _of_json(meta),
    "state": fingerprint.of_leaves(leaves(state)),
  }
  return {**meta, _FINGERPRINTS: found}


def take_fingerprints(
  saved: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Returns the caller's description and the fingerprints beside it.

  They are None in a checkpoint that was written before there were any.
  """
  meta = dict(saved)
  return meta, meta.pop(_FINGERPRINTS, None)


def damage_of_meta(
  meta: Mapping[str, Any], fingerprints: Mapping[str, Any]
) -> str | None:
  """Returns how a description differs from the saved one, None if it is it."""
  wanted, found = fingerprints["meta"], _of_json(meta)
  if found == wanted:
    return None
  return f"meta has the fingerprint {found} but was saved with {wanted}"


def damage_of_state(
  state: PyTree, fingerprints: Mapping[str, Any]
) -> str | None:
  """Returns which leaves differ from the saved ones, None if none does.

  Args:
    state: the whole state or a part of it, in the dtypes it was saved in.
    fingerprints: from `take_fingerprints`.
  """
  wanted = fingerprints["state"]
  found = fingerprint.of_leaves(leaves(state))
  damaged = [name for name in found if found[name] != wanted.get(name)]
  if not damaged:
    return None
  first = damaged[0]
  return (
    f"{first} has the fingerprint {found[first]} but was saved with "
    f"{wanted.get(first)} ({len(damaged)} of {len(found)} leaves differ)"
  )


def check_tree(
  saved: Mapping[str, Any],
  target: PyTree,
  *,
  path: Any,
  allow_unused: bool,
) -> None:
  """Compares names and shapes of the saved leaves with the wanted ones.

  Args:
    saved: leaf path -> what has a shape.
    target: the wanted tree.
    path: of the checkpoint, for the message.
    allow_unused: whether the checkpoint may hold more than is wanted.

  Raises:
    ValueError: names the first leaf in which the two trees differ.
  """
  wanted = leaves(target)
  for name, leaf in wanted.items():
    if name not in saved:
      raise ValueError(
        f"checkpoint {path} has no {name} (wanted with shape {leaf.shape}); "
        "was it written by another model or optimizer configuration?"
      )
    if tuple(saved[name].shape) != tuple(leaf.shape):
      raise ValueError(
        f"checkpoint {path}: {name} has shape {tuple(saved[name].shape)} but "
        f"the model wants {leaf.shape}; use the configuration it was trained "
        "with"
      )
  unused = [name for name in saved if name not in wanted]
  if unused and not allow_unused:
    raise ValueError(
      f"checkpoint {path} has {len(unused)} leaves that the model lacks, the "
      f"first is {unused[0]} of shape {tuple(saved[unused[0]].shape)}; was it "
      "written by another model or optimizer configuration?"
    )


def _of_json(meta: Mapping[str, Any]) -> str:
  """Returns a fingerprint of the values, as they are after saving."""
  values = json.loads(json.dumps(meta))
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
