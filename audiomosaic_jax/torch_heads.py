"""Which head a PyTorch checkpoint has, and its arguments, from its tensors.

Reference: `models.heads` names the published classes behind them.
"""

import re
from collections.abc import Mapping
from typing import Any

from audiomosaic_jax.reference_names import MODULES, NUM_RESIDUAL_BLOCKS
from audiomosaic_jax.torch_params import AASIST_UNUSED
from audiomosaic_jax.torch_settings import CHOSEN, TOLD, Choices, Told, pick

Shapes = Mapping[str, tuple[int, ...]]

# A tensor that only the head of this name has. A linear classifier has no such
# tensor: timm builds a "head" for any encoder.
MARKS = {
  "pretrain": "projector.0.weight",
  "aasist": "LL.weight",
  "weighted_sum": "layer_weights",
  "attentive": "attn_query",
}
HEADS = ("none", *MARKS, "linear", "layer")
# Of the published AASIST back end; no tensor tells them.
AASIST = {
  "pool_ratio": 0.5,
  "temperatures": (2.0, 2.0, 100.0),
  "input_dropout": 0.2,
  "pool_dropout": 0.3,
  "branch_dropout": 0.2,
  "readout_dropout": 0.5,
}


def found_head(shapes: Shapes) -> str:
  """Returns the head whose tensors are there; "linear" may be a layer probe."""
  for head, mark in MARKS.items():
    if mark in shapes:
      return head
  linear = "fc_norm.weight" in shapes and "head.weight" in shapes
  return "linear" if linear else "none"


def chosen_head(
  found: str, told: Told, choices: Choices, notes: list[str]
) -> str:
  """Returns the head to import, which is `found` unless somebody says more."""
  layer = "layer" if choices.layer is not None else None
  head = pick(
    notes,
    "head",
    (choices.head, CHOSEN),
    (layer, CHOSEN),
    ("layer" if told.is_layer_probe else None, TOLD),
    (found, "the tensors that are there"),
  )
  if head == "linear":
    notes[-1] += "; the probe of one layer has the same (head=layer, layer=N)"
  if head not in (found, "none") and (head, found) != ("layer", "linear"):
    raise ValueError(
      f"head {head!r} does not fit the checkpoint, which has tensors of "
      f"{found!r}; leave head out, or choose 'none' for the encoder alone"
    )
  if choices.layer is not None and head != "layer":
    raise ValueError(
      f"layer={choices.layer} is of head 'layer', not of {head!r}"
    )
  return head


def model(
  shapes: Shapes,
  head: str,
  encoder: Mapping[str, Any],
  told: Told,
  choices: Choices,
  notes: list[str],
) -> dict[str, Any]:
  """Returns what a config says of the model besides the encoder.

  Args:
    shapes: name without prefixes -> shape, of every tensor.
    head: a name in HEADS.
    encoder: arguments of models.vit.ViT.
    told: by config.json.
    choices: of a person.
    notes: gets a line for each value that the tensors do not tell.

  Returns:
    Arguments of `models.audiomosaic.build`, with projector None for "none",
    or of `models.heads.build`; without encoder, grid and classes.

  Raises:
    ValueError: the tensors of the head are incomplete, or nothing tells which
      block it reads.
  """
  if head == "aasist":
    notes.append(f"model: {AASIST}: as published")
    return {"head": head, "freeze_encoder": False, **_aasist(shapes), **AASIST}
  pooling = {
    "pooling": pick(
      notes,
      "model.pooling",
      (choices.pooling, CHOSEN),
      (told.pooling, TOLD),
      ("mean", "as published"),
    )
  }
  if head in ("none", "pretrain"):
    return pooling | _pretraining(shapes, head, notes)
  own: dict[str, Any] = {}
  if head == "layer":
    candidates = ((choices.layer, CHOSEN), (told.layer, TOLD))
    if all(value is None for value, _ in candidates):
      raise ValueError("head 'layer' needs the block that it reads; give layer")
    own = {"layer": pick(notes, "model.layer", *candidates)}
  if head in ("weighted_sum", "attentive"):
    own = {"parity": _parity(shapes, head, encoder["depth"])}
  if head == "attentive":
    own["num_queries"] = _axis(shapes, "attn_query", 1, 4)
  return {"head": head, "freeze_encoder": False, **pooling, **own}


def _pretraining(shapes: Shapes, head: str, notes: list[str]) -> dict[str, Any]:
  """Returns arguments of models.audiomosaic.build; head "none" has no z."""
  model: dict[str, Any] = {
    "projector": None,
    # The norm of other heads is of something else.
    "use_fc_norm": "fc_norm.weight" in shapes
    and found_head(shapes) in ("none", "pretrain", "linear"),
    "temperature": 0.1,
    "logit_bias": 0.0,
    "learnable_temperature": False,
    "learnable_bias": False,
    "num_online_classes": 0,
  }
  if head == "pretrain":
    notes.append("model.temperature = 0.1: as published")
    model |= {
      "projector": {
        "hidden_features": _axis(shapes, "projector.0.weight", 0, 2),
        "out_features": _axis(shapes, "projector.3.weight", 0, 2),
      },
      "learnable_temperature": "logit_scale" in shapes,
      "learnable_bias": "logit_bias" in shapes,
    }
    if "online_classifier.weight" in shapes:
      classes = _axis(shapes, "online_classifier.weight", 0, 2)
      model["num_online_classes"] = classes
  return model


def _parity(shapes: Shapes, head: str, depth: int) -> str:
  """Returns whether the output of the last block counts once or twice."""
  if head == "weighted_sum":
    layers = _axis(shapes, "layer_weights", 0, 1)
  else:
    layers = sum(
      bool(re.fullmatch(r"layer_norms\.\d+\.weight", n)) for n in shapes
    )
  parities = {depth: "paper", depth + 1: "released"}
  if layers not in parities:
    raise ValueError(
      f"the head reads {layers} layers, but there are {depth} blocks; "
      f"{depth} or {depth + 1} layers would fit: is the checkpoint complete?"
    )
  return parities[layers]


def _aasist(shapes: Shapes) -> dict[str, Any]:
  return {
    "width": _axis(shapes, "LL.weight", 0, 2),
    "filters": tuple(
      _axis(shapes, f"encoder.{i}.0.conv2.weight", 0, 4)
      for i in range(NUM_RESIDUAL_BLOCKS)
    ),
    "graph_width": _axis(shapes, "GAT_layer_S.att_proj.weight", 0, 2),
    "branch_width": _axis(shapes, "pool_hS1.proj.weight", 1, 2),
  }


def num_classes(shapes: Shapes, head: str) -> int:
  """Returns the classes of a classifier."""
  name = "out_layer.weight" if head == "aasist" else "head.weight"
  return _axis(shapes, name, 0, 2)


def _axis(shapes: Shapes, name: str, axis: int, rank: int) -> int:
  """Returns the size of one axis of a tensor that must be there."""
  if len(shapes.get(name, ())) != rank:
    raise ValueError(
      f"{name} is {shapes.get(name, 'not there')}; the head of this checkpoint "
      f"needs it with {rank} axes: is it complete?"
    )
  return shapes[name][axis]


def ignored(head: str, found: str, *, use_fc_norm: bool) -> tuple[str, ...]:
  """Returns patterns of the names of tensors that are rightly left out.

  Args:
    head: that is imported.
    found: whose tensors are there.
    use_fc_norm: whether a pretraining model keeps the norm after its pooling.
  """
  patterns = AASIST_UNUSED if found == "aasist" else ()
  if head == "none" and found != "none":
    keep = "fc_norm" if use_fc_norm else None
    heads = {
      reference
      for ours, (reference, _) in MODULES.items()
      if not ours.startswith("encoder/") and reference != keep
    }
    patterns = (
      *patterns,
      *sorted(
        re.escape(name).replace(r"\*", r"\d+") + r"(\..*)?" for name in heads
      ),
    )
  return tuple(patterns)
