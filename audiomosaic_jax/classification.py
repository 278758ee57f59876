"""One step of supervised training: what is computed of clips and labels.

Augment, mix, spectrogram, mask, encode, classify, compare with the labels. The
loop around it, for fine-tuning and probes, is `finetune.py`.
"""

import functools
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
import optax

from audiomosaic_jax import (
  augment_fbank,
  augment_waveform,
  experiment,
  features,
  losses,
  masking,
  mixup,
  per_device,
  train_state,
)

ConfigDict = ml_collections.ConfigDict
Batch = dict[str, jax.Array]


def make_inputs(
  key: jax.Array,
  waveform: jax.Array,
  targets: jax.Array,
  config: ConfigDict,
  mesh,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Augments a batch of clips and their targets for one step.

  Args:
    key: random key of this step.
    waveform: [B, S] samples.
    targets: [B, C].
    config: the experiment.
    mesh: the devices; each augments its own examples.

  Returns:
    (fbank [B, T, F] standardised, targets [B, C], keep_ids [B, K] or None).
  """
  key_wave, key_mix, key_fbank, key_mask = jax.random.split(key, 4)
  batch_size = len(waveform)

  def augment(key, waveform):
    return augment_waveform.augment_waveform(
      key,
      waveform[None],
      sample_rate_hz=config.fbank.sample_rate_hz,
      **config.augment_waveform.to_dict(),
    )[0]

  def spectrogram(key, waveform):
    edges = {
      "low_freq_hz": config.fbank.low_freq_hz,
      "high_freq_hz": config.fbank.high_freq_hz,
    }
    key_energies, key_input = jax.random.split(key)
    fbank = features.log_mel_fbank(waveform[None], **config.fbank)
    # Masks are drawn over the padded length, as the published ones.
    length = {"num_frames": config.spectrogram.num_frames}
    fbank = features.standardize(fbank, **length, mean=0.0, std=0.5)
    fbank = augment_fbank.augment_fbank(
      key_energies, fbank, **edges, **config.augment_fbank.to_dict()
    )
    fbank = features.standardize(fbank, **config.spectrogram)
    return augment_fbank.augment_fbank(
      key_input, fbank, **edges, **config.augment_input.to_dict()
    )[0]

  on_each = functools.partial(per_device.map_examples, mesh=mesh)
  keys = jax.random.split(key_wave, batch_size)
  waveform = on_each(augment)(keys, waveform)
  waveform, targets = mixup.mixup(key_mix, waveform, targets, **config.mixup)
  keys = jax.random.split(key_fbank, batch_size)
  fbank = on_each(spectrogram)(keys, waveform)
  if config.masking.mode == "none":
    return fbank, targets, None
  keep_ids = masking.keep_ids(
    key_mask,
    batch_size,
    grid=experiment.token_grid(config),
    **config.masking,
  )
  return fbank, targets, keep_ids


def make_train_step(model, tx, config: ConfigDict, mesh) -> Callable:
  """Returns `(state, batch, key) -> (state, metrics)`, to be jitted.

  A batch holds "label" and either "waveform" or the "features" of a frozen
  encoder; the state of the latter holds the head only.
  """
  loss = functools.partial(
    losses.SUPERVISED[config.loss.name],
    class_weights=config.loss.class_weights,
    label_smoothing=config.loss.label_smoothing,
  )

  def train_step(state: train_state.TrainState, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)
    key_inputs, key_path, key_dropout = jax.random.split(key, 3)
    targets = one_hot(batch["label"], model.num_classes)
    if "features" not in batch:
      waveform = features.pcm_to_float(batch["waveform"])
      fbank, targets, keep_ids = make_inputs(
        key_inputs, waveform, targets, config, mesh
      )

    def loss_fn(params):
      variables = {"params": params, "batch_stats": state.batch_stats}
      if "features" in batch:
        logits = model.apply(variables, batch["features"], method="readout")
        return loss(logits, targets), state.batch_stats
      logits, updated = model.apply(
        variables,
        fbank,
        keep_ids,
        train=True,
        mutable=["batch_stats"],
        rngs={"drop_path": key_path, "dropout": key_dropout},
      )
      return loss(logits, targets), updated.get("batch_stats", {})

    (value, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
    )
    return state, {"loss": value, "grad_norm": optax.global_norm(grads)}

  return train_step


def one_hot(labels: jax.Array, num_classes: int) -> jax.Array:
  """Returns float32 [B, C] of class indices [B]; rows [B, C] pass through."""
  if labels.ndim == 2:
    return labels.astype(np.float32)
  return jax.nn.one_hot(labels, num_classes)
