"""perch-hoplite: an embedding model for its vector search and active learning.

  from audiomosaic_jax.adapters.hoplite import AudioMosaicModel

  model = AudioMosaicModel.from_config(config_dict.create(path="runs/demo"))
  worker = embed.EmbedWorker(sources, config, db, embedding_model=model)

Reference: perch-hoplite 1.0.2; its EmbedWorker, database and search run in
tests/clients/hoplite_test.py.
"""

import dataclasses

import ml_collections
import numpy as np
from perch_hoplite.zoo import zoo_interface

import audiomosaic_jax
from audiomosaic_jax.encoder import Encoder


@dataclasses.dataclass
class AudioMosaicModel(zoo_interface.EmbeddingModel):
  """One embedding per window of audio.

  Attributes:
    sample_rate: of the audio it takes, Hz.
    encoder: the encoder.
    window_size_s: length of a window.
    hop_size_s: from one window to the next.
  """

  encoder: Encoder
  window_size_s: float
  hop_size_s: float

  @classmethod
  def from_config(
    cls, model_config: ml_collections.ConfigDict
  ) -> "AudioMosaicModel":
    """Loads an encoder.

    Args:
      model_config: `path` as of `load_encoder`, and if wanted `window_size_s`
        (else what the encoder sees at once) and `hop_size_s` (else the same).
    """
    encoder = audiomosaic_jax.load_encoder(model_config.path)
    given = model_config.to_dict()
    window_s = given.get("window_size_s", encoder.window_s)
    hop_s = given.get("hop_size_s", window_s)
    return cls(encoder.sample_rate_hz, encoder, window_s, hop_s)

  def embed(self, audio_array: np.ndarray) -> zoo_interface.InferenceOutputs:
    """Embeds the windows of a recording.

    Args:
      audio_array: [samples] in [-1, 1] at `sample_rate`. What is left after
        the last whole window is left out, and less than one window is padded,
        as hoplite does it.

    Returns:
      Embeddings, float32 [windows, 1, D].
    """
    framed = self.frame_audio(audio_array, self.window_size_s, self.hop_size_s)
    outs = self.encoder.embed_batch(list(framed), self.sample_rate)
    embeddings = np.stack([out.embedding for out in outs])
    return zoo_interface.InferenceOutputs(embeddings=embeddings[:, None])

  def batch_embed(
    self, audio_batch: np.ndarray
  ) -> zoo_interface.InferenceOutputs:
    """Embeds recordings of one length, [B, samples] to [B, windows, 1, D]."""
    return zoo_interface.batch_embed_from_embed_fn(self.embed, audio_batch)
