"""Clips that are in memory already, as a source of clips without labels."""

from collections.abc import Sequence

import numpy as np

from audiomosaic_jax.data.sources import UNLABELLED, Source


class ArraySource(Source):
  """Waveforms by index, at the rate of whoever reads them."""

  multi_hot = False
  class_names = ()

  def __init__(self, waveforms: Sequence[np.ndarray]):
    """Holds float32 [n] each."""
    self.waveforms = waveforms
    self.ids = [str(i) for i in range(len(waveforms))]

  @property
  def labels(self) -> np.ndarray:
    return np.full(len(self.waveforms), UNLABELLED, np.int32)

  def __getitem__(self, index: int) -> dict:
    return {
      "waveform": self.waveforms[index],
      "label": np.int32(UNLABELLED),
      "id": np.int32(index),
    }
