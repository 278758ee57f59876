"""Embeds a clip with exported parameters and the Vision Transformer alone.

python -m audiomosaic_jax.export --encoder=PATH --output=DIR --format=params
python examples/use_params.py DIR clip.wav embedding.npy
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from flax import traverse_util

from audiomosaic_jax import features
from audiomosaic_jax.models.layers import NORMS
from audiomosaic_jax.models.vit import ViT

POOLINGS = {  # The class token, if there is one, is the first.
  "mean": lambda tokens: tokens.mean(axis=0),
  "mean_no_cls": lambda tokens: tokens[1:].mean(axis=0),
  "cls": lambda tokens: tokens[0],
  "fusion": lambda tokens: jnp.append(tokens[0], tokens[1:].mean(axis=0)),
}


def embed(config, params, waveform):
  """Returns the embedding [E] of a clip [S]: the mean over its windows."""
  vit = ViT(**config["encoder"])
  columns, bands = vit.grid
  length = columns * vit.patch_size
  fbank = features.log_mel_fbank(waveform, **config["fbank"])
  rows = []
  for start in range(0, len(fbank), length):
    window = fbank[start : start + length]
    x = features.standardize(window, **config["spectrogram"])
    # Columns of patches without a frame of the clip are seen by nothing.
    count = -(-len(window) // vit.patch_size)
    valid = jnp.arange(columns * bands)[None] < count * bands
    given = {"params": params["encoder"]}
    tokens = vit.apply(given, x[None], None, train=False, valid=valid)[0]
    tokens = tokens[: int(vit.class_token) + count * bands]
    pooled = POOLINGS[config["pooling"]](tokens)
    if config["use_fc_norm"]:
      norm = NORMS[vit.norm](dtype="float32")
      pooled = norm.apply({"params": params["fc_norm"]}, pooled)
    rows += count * [pooled]  # A window counts as often as it has columns.
  return jnp.stack(rows).mean(axis=0)


if __name__ == "__main__":
  folder, clip, output = map(pathlib.Path, sys.argv[1:])
  config = json.loads((folder / "config.json").read_text())
  flat = np.load(folder / "params.npz")
  params = traverse_util.unflatten_dict(dict(flat), sep="/")["params"]
  waveform, rate_hz = soundfile.read(clip, dtype="float32")
  if waveform.ndim > 1 or rate_hz != config["fbank"]["sample_rate_hz"]:
    sys.exit("make the clip mono, at the sample rate of config.json")
  run = jax.jit(lambda waveform: embed(config, params, waveform))
  np.save(output, run(waveform))
