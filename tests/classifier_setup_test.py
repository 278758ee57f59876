"""What a job starts from: which clips are drawn, what features take."""

import numpy as np
import pytest
import tiny_supervised as tiny

from audiomosaic_jax import (
  classifier_setup,
  encoder_source,
  predict,
)


def test_rare_classes_are_drawn_as_often_as_common_ones(tmp_path):
  root = tiny.write_task(tmp_path / "task", {"train": 40, "test": 4})
  lines = (root / "labels.csv").read_text().splitlines()
  rare = [line for line in lines if ",high,train" in line][4:]
  kept = [line for line in lines if line not in rare]
  (root / "labels.csv").write_text("\n".join(kept) + "\n")
  config = tiny.fine_tuning(root, **{"evaluation.selection": "last"})
  config.data.splits.valid = ""
  encoder_source.complete(config, None)
  config.data.sampling.balanced = True
  splits = classifier_setup.load_splits(config, tmp_path, 0)
  for epoch_clips, expected in ((0, 24), (100, 100), (16, 16)):
    config.data.sampling.epoch_clips = epoch_clips
    batches, count = classifier_setup.make_batches(
      config, splits.train, None, seed=0
    )
    labels = np.concatenate([next(batches)["label"] for _ in range(40)])
    batches.close()
    assert count == expected
    # Without replacement an epoch of 16 of 24 clips has all 4 rare ones.
    share = 0.5 if epoch_clips != 16 else 0.25
    assert np.mean(labels == 0) == pytest.approx(share, abs=0.07)


def test_features_are_counted_by_windows(tmp_path):
  root = tiny.write_task(tmp_path / "a", {"train": 4, "test": 4}, seconds=0.65)
  config = tiny.probing(root, **{"evaluation.selection": "last"})
  encoder_source.complete(config, None)
  splits = classifier_setup.load_splits(config, tmp_path, 0)
  model = classifier_setup.build_model(config, 2)
  params = classifier_setup.start_variables(model, config, None, 0)["params"]
  compute = predict.make_window_fn(model, config, "features")
  for max_windows, windows in ((1, 4), (2, 8), (8, 16), (None, 16)):
    config.evaluation.max_windows = max_windows
    rows = compute({"params": params}, splits.train).rows
    assert len(rows) == windows
    counted = predict.feature_bytes(model, params, splits.train, config)
    assert counted == rows.nbytes
