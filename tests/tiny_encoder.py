"""Encoders that were never trained, for the tests of what reads them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_supervised

from audiomosaic_jax import checkpoint, experiment
from audiomosaic_jax.encoder import Encoder

RATE_HZ = 16_000


def variables_of(config, seed=0):
  """Fresh variables, scattered so that every part has a visible effect."""
  model = experiment.build_model(config)
  init = functools.partial(experiment.init_variables, model, config)
  fresh = jax.jit(init)(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (
      x + jnp.float32(0.1 * np.abs(rng.normal(size=x.shape)))
      if x.ndim < 2
      else x + jnp.float32(0.1 * rng.normal(size=x.shape))
    ),
    fresh,
  )


def config(**overrides):
  """Returns a config of windows of eight columns (1.3 s), two bands."""
  made = tiny_supervised.pretraining()
  made.spectrogram.num_frames = 128
  made.data.pipeline.clip_samples = 20_720
  made.model.encoder.update(dtype="float32")
  made.update_from_flattened_dict(overrides)
  return made


def encoder(*, batch_size=8, seed=0, **overrides):
  made = config(**overrides)
  variables = jax.device_get(variables_of(made, seed))
  return Encoder(made, variables, (), dtype="float32", batch_size=batch_size)


def noise(seconds, seed=0):
  """Returns noise whose colour changes all the time."""
  rng = np.random.default_rng(seed)
  samples = rng.normal(size=round(seconds * RATE_HZ))
  time_s = np.arange(len(samples)) / RATE_HZ
  tone = np.sin(2 * np.pi * 300 * time_s * (1 + 0.2 * time_s))
  return (0.05 * samples + 0.2 * tone).astype(np.float32)


def write_run(folder, *, seed=0, **overrides):
  """Writes what a pretraining run would have left; returns the folder."""
  made = config(**overrides)
  experiment.save_config(made, folder)
  with checkpoint.Checkpointer(
    folder / "checkpoints", keep_last=1, keep_every=0
  ) as saved:
    saved.save(0, variables_of(made, seed), {})
  return folder
