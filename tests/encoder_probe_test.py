"""Probes of a task, however few its clips are."""

import numpy as np

from audiomosaic_jax import encoder_probe, predict
from configs import common


def test_a_task_of_few_clips_is_probed_with_the_neighbours_there_are():
  rng = np.random.default_rng(0)
  labels = {
    "train": np.arange(6) % 2,
    "valid": np.arange(4) % 2,
    "test": np.arange(8) % 2,
  }
  embeddings = {
    split: rng.normal(size=(len(values), 3)) + 9 * values[:, None]
    for split, values in labels.items()
  }
  config = common.probe(task="", eval_every=1)
  assert max(config.knn_neighbours) > 6
  scores = encoder_probe.probe_scores(embeddings, labels, config)
  assert scores == {"knn": 1.0, "linear": 1.0}


def test_a_batch_is_filled_up_for_all_devices():
  # The tests run on eight.
  assert [predict.for_all_devices(n) for n in (1, 8, 20)] == [8, 8, 24]
