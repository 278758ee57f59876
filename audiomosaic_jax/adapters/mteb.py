"""MTEB and its audio benchmark MAEB: an encoder in numpy, and its metadata.

  import mteb
  from audiomosaic_jax.adapters.mteb import model_meta

  meta = model_meta("runs/demo", name="me/demo", revision="1")
  benchmark = mteb.get_benchmark("MAEB(v1, audio-only)")
  mteb.evaluate(meta.load_model(), benchmark.tasks)

Reference: mteb 2.26.24; its `mock_run` is in tests/clients/mteb_test.py.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import AudioCollator

import audiomosaic_jax


class AudioMosaicModel(AbsEncoder):
  """What the benchmark calls: clips of any length in, embeddings out."""

  def __init__(
    self, model_name: str, revision: str | None, *, path: str, **unused: Any
  ):
    """Loads an encoder.

    Args:
      model_name: as the benchmark writes it beside the results.
      revision: likewise.
      path: as of `load_encoder`.
      **unused: a device of PyTorch; JAX has its own.
    """
    del model_name, revision, unused
    self.model = audiomosaic_jax.load_encoder(path)

  def encode(self, inputs: Iterable[dict[str, Any]], **unused: Any):
    """Returns embeddings, float32 [N, D].

    Args:
      inputs: a DataLoader of batches whose "audio" is a list of
        {"array": [samples], "sampling_rate": Hz}.
      **unused: the task and its prompts; audio has none.
    """
    del unused
    rate_hz = self.model.sample_rate_hz
    inputs.collate_fn = AudioCollator(
      target_sampling_rate=rate_hz, min_samples=self.model.geometry.length
    )
    return np.stack(
      [
        out.embedding
        for batch in inputs
        for out in self.model.embed_batch(
          [np.asarray(clip["array"], np.float32) for clip in batch["audio"]],
          rate_hz,
        )
      ]
    )


def model_meta(path: str, *, name: str, revision: str) -> ModelMeta:
  """Describes an encoder to the benchmark; `.load_model()` loads it.

  Args:
    path: as of `load_encoder`.
    name: "organization/model", as it shall be called in results.
    revision: which state of that model, in the names of results.
  """
  encoder = audiomosaic_jax.load_encoder(path)
  leaves = jax.tree.leaves(encoder.variables)
  return ModelMeta(
    loader=functools.partial(AudioMosaicModel, path=str(path)),
    name=name,
    revision=revision,
    modalities=["audio"],
    embed_dim=encoder.embedding_width,
    n_parameters=sum(leaf.size for leaf in leaves),
    n_embedding_parameters=0,
    memory_usage_mb=round(sum(leaf.nbytes for leaf in leaves) / 2**20, 1),
    max_tokens=float("inf"),
    similarity_fn_name="cosine",
    framework=["JAX"],
    languages=None,
    license=None,
    open_weights=None,
    public_training_code=None,
    public_training_data=None,
    release_date=None,
    training_datasets=None,
    use_instructions=False,
  )
