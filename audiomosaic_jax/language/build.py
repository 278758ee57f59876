"""From a config to an audio-language model: sizes, front end, parameters.

The parameters of its own, {"encoder", "projector", "llama": adapters}, are
what is learned and saved; the base joins them in the step.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from audiomosaic_jax import (
  checkpoint,
  encoder_source,
  experiment,
  features,
  per_device,
)
from audiomosaic_jax.language import audio_weights, partition, peft_adapters
from audiomosaic_jax.models import lora
from audiomosaic_jax.models.audio_lm import AudioLM, AudioProjector
from audiomosaic_jax.models.llama import Llama, abstract_params
from audiomosaic_jax.models.vit import ViT
from audiomosaic_jax.weight_files import open_weights

ConfigDict = ml_collections.ConfigDict
Params = dict[str, Any]


def build_model(config: ConfigDict, llama: Llama) -> AudioLM:
  """Returns the model that a completed config describes around a decoder."""
  settings = config.model
  # What the projector reads is normalised, whatever the encoder's run did.
  encoder = settings.encoder.to_dict() | {"final_norm": True}
  return AudioLM(
    encoder=ViT(grid=experiment.token_grid(config), **encoder),
    projector=AudioProjector(llama.hidden_size, settings.feature_divisor),
    llama=llama,
    time_stride=settings.time_stride,
    pooling_order=settings.pooling_order,
    shuffle_tokens=settings.shuffle_tokens,
    count_padding=settings.count_padding,
  )


def abstract_own(model: AudioLM, config: ConfigDict) -> Params:
  """Returns shapes of all parameters but those of the base."""
  init = functools.partial(_init_audio, model, config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  adapters = lora.split(abstract_params(model.llama))[0]
  return {**shapes, "llama": adapters}


def init_own(
  model: AudioLM,
  config: ConfigDict,
  run: encoder_source.Run | None,
  key: jax.Array,
) -> Params:
  """Draws the model's own parameters, and reads what there is to start from.

  Args:
    model: of `build_model`.
    config: completed; `init.weights` names a file of published weights that
      hold encoder and projector, and adapters if there are any.
    run: the pretraining run of the encoder, or None.
    key: random key.
  """
  key_audio, key_adapters = jax.random.split(key)
  shapes = abstract_own(model, config)
  audio = jax.jit(functools.partial(_init_audio, model, config))(key_audio)
  adapters = lora.init_adapters(abstract_params(model.llama), key_adapters)
  learned = encoder_source.load_encoder(
    shapes["encoder"], config, run, seed_index=0
  )
  audio["encoder"] = {**audio["encoder"], **learned}
  if config.init.weights:
    tensors = open_weights(config.init.weights)
    audio = audio_weights.from_tensors(tensors, shapes)
    if any("lora_" in name for name in tensors):
      adapters = peft_adapters.from_tensors(tensors, model.llama)
  return {**audio, "llama": adapters}


def load_own(
  model: AudioLM, config: ConfigDict, folder: pathlib.Path
) -> Params:
  """Reads the model's own parameters from the checkpoint of a stage."""
  wanted = {"params": abstract_own(model, config)}
  return checkpoint.load_params(folder, wanted)["params"]


def make_spectrogram(config: ConfigDict, mesh: jax.sharding.Mesh):
  """Returns int16 waveforms [B, S] -> standardised spectrograms [B, T, F]."""

  def one(waveform):
    waveform = features.pcm_to_float(waveform)[None]
    fbank = features.log_mel_fbank(waveform, **config.fbank)
    return features.standardize(fbank, **config.spectrogram)[0]

  return per_device.map_examples(one, mesh)


def make_prompt_fn(model: AudioLM, config: ConfigDict, mesh):
  """Returns the jitted function from sound and text to what the decoder reads.

  It takes (own parameters, base, waveform [B, S], ids, valid, has_audio), as
  of `AudioLM.prompt`, and returns its result.
  """
  spectrogram = make_spectrogram(config, mesh)

  @jax.jit
  def prompt(own, base, waveform, ids, valid, has_audio):
    params = {**own, "llama": partition.join(own["llama"], base)}
    return model.apply(
      {"params": params},
      spectrogram(waveform),
      ids,
      valid,
      has_audio,
      method="prompt",
    )

  return prompt


def _init_audio(model: AudioLM, config: ConfigDict, key: jax.Array) -> Params:
  """Draws encoder and projector; the decoder is never drawn."""
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  variables = model.init(key, jnp.zeros((1, frames, bins)), method="listen")
  return variables["params"]
