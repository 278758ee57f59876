"""Batches of rows that are in memory, in the order of a training stream."""

from collections.abc import Iterator

import numpy as np


class RowBatches(Iterator):
  """An endless stream of batches; every epoch visits each row once.

  As `pipeline.train_iterator`, batch k is a function of the seed and k, so
  the stream can start anywhere, and process p holds its rows of the batch.
  """

  def __init__(
    self,
    rows: dict[str, np.ndarray],
    *,
    seed: int,
    batch_size: int,
    process_index: int,
    process_count: int,
  ):
    """Holds the rows.

    Args:
      rows: name -> [N, ...].
      seed: of the order.
      batch_size: rows per batch of this process.
      process_index: which process this is.
      process_count: how many there are.
    """
    self._rows = rows
    self._count = len(next(iter(rows.values())))
    self._seed = seed
    self._batch_size = batch_size
    self._first = process_index * batch_size
    self._global = process_count * batch_size
    self._step = 0
    self._orders = {}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to the batch "next_index"."""
    self._step = int(state["next_index"])

  def __next__(self) -> dict[str, np.ndarray]:
    start = self._step * self._global + self._first
    position = np.arange(start, start + self._batch_size)
    epochs, places = np.divmod(position, self._count)
    orders = {epoch: self._order(epoch) for epoch in np.unique(epochs).tolist()}
    self._orders = orders
    index = np.array(
      [orders[e][p] for e, p in zip(epochs.tolist(), places, strict=True)]
    )
    self._step += 1
    return {name: values[index] for name, values in self._rows.items()}

  def _order(self, epoch: int) -> np.ndarray:
    if epoch in self._orders:
      return self._orders[epoch]
    return np.random.default_rng((self._seed, epoch)).permutation(self._count)

  def close(self) -> None:
    """There is nothing to stop."""
