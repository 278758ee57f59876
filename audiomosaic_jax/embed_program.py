"""The program behind `encoder.Encoder`: from waveforms to embeddings."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from audiomosaic_jax import experiment, features, per_device
from audiomosaic_jax.data import windows
from audiomosaic_jax.models import embedder, heads, vit

ConfigDict = ml_collections.ConfigDict


def geometry(config: ConfigDict) -> windows.Geometry:
  """Returns the windows of the encoder that a config describes."""
  rate_hz = config.fbank.sample_rate_hz
  return windows.Geometry(
    sample_rate_hz=rate_hz,
    length=int(rate_hz * config.fbank.frame_length_ms * 1e-3),
    shift=int(rate_hz * config.fbank.frame_shift_ms * 1e-3),
    patch_size=config.model.encoder.patch_size,
    max_columns=experiment.token_grid(config)[0],
  )


def build_embedder(
  config: ConfigDict, num_classes: int, dtype: str
) -> embedder.Embedder:
  """Returns the part of a run's model that embeds.

  Args:
    config: of a pretraining run or of a classifier.
    num_classes: of the classifier.
    dtype: of matrix products.
  """
  model = config.model
  own = model.encoder.to_dict() | {"dtype": dtype, "remat": "none"}
  encoder = vit.ViT(grid=experiment.token_grid(config), **own)
  if "projector" in model:
    projector = model.projector
    return embedder.Embedder(
      encoder=encoder,
      projector=projector and heads.Projector(**projector),
      pooling=model.pooling,
      use_fc_norm=model.use_fc_norm,
      num_classes=0,
    )
  linear = model.head == "linear"
  return embedder.Embedder(
    encoder=encoder,
    projector=None,
    # The norm of another head is of something else.
    pooling=model.pooling if linear else "mean",
    use_fc_norm=linear,
    num_classes=num_classes if linear else 0,
  )


def abstract_variables(
  model: embedder.Embedder, config: ConfigDict
) -> dict[str, Any]:
  """Returns the shapes of all that the embedder needs."""
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  return jax.eval_shape(
    lambda key: model.init(
      key,
      jnp.zeros((1, frames, bins)),
      jnp.ones(1, jnp.int32),
      max_columns=1,
      return_layers=False,
    ),
    jax.random.key(0),
  )


def wanted_variables(
  model: embedder.Embedder, config: ConfigDict, variables: dict[str, Any]
) -> dict[str, Any]:
  """Returns what the embedder needs of the variables of a model.

  Raises:
    ValueError: something is missing or has another shape.
  """
  needed = traverse_util.flatten_dict(abstract_variables(model, config))
  given = traverse_util.flatten_dict(variables)
  chosen = {}
  for path, leaf in needed.items():
    name = "/".join(path)
    if path not in given:
      raise ValueError(
        f"the encoder has no {name} of shape {leaf.shape}; was it saved by "
        "another model?"
      )
    chosen[path] = np.asarray(given[path])
    if chosen[path].shape != leaf.shape:
      raise ValueError(
        f"{name} has shape {chosen[path].shape}, but the config of the encoder "
        f"says {leaf.shape}; were they changed apart?"
      )
  return traverse_util.unflatten_dict(chosen)


def front_end(config: ConfigDict) -> dict[str, Any]:
  """Returns what of a config decides what is computed with the variables."""
  blocks = ("fbank", "spectrogram", "model")
  return {name: config[name].to_dict() for name in blocks}


def fingerprint(variables: dict[str, Any], config: ConfigDict) -> str:
  """Returns what tells an encoder and its front end from others."""
  text = json.dumps(front_end(config), sort_keys=True)
  digest = hashlib.sha256(text.encode())
  flat = traverse_util.flatten_dict(variables, sep="/")
  for name in sorted(flat):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(flat[name]).tobytes())
  return digest.hexdigest()[:16]


def make_embed_fn(
  model: embedder.Embedder, config: ConfigDict, mesh: Mesh
) -> Callable:
  """Returns the function from waveforms to what the embedder tells of them.

  It is called as `(variables, waveform [B, S], num_frames [B], max_columns=,
  return_layers=)`; frames from `num_frames` on are not looked at.
  """

  def spectrogram(waveform, num_frames):
    fbank = features.log_mel_fbank(waveform, **config.fbank)
    sound = jnp.arange(len(fbank)) < num_frames
    fbank = jnp.where(sound[:, None], fbank, 0.0)
    return features.standardize(fbank, **config.spectrogram)

  def embed(variables, waveform, num_frames, *, max_columns, return_layers):
    fbank = per_device.map_examples(spectrogram, mesh)(waveform, num_frames)
    size = config.model.encoder.patch_size
    return model.apply(
      variables,
      fbank,
      (num_frames + size - 1) // size,
      max_columns=max_columns,
      return_layers=return_layers,
    )

  return embed
