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
  key: jax.Array, waveform: jax.Array, name: str, config: ConfigDict, mesh
) -> tuple[jax.Array, jax.Array]:
  """Makes one of the two views of each clip.

  Args:
    key: random key of this view and step.
    waveform: [B, S] samples.
    name: "view_time" or "view_freq", a block of `config.masking`.
    config: the experiment.
    mesh: the devices; each augments its own examples.

  Returns:
    (fbank [B, T, F] standardised, keep_ids [B, K] tokens that stay).
  """
  augment_key, mask_key = jax.random.split(key)

  def spectrogram(key, waveform):
    waveform_key, fbank_key = jax.random.split(key)
    waveform = augment_waveform.augment_waveform(
      waveform_key,
      waveform[None],
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
    return features.standardize(fbank, **config.spectrogram)[0]

  batch_size = len(waveform)
  keys = jax.random.split(augment_key, batch_size)
  fbank = sharding.map_examples(spectrogram, mesh)(keys, waveform)
  keep_ids = masking.keep_ids(
    mask_key,
    batch_size,
    grid=experiment.token_grid(config),
    layout=config.masking.layout,
    **config.masking[name],
  )
  return fbank, keep_ids
