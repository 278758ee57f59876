"""The language model that stays as it is: decoder, tokens, fingerprint.

  base = open_base("vicuna-7b", mesh, lora_rank=8, ...)
  base.llama, base.params, base.tokenizer

It is never saved with what is learned; a checkpoint holds its fingerprint,
and another base is refused.
"""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import traverse_util

from audiomosaic_jax import fingerprint, sharding, weight_files
from audiomosaic_jax.data import text
from audiomosaic_jax.language import audio_weights, llama_weights
from audiomosaic_jax.models import llama_config
from audiomosaic_jax.models.llama import Llama

ConfigDict = ml_collections.ConfigDict


class Base(NamedTuple):
  """A decoder from disk.

  Attributes:
    llama: with adapters, if it was given a rank.
    params: without adapters, on the devices of a mesh.
    settings: of its config.json.
    tokenizer: of its folder.
  """

  llama: Llama
  params: dict[str, Any]
  settings: dict[str, Any]
  tokenizer: text.Tokenizer


def read_llama(folder: str | pathlib.Path, **attributes: Any) -> Llama:
  """Returns the decoder of a Hugging Face folder, without its weights.

  Args:
    folder: with config.json.
    **attributes: those of `Llama` that the file does not settle.
  """
  settings = llama_weights.read_settings(folder)
  return Llama(**llama_config.from_hf_config(settings), **attributes)


def open_base(
  folder: str | pathlib.Path,
  mesh: jax.sharding.Mesh,
  *,
  tokenizer: str,
  **attributes: Any,
) -> Base:
  """Reads a decoder onto devices.

  If `mesh` splits batches, kernels are stored in parts and gathered for each
  use; if it has an axis for tensors, each device computes with its part.

  Args:
    folder: of the Hugging Face Hub: config.json, weights, tokenizer. Audio
      weights among them, as in the published bases, are left out.
    mesh: the devices.
    tokenizer: a folder or file of its own; "" is the same folder.
    **attributes: of `Llama`: adapters, remat and types.

  Raises:
    FileNotFoundError: something is not there.
    ValueError: another architecture, or weights that do not fit it.
  """
  gather = None if sharding.TENSOR_AXIS in mesh.shape else sharding.Everywhere
  llama = read_llama(folder, use_kernel=gather and gather(mesh), **attributes)
  tokens = text.open_tokenizer(tokenizer or folder)
  if tokens.vocab_size > llama.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokens.vocab_size} tokens, the decoder in {folder} "
      f"{llama.vocab_size}; give the tokenizer that came with it"
    )
  params = llama_weights.read_params(
    weight_files.open_weights(folder), llama, mesh, ignore=audio_weights.AUDIO
  )
  return Base(llama, params, llama_weights.read_settings(folder), tokens)


def within(workdir: pathlib.Path, *parts: str) -> str:
  """Returns a path of a config, in which "{workdir}" is that of the run."""
  path = str(pathlib.PurePath(*parts))
  return path.replace("{workdir}", str(workdir))


def place(config: ConfigDict, workdir: pathlib.Path) -> dict[str, str]:
  """Returns the arguments folder and tokenizer of `open_base` for a run.

  Raises:
    ValueError: the config names no base.
  """
  if not config.base.folder:
    raise ValueError(
      "base.folder is empty; give the folder of a Llama, such as Vicuna-7B, "
      "that huggingface_hub.snapshot_download returned, or try "
      "--config=configs/instruct.py:debug"
    )
  return {
    name: within(workdir, config.base[name]) if config.base[name] else ""
    for name in ("folder", "tokenizer")
  }


def fingerprint_of(params: dict[str, Any]) -> str:
  """Returns what tells a base from others: every bit of it counts."""
  flat = traverse_util.flatten_dict(params, sep="/")
  found = fingerprint.of_leaves(flat)
  text_of_all = json.dumps(found, sort_keys=True)
  return hashlib.sha256(text_of_all.encode()).hexdigest()[:32]


def check(saved: str, found: str, folder: pathlib.Path) -> None:
  """Raises ValueError unless a state belongs to the base that is there."""
  if saved != found:
    raise ValueError(
      f"the state in {folder} was trained on a base with fingerprint {saved}, "
      f"but this one has {found}; give the base that it was trained on"
    )
