"""The config of a PyTorch checkpoint, from names and shapes of its tensors.

They tell nearly all of the architecture; `torch_settings` has the rest. Where
config.json of a folder contradicts the tensors, nothing is built.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from audiomosaic_jax import torch_heads
from audiomosaic_jax.torch_settings import (
  CHOSEN,
  NORMALIZATIONS,
  TOLD,
  Choices,
  Told,
  front_end,
  pick,
  read_settings,
)

ConfigDict = ml_collections.ConfigDict
Shapes = Mapping[str, tuple[int, ...]]

LAYOUTS = ("released", "paper")
# Rank of tensors that every encoder has.
NEEDED = {
  "patch_embed.proj.weight": 4,
  "pos_embed": 3,
  "blocks.0.norm1.weight": 1,
  "blocks.0.attn.qkv.weight": 2,
  "blocks.0.mlp.fc1.weight": 2,
}
# The rule of ViT-Ti, S, B and L, and their numbers of blocks.
HEAD_CHANNELS = 64
PUBLISHED_DEPTHS = (12, 24)
# What `evaluate` does with embeddings, equal to configs/common.py.
PROBE = {
  "task": "",
  "eval_every": 5000,
  "batch_size": 64,
  "max_windows": 3,
  "knn_neighbours": (1, 3, 5, 10, 20),
  "linear_c": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
  "readout": "mean",
  "online_k": 5,
  "online_temperature": 0.1,
  "online_l2": 1.0,
}


class Derived(NamedTuple):
  """What is known of a checkpoint.

  Attributes:
    config: of a pretraining run, or with mode "finetune" of a classifier, as
      far as it is read without training.
    head: a name in torch_heads.HEADS.
    ignore: regular expressions of the tensors that its model lacks.
    notes: a line for each value that the tensors do not tell.
  """

  config: ConfigDict
  head: str
  ignore: tuple[str, ...]
  notes: tuple[str, ...]


def derive(
  shapes: Shapes, settings: Mapping[str, Any], choices: Choices
) -> Derived:
  """Finds the config that fits a checkpoint.

  Args:
    shapes: name without prefixes -> shape, of every tensor.
    settings: config.json of a published folder; empty without one.
    choices: of a person.

  Raises:
    ValueError: this is no AudioMosaic encoder; shapes contradict one another,
      config.json or a choice; or nothing tells a value.
  """
  told, notes = read_settings(settings), []
  _check_choices(choices)
  encoder = _encoder(shapes, told, choices, notes)
  positions = shapes["pos_embed"][1] - int(encoder["class_token"])
  front = front_end(positions, encoder["patch_size"], told, choices, notes)
  found = torch_heads.found_head(shapes)
  head = torch_heads.chosen_head(found, told, choices, notes)
  model = torch_heads.model(shapes, head, encoder, told, choices, notes)
  config = {
    "mode": "pretrain" if head in ("none", "pretrain") else "finetune",
    "seed": 0,
    "num_seeds": 1,
    **front,
    "model": {"encoder": encoder, **model},
    "probe": PROBE,
  }
  if config["mode"] == "finetune":
    config["num_classes"] = num_classes = torch_heads.num_classes(shapes, head)
    config["class_names"] = choices.class_names
    if choices.class_names and len(choices.class_names) != num_classes:
      raise ValueError(
        f"{len(choices.class_names)} class names, but the classifier has "
        f"{num_classes} classes; give all of them, in order"
      )
  config = ConfigDict(config)
  _check_settings(config, settings)
  ignore = torch_heads.ignored(
    head, found, use_fc_norm=bool(model.get("use_fc_norm"))
  )
  return Derived(config, head, ignore, tuple(notes))


def _encoder(
  shapes: Shapes, told: Told, choices: Choices, notes: list[str]
) -> dict[str, Any]:
  """Returns the arguments of models.vit.ViT, except the grid."""
  for name, rank in NEEDED.items():
    if len(shapes.get(name, ())) != rank:
      raise ValueError(
        f"{name} is {shapes.get(name, 'not there')}; an AudioMosaic encoder "
        f"has it with {rank} axes. The checkpoint has {sorted(shapes)[:6]}, ..."
      )
  width, channels, patch_size, breadth = shapes["patch_embed.proj.weight"]
  if channels != 1 or patch_size != breadth or not patch_size:
    raise ValueError(
      "patch_embed.proj.weight is "
      f"{shapes['patch_embed.proj.weight']}; only square patches of one "
      "channel are known"
    )
  blocks = {
    int(match[1])
    for name in shapes
    if (match := re.match(r"blocks\.(\d+)\.", name))
  }
  depth = len(blocks)
  if absent := [i for i in range(depth) if i not in blocks]:
    raise ValueError(
      f"the checkpoint has tensors of blocks.{max(blocks)}, but none of "
      f"blocks.{absent[0]}; it is incomplete"
    )
  if depth not in PUBLISHED_DEPTHS:
    notes.append(
      f"model.encoder.depth = {depth}: the blocks that are there; published "
      f"encoders have {PUBLISHED_DEPTHS}"
    )
  return {
    "patch_size": patch_size,
    "width": width,
    "depth": depth,
    "num_heads": _num_heads(shapes, width, told, choices, notes),
    "mlp_ratio": ratio_of(shapes["blocks.0.mlp.fc1.weight"][0], width),
    "drop_path": 0.0,
    "norm": "layernorm" if "blocks.0.norm1.bias" in shapes else "rmsnorm",
    "activation": pick(
      notes,
      "model.encoder.activation",
      (choices.activation, CHOSEN),
      (told.activation, TOLD),
      ("gelu", "as published"),
    ),
    "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
    "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
    "proj_bias": "blocks.0.attn.proj.bias" in shapes,
    "pos_embed": "learnable",
    "pos_layout": choices.layout,
    "class_token": "cls_token" in shapes,
    "final_norm": "norm.weight" in shapes,
    "attention": "auto",
    "remat": "none",
    "scan_unroll": 0,
    "dtype": "float32",
  }


def _num_heads(
  shapes: Shapes, width: int, told: Told, choices: Choices, notes: list[str]
) -> int:
  rule = width // HEAD_CHANNELS if width % HEAD_CHANNELS == 0 else None
  candidates = [
    (choices.num_heads, CHOSEN),
    (told.num_heads, TOLD),
    (rule, f"{HEAD_CHANNELS} channels per head, as published"),
  ]
  if norm := shapes.get("blocks.0.attn.q_norm.weight"):
    exact = width // norm[0]
    candidates.append((exact, "the channels of q_norm"))
    if candidates[0][0] in (None, exact):
      candidates = candidates[-1:]
    else:
      raise ValueError(
        f"num_heads={choices.num_heads}, but q_norm has {norm[0]} of {width} "
        f"channels, which makes {exact}; leave num_heads out"
      )
  if all(value is None for value, _ in candidates):
    raise ValueError(
      f"no tensor tells num_heads, and width {width} is no multiple of the "
      f"published {HEAD_CHANNELS} channels per head; give num_heads"
    )
  return pick(notes, "model.encoder.num_heads", *candidates)


def ratio_of(hidden: int, width: int) -> float:
  """Returns the ratio r for which int(width * r) is `hidden`."""
  ratio = hidden / width
  return ratio if int(width * ratio) == hidden else math.nextafter(ratio, 1e9)


def _check_choices(choices: Choices) -> None:
  known = {
    "head": (choices.head, (None, *torch_heads.HEADS)),
    "layout": (choices.layout, LAYOUTS),
    "normalization": (choices.normalization, tuple(NORMALIZATIONS)),
  }
  for field, (value, options) in known.items():
    if value not in options:
      raise ValueError(f"{field}={value!r}; use one of {options}")


def _check_settings(config: ConfigDict, settings: Mapping[str, Any]) -> None:
  """Raises ValueError for a field of config.json that the tensors deny."""
  encoder, model = config.model.encoder, config.model
  ours = {
    "embed_dim": encoder.width,
    "depth": encoder.depth,
    "patch_size": [encoder.patch_size] * 2,
    "spec_size": [config.spectrogram.num_frames, config.fbank.num_mel_bins],
    "mlp_ratio": encoder.mlp_ratio,
    "norm_layer_type": encoder.norm,
    "qk_norm": encoder.qk_norm,
    "qkv_bias": encoder.qkv_bias,
    "proj_bias": encoder.proj_bias,
  }
  if config.mode == "finetune":
    ours["num_classes"] = config.num_classes
  elif model.projector is not None:
    ours["project_embedding_dim"] = model.projector.out_features
  for name, value in ours.items():
    given = settings.get(name, value)
    if name == "patch_size" and isinstance(given, int):
      given = [given] * 2
    if given != value:
      raise ValueError(
        f"config.json says {name} is {given!r}, but the tensors make "
        f"it {value!r}; is the checkpoint complete, and of this folder?"
      )
