"""Reads what a decoder of the Llama family is from its Hugging Face config.

Config files of all ages are read: a flat `rope_theta` with `rope_scaling`, the
nested `rope_parameters` of transformers 5, or neither. What would compute
something else than `models.llama` does is refused by name.
"""

from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("llama", "mistral")
# RoPE type -> fields that it needs, in the order models.rope.ROPE takes them.
ROPE_FIELDS = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
}
NEEDED = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "rms_norm_eps",
)
# Field -> the only value, apart from being absent or null, that is computed.
FIXED = {
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "sliding_window": None,
  "quantization_config": None,
}
# What files leave out when it is this.
ROPE_THETA = 10000.0


def from_hf_config(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the attributes of `Llama` that a config.json settles.

  Args:
    settings: content of the file.

  Returns:
    Keyword arguments of `Llama`; adapters, remat and types are left to you.

  Raises:
    ValueError: it is of another architecture, or incomplete.
  """
  _check(settings)
  heads = settings["num_attention_heads"]
  attributes = {name: settings[name] for name in NEEDED}
  attributes["rms_norm_eps"] = float(settings["rms_norm_eps"])
  # Files from before grouped queries have no num_key_value_heads.
  attributes["num_key_value_heads"] = _given(
    settings, "num_key_value_heads", heads
  )
  attributes["head_dim"] = _given(
    settings, "head_dim", settings["hidden_size"] // heads
  )
  attributes["tie_word_embeddings"] = bool(
    _given(settings, "tie_word_embeddings", False)
  )
  return {**attributes, **_rope(settings)}


def _check(settings: Mapping[str, Any]) -> None:
  found = settings.get("model_type")
  if found not in MODEL_TYPES:
    raise ValueError(
      f"model_type {found!r} is not supported; give a model of one of "
      f"{MODEL_TYPES}, such as Vicuna or TinyLlama"
    )
  if missing := [name for name in NEEDED if settings.get(name) is None]:
    raise ValueError(
      f"config.json lacks {missing}; give the one that came with the weights"
    )
  for name, only in FIXED.items():
    if settings.get(name) not in (None, only):
      raise ValueError(
        f"{name} {settings[name]!r} is not supported, only {only!r}; give "
        "another model"
      )


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the attributes rope_type, rope_theta and rope_scaling."""
  rope = {
    **_given(settings, "rope_scaling", {}),
    **_given(settings, "rope_parameters", {}),
  }
  # Files before transformers 4.43 say "type".
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ROPE_FIELDS:
    raise ValueError(
      f"RoPE type {kind!r} is not supported; give a model with one of "
      f"{tuple(ROPE_FIELDS)}"
    )
  for holder in (settings, rope):
    if (part := _given(holder, "partial_rotary_factor", 1.0)) != 1.0:
      raise ValueError(
        f"partial_rotary_factor {part} is not supported, only 1.0; give "
        "another model"
      )
  fields = ROPE_FIELDS[kind]
  if missing := [name for name in fields if rope.get(name) is None]:
    raise ValueError(f"RoPE type {kind!r} lacks {missing} in config.json")
  theta = _given(rope, "rope_theta", _given(settings, "rope_theta", ROPE_THETA))
  return {
    "rope_type": kind,
    "rope_theta": float(theta),
    "rope_scaling": tuple(float(rope[name]) for name in fields),
  }


def _given(settings: Mapping[str, Any], name: str, otherwise: Any) -> Any:
  """Returns a field; `otherwise` where it is absent or null."""
  found = settings.get(name)
  return otherwise if found is None else found
