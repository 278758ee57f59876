"""The parts of a training step, each to be jitted on its own."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from audiomosaic_jax import contrastive, experiment, features, per_device, view

ConfigDict = ml_collections.ConfigDict
# The forward pass alone is shown, but is part of the line after it.
SHOWN_TWICE = "encoder forward"


def view_functions(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Callable, Callable, Callable]:
  """Returns what makes both views: augment, filter bank, ids to keep."""

  def augmented(keys, pcm):
    waveform = features.pcm_to_float(pcm)
    augment = functools.partial(view.augment, config=config)
    change = per_device.map_examples(augment, mesh)
    return [change(jax.random.split(k, len(pcm)), waveform) for k in keys]

  def fbanks(keys, waveforms):
    log_mel = functools.partial(view.log_mel, config=config)
    change = per_device.map_examples(log_mel, mesh)
    return [
      change(jax.random.split(key, len(waveform)), waveform)
      for key, waveform in zip(keys, waveforms, strict=True)
    ]

  def masks(keys):
    return [
      view.keep_ids(key, name, config)
      for key, name in zip(keys, experiment.VIEWS, strict=True)
    ]

  return augmented, fbanks, masks


def model_functions(
  model, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Callable, Callable]:
  """Returns the encoder of both views, and the loss of what it gives.

  Returns:
    (params, fbanks, ids, key) -> pooled tokens of each view, and
    (params, batch_stats, pooled) -> (loss, new batch_stats).
  """
  encode_views = contrastive.encode_views(model, config, mesh)
  contrast = contrastive.make_loss(model, config, mesh)

  def encode(params, fbanks, ids, key):
    keys = jax.random.split(key, (2, config.batch_size))
    return encode_views(params, list(zip(fbanks, ids, keys, strict=True)))

  def compare(params, batch_stats, pooled):
    z, batch_stats = contrastive.project_views(
      model, params, batch_stats, pooled
    )
    loss, _ = contrast(params, z, None)
    return loss, batch_stats

  return encode, compare


def pieces(
  setup, config: ConfigDict, state, batch, key
) -> dict[str, tuple[Callable, tuple]]:
  """Returns name -> (jitted function, arguments) of the parts of a step.

  Both views are in every part. The arguments are computed here, so that each
  part is timed on what the part before it made.
  """
  mesh = batch["waveform"].sharding.mesh
  augmented, fbanks, masks = map(jax.jit, view_functions(config, mesh))
  encode, compare = model_functions(setup.model, config, mesh)

  def summed(*args):
    return sum(jnp.sum(pooled) for pooled in encode(*args))

  encode_grad = jax.jit(jax.grad(summed))
  compare_grad = jax.jit(
    jax.value_and_grad(compare, argnums=(0, 2), has_aux=True)
  )
  encode = jax.jit(encode)

  def update(grads, opt_state, params):
    updates, opt_state = setup.tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  keys = jax.random.split(key)
  waveforms = augmented(keys, batch["waveform"])
  encoder_args = (state.params, fbanks(keys, waveforms), masks(keys), key)
  pooled = encode(*encoder_args)
  params = state.params
  return {
    "augment": (augmented, (keys, batch["waveform"])),
    "fbank": (fbanks, (keys, waveforms)),
    "masks": (masks, (keys,)),
    SHOWN_TWICE: (encode, encoder_args),
    "encoder forward + backward": (encode_grad, encoder_args),
    "projector + loss": (compare_grad, (params, state.batch_stats, pooled)),
    "optimiser": (jax.jit(update), (params, state.opt_state, params)),
  }
