"""Rows to beat beside the encoder's own, and what the pictures are drawn of."""

import json

import numpy as np
import pytest
import sklearn.metrics
import soundfile
import tiny_supervised as tiny

from audiomosaic_jax import (
  baseline,
  class_plots,
  classifier_setup,
  encoder_source,
  experiment,
  finetune,
  pretrain,
  results,
)
from audiomosaic_jax.data import sources, supervised

COUNTS = {"train": 16, "valid": 8, "test": 8}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return tiny.write_task(tmp_path_factory.mktemp("task"), COUNTS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns the workdir of a pretraining run of one step."""
  workdir = tmp_path_factory.mktemp("pretraining")
  pretrain.run(tiny.pretraining(), workdir)
  return workdir


def rows(workdir):
  found = json.loads((workdir / "results.json").read_text())["results"]
  return {(row["encoder"], row["layer"]): row for row in found}


def test_a_probe_is_compared_with_a_random_encoder_and_log_mel_statistics(
  task, run, tmp_path, capsys
):
  config = tiny.probing(
    task,
    argument="dataset=task,probe=layer",
    **{
      "baselines": ("random", "log_mel"),
      "init.run": str(run),
      "num_seeds": 2,
    },
  )
  finetune.run(config, tmp_path)
  found = rows(tmp_path)
  assert list(found) == [
    *(("main", 0), ("main", 1), ("random", 0), ("random", 1)),
    ("log_mel", None),
  ]
  spread = {key[0]: row["metrics"]["accuracy"] for key, row in found.items()}
  assert len(spread["main"]["per_seed"]) == len(spread["random"]["per_seed"])
  assert len(spread["log_mel"]["per_seed"]) == 1
  assert spread["log_mel"]["low"] <= spread["log_mel"]["mean"]
  text = (tmp_path / "results.md").read_text()
  for name in (
    "pretrained encoder, layer 1, test",
    "random encoder, layer 0, test",
    "log-mel mean and std, logistic regression, test",
  ):
    assert name in text
  # Of the same head on other features.
  logits = {
    name: np.load(tmp_path / "runs" / name / "predictions.npz")["test/logits"]
    for name in ("layer_1_seed_0", "random_layer_1_seed_0")
  }
  assert np.abs(np.subtract(*logits.values())).max() > 1e-6
  lines = (tmp_path / "predictions.csv").read_text().splitlines()
  assert lines[0] == (
    "clip,split,encoder,layer,seed,true,predicted,p(high),p(low)"
  )
  # Two seeds of four rows, one of log-mel.
  assert len(lines) == 1 + 9 * COUNTS["test"]
  assert "Reliability" in (tmp_path / "report.html").read_text()


def test_without_a_run_the_encoder_itself_is_the_random_row():
  config = tiny.probing(**{"baselines": ("random", "log_mel")})
  config.model.encoder.depth = 2
  methods = [method.encoder for method in results.methods(config)]
  assert methods == ["main", "log_mel"]


def test_results_of_an_encoder_that_trained_on_are_not_taken_for_its_own(
  task, run, tmp_path
):
  config = tiny.probing(task, **{"init.run": str(run)})
  finetune.run(config, tmp_path)
  (state,) = experiment.load_config(tmp_path).init.states
  assert state.startswith("1@")
  config = tiny.probing(task, **{"init.run": str(run)})
  encoder_source.complete(config, encoder_source.find_run(str(run)))
  place = results.Place("main", None, 0, 0)
  assert results.is_finished(config, tmp_path, place)
  # Another seed of the pretraining is no concern of this one.
  config.init.states = (*config.init.states, "7@7")
  assert results.is_finished(config, tmp_path, place)
  config.init.states = ("2@5",)
  with pytest.raises(ValueError, match="another config or encoder"):
    results.is_finished(config, tmp_path, place)


def test_an_unknown_baseline_is_refused(task, tmp_path):
  config = tiny.probing(task, **{"baselines": ("guess",)})
  with pytest.raises(ValueError, match=r"baselines\[0\] is 'guess'"):
    finetune.run(config, tmp_path)


def test_log_mel_statistics_tell_tones_apart(task, tmp_path):
  config = tiny.probing(task)
  encoder_source.complete(config, None)
  splits = classifier_setup.load_splits(config, tmp_path, 0)
  windows = baseline.log_mel_logits(splits, config.fbank)["test"]
  labels = splits.tests["test"].labels
  assert windows.rows.shape == (COUNTS["test"], 2)
  np.testing.assert_array_equal(windows.clip, np.arange(COUNTS["test"]))
  # A tone of 600 and one of 1500 Hz lie in other bins; few overlap.
  accuracy = sklearn.metrics.balanced_accuracy_score(
    labels, windows.rows.argmax(1)
  )
  assert accuracy >= 0.75


def test_a_class_that_no_training_clip_has_is_never_the_guess(tmp_path):
  clips = {"train": "01", "test": "012"}
  for split, classes in clips.items():
    for index, name in enumerate(classes * 6):
      path = tmp_path / f"{split}_{index}.wav"
      time_s = np.arange(4_000) / 16_000
      tone = np.sin(2 * np.pi * 500 * (1 + int(name)) * time_s)
      soundfile.write(path, 0.3 * tone, 16_000)
  sources_ = {
    split: sources.FileSource(
      [f"{split}_{i}.wav" for i in range(6 * len(classes))],
      root=tmp_path,
      spans=None,
      labels=[(int(name),) for name in classes * 6],
      class_names=("a", "b", "c"),
      sample_rate_hz=16_000,
    )
    for split, classes in clips.items()
  }
  assert sources_["train"].multi_hot
  splits = supervised.Splits(
    sources_["train"], None, {"test": sources_["test"]}
  )
  logits = baseline.log_mel_logits(splits, tiny.probing().fallback.fbank)
  guesses = logits["test"].rows.argmax(1)
  assert 2 not in guesses
  np.testing.assert_array_equal(guesses[0::3], 0)
  np.testing.assert_array_equal(guesses[1::3], 1)


def test_of_classes_without_a_training_clip_the_logit_is_the_lowest():
  decision = np.array([[0.5, -1.0], [2.0, 0.0]])
  logits = baseline._spread(decision, np.array([0, 2]), 3)
  np.testing.assert_array_equal(logits, [[0.5, -1, -1], [2, -1, 0]])
  two = baseline._spread(np.array([3.0, -1.0]), np.array([0, 1]), 2)
  np.testing.assert_array_equal(two.argmax(1), [1, 0])
  # A softmax of the two logits is the sigmoid of the decision.
  np.testing.assert_allclose(two[:, 1] - two[:, 0], [3.0, -1.0])


def test_the_reliability_plot_says_how_far_confidence_is_off():
  rng = np.random.default_rng(0)
  confidence = rng.uniform(0.5, 1, 2_000)
  correct = (rng.uniform(size=2_000) < confidence - 0.2).astype(float)
  figure = class_plots.plot_reliability(confidence, correct)
  (ax,) = figure.axes
  assert "too sure" in ax.get_title()
  x, y = ax.lines[1].get_data()
  np.testing.assert_allclose(np.asarray(x) - np.asarray(y), 0.2, atol=0.1)
