"""Small decoders of the golden values, and the settings of large ones."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from audiomosaic_jax import sharding, weight_files
from audiomosaic_jax.language import llama_weights
from audiomosaic_jax.models import llama_config
from audiomosaic_jax.models.llama import Llama, abstract_params

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = ("llama_tiny", "llama_tiny_sharded")
EXTRAS = {
  "lora_rank": 0,
  "lora_alpha": 8.0,
  "lora_dropout": 0.0,
  "lora_targets": ("q_proj", "v_proj"),
  "remat": "none",
  "dtype": "float32",
  "param_dtype": "float32",
  "use_kernel": None,
}
SETTINGS = {
  "model_type": "llama",
  "vocab_size": 48,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-6,
}


def build(settings=SETTINGS, **overrides) -> Llama:
  attributes = llama_config.from_hf_config(settings)
  return Llama(**{**attributes, **EXTRAS, **overrides})


def stored(name: str, **overrides) -> Llama:
  return build(llama_weights.read_settings(GOLDEN / name), **overrides)


def golden(name: str, file: str = "golden.npz") -> dict[str, jax.Array]:
  """Returns what transformers and PEFT computed, as arrays of JAX."""
  with np.load(GOLDEN / name / file) as arrays:
    return {key: jnp.asarray(x) for key, x in arrays.items()}


@functools.cache
def stored_params(name: str):
  mesh = sharding.make_mesh(jax.devices()[:1])
  tensors = weight_files.open_weights(GOLDEN / name)
  return llama_weights.read_params(tensors, stored(name), mesh)


def random_params(model: Llama, seed: int = 0):
  """Returns parameters that are all drawn, adapters and norms included."""
  leaves, tree = jax.tree.flatten(abstract_params(model))
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  drawn = [
    (0.2 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, drawn)


def next_token_loss(logits, labels):
  """Returns the mean over labels that are not -100."""
  counted = labels[:, 1:] != -100
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], jnp.maximum(labels[:, 1:], 0)
  )
  return jnp.sum(losses * counted) / counted.sum()


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, ids, valid):
  return model.apply(
    {"params": params}, ids, valid, train=False, method="from_ids"
  )


def inputs(model, rows=2, length=7):
  ids = jax.random.randint(jax.random.key(1), (rows, length), 0, 48)
  return ids, jnp.ones((rows, length), bool)
