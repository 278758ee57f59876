"""The two views of a clip: augmented apart, as spectrograms, masked apart."""

import jax
import ml_collections

from audiomosaic_jax import (
  augment_fbank,
  augment_waveform,
  experiment,
  features,
  masking,
  per_device,
)

ConfigDict = ml_collections.ConfigDict


def make(
  key: jax.Array, pcm: jax.Array, name: str, config: ConfigDict, mesh
) -> tuple[jax.Array, jax.Array]:
  """Makes one of the two views of each clip.

  Args:
    key: random key of this view and step.
    pcm: [B, S] samples, int16.
    name: "view_time" or "view_freq", a block of `config.masking`.
    config: the experiment.
    mesh: the devices; each augments its own examples.

  Returns:
    (fbank [B, T, F] standardised, of the encoder's dtype; keep_ids [B, K]
    tokens that stay).
  """
  augment_key, mask_key = jax.random.split(key)

  def spectrogram(key, pcm):
    waveform_key, fbank_key = jax.random.split(key)
    with jax.named_scope("augment"):
      waveform = features.pcm_to_float(pcm)
      waveform = augment(waveform_key, waveform, config)
    with jax.named_scope("fbank"):
      return log_mel(fbank_key, waveform, config)

  keys = jax.random.split(augment_key, len(pcm))
  at_once = config.micro_batch_size or None
  fbank = per_device.map_examples(spectrogram, mesh, at_once)(keys, pcm)
  with jax.named_scope("masks"):
    return fbank, keep_ids(mask_key, name, config)


def augment(
  key: jax.Array, waveform: jax.Array, config: ConfigDict
) -> jax.Array:
  """Returns the samples [S] of one clip, augmented."""
  return augment_waveform.augment_waveform(
    key,
    waveform[None],
    sample_rate_hz=config.fbank.sample_rate_hz,
    **config.augment_waveform,
  )[0]


def log_mel(
  key: jax.Array, waveform: jax.Array, config: ConfigDict
) -> jax.Array:
  """Returns the spectrogram [T, F] of one clip, augmented and standardised."""
  fbank = augment_fbank.augment_fbank(
    key,
    features.log_mel_fbank(waveform[None], **config.fbank),
    low_freq_hz=config.fbank.low_freq_hz,
    high_freq_hz=config.fbank.high_freq_hz,
    **config.augment_fbank,
  )
  fbank = features.standardize(fbank, **config.spectrogram)[0]
  # What the encoder makes of it first anyway, in half the memory.
  return fbank.astype(config.model.encoder.dtype)


def keep_ids(key: jax.Array, name: str, config: ConfigDict) -> jax.Array:
  """Returns the tokens [B, K] that a view keeps of each clip of a batch."""
  return masking.keep_ids(
    key,
    config.batch_size,
    grid=experiment.token_grid(config),
    layout=config.masking.layout,
    **config.masking[name],
  )
