"""The small audio-language model of the golden values."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from audiomosaic_jax import sharding, weight_files
from audiomosaic_jax.language import audio_weights, llama_weights
from audiomosaic_jax.models.audio_lm import AudioLM, AudioProjector
from audiomosaic_jax.models.vit import ViT
from tests import tiny_llama
from tests.tiny_vit import TINY_VIT

FOLDER = pathlib.Path(__file__).parent / "golden" / "alm_tiny"
EOS = 2


def build(**changes) -> AudioLM:
  """Returns the model of the files, in the published form."""
  audio = json.loads((FOLDER / "audio_config.json").read_text())
  encoder = TINY_VIT | {
    "grid": (64, 8),
    "patch_size": 16,
    "width": audio["embed_dim"],
    "depth": audio["depth"],
    "num_heads": audio["num_heads"],
    "mlp_ratio": audio["mlp_ratio"],
    "final_norm": True,
  }
  llama = tiny_llama.build(llama_weights.read_settings(FOLDER))
  published = {
    "encoder": ViT(**encoder),
    "projector": AudioProjector(llama.hidden_size, audio["feature_divisor"]),
    "llama": llama,
    "time_stride": 2,
    "pooling_order": "reference",
    "shuffle_tokens": False,
    "count_padding": True,
  }
  return AudioLM(**(published | changes))


def shapes(model: AudioLM):
  fbank = jnp.zeros((1, 1024, 128))
  one = jnp.zeros((1, 1), jnp.int32)
  init = functools.partial(model.init, train=False)
  key, yes = jax.random.key(0), one == 0
  return jax.eval_shape(init, key, fbank, one, yes, yes[:, 0])["params"]


@functools.cache
def params():
  model = build()
  tensors = weight_files.open_weights(FOLDER)
  mesh = sharding.make_mesh(jax.devices()[:1])
  base = llama_weights.read_params(
    tensors, model.llama, mesh, ignore=audio_weights.AUDIO
  )
  audio = audio_weights.from_tensors(tensors, shapes(model))
  return {**jax.tree.map(jnp.asarray, audio), "llama": base}


@functools.cache
def golden() -> dict[str, jax.Array]:
  with np.load(FOLDER / "golden.npz") as arrays:
    return {name: jnp.asarray(x) for name, x in arrays.items()}
