"""The two views of a clip: augmented apart, as spectrograms, masked apart."""

import jax
import ml_collections

from audiomosaic_jax import (
  augment_fbank,
  augment_waveform,
  experiment,
  features,
  masking,
  sharding,
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
    waveform = augment_waveform.augment_waveform(
      waveform_key,
      features.pcm_to_float(pcm[None]),
      sample_rate_hz=config.fbank.sample_rate_hz,
      **config.augment_waveform,
    )
    fbank = augment_fbank.augment_fbank(
      fbank_key,
      features.log_mel_fbank(waveform, **config.fbank),
      low_freq_hz=config.fbank.low_freq_hz,
      high_freq_hz=config.fbank.high_freq_hz,
      **config.augment_fbank,
    )
    fbank = features.standardize(fbank, **config.spectrogram)[0]
    # What the encoder makes of it first anyway, in half the memory.
    return fbank.astype(config.model.encoder.dtype)

  batch_size = len(pcm)
  keys = jax.random.split(augment_key, batch_size)
  at_once = config.micro_batch_size or None
  fbank = sharding.map_examples(spectrogram, mesh, at_once)(keys, pcm)
  keep_ids = masking.keep_ids(
    mask_key,
    batch_size,
    grid=experiment.token_grid(config),
    layout=config.masking.layout,
    **config.masking[name],
  )
  return fbank, keep_ids
