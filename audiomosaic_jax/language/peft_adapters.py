"""Reads and writes adapters of PEFT: adapter_config.json and its tensors.

  attributes = read_settings("vicuna-ltu-lora")     lora_rank, lora_alpha, ...
  model = Llama(**base_attributes, **attributes)
  adapters = from_tensors(open_adapter("vicuna-ltu-lora"), model)
  params = lora.join(adapters, base)

PEFT holds A [r, in] and B [out, r] of every layer; here they are [in, r] and
[r, out], stacked over layers.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from audiomosaic_jax import files, torch_files, weight_files
from audiomosaic_jax.language import llama_weights
from audiomosaic_jax.models import lora
from audiomosaic_jax.models.llama import TARGETS, Llama, abstract_params
from audiomosaic_jax.weight_files import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
NAMES = {"lora_a": "lora_A", "lora_b": "lora_B"}
ALL = "all-linear"
# Field -> the values that mean the adapter that is computed here. Absent or
# null is one of them everywhere.
PLAIN = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "use_dora": (False,),
  "use_rslora": (False,),
  "use_qalora": (False,),
  "lora_bias": (False,),
  "fan_in_fan_out": (False,),
  "rank_pattern": ({},),
  "alpha_pattern": ({},),
  "modules_to_save": ([],),
  "layers_to_transform": ([],),
  "layer_replication": ([],),
  "exclude_modules": ([],),
  "target_parameters": ([],),
  "trainable_token_indices": ([],),
}


def read_settings(folder: str | pathlib.Path) -> dict[str, Any]:
  """Returns the attributes of `Llama` that describe an adapter.

  Raises:
    FileNotFoundError: there is no adapter_config.json.
    ValueError: it is of another kind of adapter.
  """
  path = pathlib.Path(folder).expanduser() / CONFIG_FILE
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; give a folder of PEFT")
  settings = json.loads(path.read_text(encoding="utf-8"))
  for name, known in PLAIN.items():
    if settings.get(name) not in (None, *known):
      raise ValueError(
        f"{path}: {name} {settings[name]!r} is not supported, only "
        f"{known[0]!r}; merge the adapter with PEFT and give the whole model"
      )
  targets = settings["target_modules"]
  targets = TARGETS if targets == ALL else targets
  unknown = [name for name in targets if name not in TARGETS]
  if isinstance(targets, str) or unknown:
    raise ValueError(
      f"{path}: target_modules {targets!r} is not supported; they must be a "
      f"list of {TARGETS}"
    )
  return {
    "lora_rank": settings["r"],
    "lora_alpha": float(settings["lora_alpha"]),
    "lora_dropout": float(settings["lora_dropout"]),
    "lora_targets": tuple(sorted(targets)),
  }


def open_adapter(folder: str | pathlib.Path) -> dict[str, Tensor]:
  """Opens the tensors of a folder of PEFT.

  Raises:
    FileNotFoundError: there are none.
  """
  folder = pathlib.Path(folder).expanduser()
  for name in WEIGHTS_FILES:
    if (folder / name).exists():
      return weight_files.open_weights(folder / name)
  raise FileNotFoundError(
    f"{folder} has none of {WEIGHTS_FILES}; give a folder of PEFT"
  )


def from_tensors(tensors: Mapping[str, Tensor], model: Llama) -> dict[str, Any]:
  """Reads the adapters of a decoder.

  Args:
    tensors: of `open_adapter`, or of a file that holds them among others, as
      PEFT names them, with or without its prefix or the adapter's name
      "default". Names without "lora_" are passed over.
    model: with the rank and targets of the adapter.

  Returns:
    Float32 arrays, the tree that `lora.split` returns.

  Raises:
    ValueError: tensors are missing, too many, or of other shapes.
  """
  given = {_plain(name): x for name, x in tensors.items() if "lora_" in name}
  shapes = _adapter_shapes(model)
  wanted = {
    peft_name(path, layer): (path, layer)
    for path, leaf in shapes.items()
    for layer in range(leaf.shape[0])
  }
  if differing := sorted(set(given) ^ set(wanted)):
    which = "missing" if differing[0] in wanted else "not of this model"
    raise ValueError(
      f"the adapter differs from the model in {len(differing)} tensors, the "
      f"first is {differing[0]}, {which}; set lora_targets and lora_rank as "
      f"{CONFIG_FILE} has them"
    )
  adapters = {path: np.empty(x.shape, x.dtype) for path, x in shapes.items()}
  for name, (path, layer) in wanted.items():
    shape = shapes[path].shape[:0:-1]
    if given[name].shape != shape:
      raise ValueError(
        f"{name} is {given[name].shape}, wanted {shape}; set lora_rank to that "
        "of the adapter, and give its own base"
      )
    adapters[path][layer] = weight_files.read_whole(given[name]).T
  return traverse_util.unflatten_dict(adapters)


def to_tensors(adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the tensors of an adapter file of PEFT, by name."""
  return {
    PREFIX + peft_name(path, layer): np.asarray(matrix).T
    for path, leaf in traverse_util.flatten_dict(adapters).items()
    for layer, matrix in enumerate(np.asarray(leaf))
  }


def write_adapter(
  adapters: Mapping[str, Any],
  model: Llama,
  base: str,
  folder: str | pathlib.Path,
) -> None:
  """Writes a folder that PEFT reads.

  Args:
    adapters: of `lora.split`.
    model: whose rank, alpha, dropout and targets they have.
    base: name or path of the model that they belong to, a note for readers.
    folder: is created; an adapter in it is replaced.
  """
  folder = pathlib.Path(folder).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  settings = {
    "base_model_name_or_path": base,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": model.lora_alpha,
    "lora_dropout": model.lora_dropout,
    "peft_type": "LORA",
    "r": model.lora_rank,
    "target_modules": sorted(model.lora_targets),
    "task_type": "CAUSAL_LM",
  }
  torch_files.write_tensors(to_tensors(adapters), folder / WEIGHTS_FILES[0])
  files.write_text(folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")


def peft_name(path: tuple[str, ...], layer: int) -> str:
  """Returns PEFT's name of a factor, without its prefix."""
  name = llama_weights.hf_name(path[:-1], layer).removesuffix(".weight")
  return f"{name}.{NAMES[path[-1]]}.weight"


def _plain(name: str) -> str:
  return name.removeprefix(PREFIX).replace(".default.weight", ".weight")


def _adapter_shapes(model: Llama) -> dict[tuple[str, ...], Any]:
  return traverse_util.flatten_dict(lora.split(abstract_params(model))[0])
