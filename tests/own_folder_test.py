"""A folder of one's own from the first command to calibrated predictions."""

import csv
import json

import numpy as np
import pytest
import soundfile
import tiny_supervised as tiny
from fake_datasets import write_manifest
from scipy import special

from audiomosaic_jax import (
  calibration,
  class_weights,
  finetune,
  results,
  trained_classifier,
)
from configs import finetune as configs
from configs import linear_eval, supervised

MAIN = results.Place("main", None, 0, 0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Returns a folder of classes: 24 clips low, 12 high, two per recording."""
  root = tmp_path_factory.mktemp("clips")
  rng = np.random.default_rng(0)
  time_s = np.arange(3_200) / tiny.RATE_HZ
  for label, hz, count in (("low", 600, 24), ("high", 1_500, 12)):
    (root / label).mkdir()
    for i in range(count):
      pitch = hz * np.exp(0.4 * rng.normal())
      clip = 0.2 * np.sin(2 * np.pi * pitch * time_s) + 0.02 * rng.normal()
      name = f"{label}{i // 2}_{i % 2}.wav"
      soundfile.write(root / label / name, clip, tiny.RATE_HZ)
  return root


def probing(root, **overrides):
  return tiny.probing(
    root,
    argument="dataset=folder",
    **{"data.source.group_pattern": r"(.*)_\d", "num_seeds": 1, **overrides},
  )


def read(workdir, name):
  return json.loads((workdir / name).read_text())


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
  """Returns (config, workdir) of a probe with the row to beat."""
  workdir = tmp_path_factory.mktemp("run")
  config = probing(clips, **{"duration.total": 40.0, "baselines": ("log_mel",)})
  finetune.run(config, workdir)
  return config, workdir


def test_predictions_have_the_calibrated_probability_of_every_class(run):
  _, workdir = run
  with (workdir / "predictions.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == [
    *("clip", "split", "encoder", "layer", "seed", "true", "predicted"),
    *("p(high)", "p(low)"),
  ]
  for encoder, folder in (("main", "seed_0"), ("log_mel", "log_mel_seed_0")):
    fitted = calibration.read(workdir / "runs" / folder)
    with np.load(workdir / "runs" / folder / "predictions.npz") as stored:
      logits, ids = stored["test/logits"], stored["test/ids"]
    own = [row for row in rows if row["encoder"] == encoder]
    assert [row["clip"] for row in own] == ids.tolist()
    expected = special.softmax(logits / fitted.temperature, axis=1)
    written = [[float(row[f"p({c})"]) for c in ("high", "low")] for row in own]
    np.testing.assert_allclose(written, expected, atol=1e-4)
    for row, guess in zip(own, logits.argmax(1), strict=True):
      assert row["predicted"] == ("high", "low")[guess]
      assert row["true"] == row["clip"].split("/")[0]


def test_the_calibration_is_of_the_validation_clips_and_of_no_result(run):
  config, workdir = run
  folder = workdir / "runs" / "seed_0"
  with np.load(folder / "validation.npz") as stored:
    valid = dict(stored)
  with np.load(folder / "predictions.npz") as stored:
    assert {name.split("/")[0] for name in stored} == {"test"}
  fitted = calibration.fit(
    valid["logits"], valid["targets"], "softmax", multi_label=False
  )
  assert calibration.read(folder) == fitted
  splits = (workdir / "splits.csv").read_text().splitlines()
  names = {line.split(",")[0] for line in splits if ",valid," in line}
  assert set(valid["ids"].tolist()) == names
  content = read(folder, "calibration.json")
  assert content["fitted_on_clips"] == len(names)
  likelihoods = [
    content["splits"]["valid"][state]["negative_log_likelihood"]
    for state in ("before", "after")
  ]
  assert likelihoods[1] <= likelihoods[0]
  # A finished classifier has it at hand.
  loaded = trained_classifier.load(config, workdir, MAIN)
  assert loaded.calibration == fitted


def test_errors_before_and_after_are_in_the_results_and_the_report(run):
  _, workdir = run
  for row in read(workdir, "results.json")["results"]:
    found = row["calibration"]
    name = "seed_0" if row["encoder"] == "main" else "log_mel_seed_0"
    content = read(workdir / "runs" / name, "calibration.json")
    measured = content["splits"]["test"]
    for state in ("before", "after"):
      expected = measured[state]["expected_calibration_error"]
      assert found[state] == pytest.approx(expected)
    assert found["temperatures"] == [content["temperature"]]
  text = (workdir / "results.md").read_text()
  assert "after the temperature that fits the validation clips" in text
  page = (workdir / "report.html").read_text()
  assert "Calibration" in page and "Reliability: test" in page


def test_without_validation_clips_nothing_is_calibrated_and_it_says_so(
  clips, tmp_path, capsys
):
  config = probing(
    clips,
    **{"data.splits.valid_fraction": 0.0, "evaluation.selection": "last"},
  )
  finetune.run(config, tmp_path)
  assert "without validation clips" in capsys.readouterr().out
  (row,) = read(tmp_path, "results.json")["results"]
  assert row["calibration"]["after"] is None
  files = {path.name for path in (tmp_path / "runs" / "seed_0").iterdir()}
  assert not files & {"validation.npz", "calibration.json"}
  assert trained_classifier.load(config, tmp_path, MAIN).calibration is None


def test_votes_of_neighbours_have_no_probabilities(clips, tmp_path):
  config = tiny.probing(clips, argument="dataset=folder,probe=knn")
  finetune.run(config, tmp_path)
  (row,) = read(tmp_path, "results.json")["results"]
  assert row["calibration"] is None
  head, line, *_ = (tmp_path / "predictions.csv").read_text().splitlines()
  assert head.endswith("predicted,p(high),p(low)")
  assert line.endswith((",high", ",low"))


def test_clips_of_several_labels_are_decided_by_thresholds(tmp_path):
  write_manifest(tmp_path)
  rng = np.random.default_rng(0)
  (tmp_path / "classes.csv").write_text(
    "index,mid,display_name\n0,/m/0,Low\n1,/m/1,High\n"
  )
  time_s = np.arange(3_200) / tiny.RATE_HZ
  for split, count in (("train", 32), ("eval", 12)):
    entries = []
    for i in range(count):
      present = (i % 2 == 0, i % 3 != 0)
      clip = 0.02 * rng.normal(size=len(time_s))
      for hz, there in zip((600, 2_500), present, strict=True):
        clip += there * 0.2 * np.sin(2 * np.pi * hz * time_s)
      soundfile.write(tmp_path / f"{split}{i}.wav", clip, tiny.RATE_HZ)
      mids = [f"/m/{c}" for c, there in enumerate(present) if there] or ["/m/0"]
      entries.append({"wav": f"{split}{i}.wav", "labels": ",".join(mids)})
    text = json.dumps({"data": entries})
    (tmp_path / f"{split}.json").write_text(text)
  config = tiny.probing(
    tmp_path,
    argument="dataset=manifest",
    **{
      "data.source.label_csv": str(tmp_path / "classes.csv"),
      "data.splits.valid_fraction": 0.25,
      "duration.total": 30.0,
    },
  )
  finetune.run(config, tmp_path / "run")
  folder = tmp_path / "run" / "runs" / "seed_0"
  content = read(folder, "calibration.json")
  assert [row["class"] for row in content["thresholds"]] == ["Low", "High"]
  fitted = calibration.read(folder)
  with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 12
  for row in rows:
    chosen = [
      name
      for name, threshold in zip(
        ("Low", "High"), fitted.thresholds, strict=True
      )
      if float(row[f"p({name})"]) >= threshold
    ]
    assert row["predicted"] == ";".join(chosen)


def test_balance_is_training_with_the_inverse_of_the_training_clips(
  clips, tmp_path
):
  balanced = probing(clips)
  assert balanced.loss.balance == "inverse"
  finetune.run(balanced, tmp_path / "balanced")
  lines = (tmp_path / "balanced" / "splits.csv").read_text().splitlines()
  labels = [
    ("high", "low").index(line.split(",")[2])
    for line in lines
    if ",train," in line
  ]
  weights = class_weights.inverse_frequency([(y,) for y in labels], 2)
  assert weights[0] > 1.4 * weights[1]
  given = {"loss.balance": "none", "loss.class_weights": weights}
  finetune.run(probing(clips, **given), tmp_path / "given")
  logits = []
  for name in ("balanced", "given"):
    path = tmp_path / name / "runs" / "seed_0" / "predictions.npz"
    with np.load(path) as stored:
      logits.append(stored["test/logits"])
  np.testing.assert_array_equal(*logits)


def test_a_folder_has_what_small_sets_need():
  config = configs.get_config("dataset=folder")
  assert config.optimizer.layer_decay == 0.75
  assert config.duration.warmup > 0
  assert config.evaluation.selection == "valid"
  assert 0 < config.evaluation.patience < config.duration.total
  assert config.evaluation.metrics[0] == "balanced_accuracy"
  assert config.loss.balance == "inverse"


@pytest.mark.parametrize("dataset", configs.DATASETS)
def test_every_data_set_passes_the_checks_with_every_head(dataset):
  built = [
    linear_eval.get_config(f"dataset={dataset},probe={probe}")
    for probe in linear_eval.PROBES
  ]
  built += [
    configs.get_config(f"dataset={dataset},parity={parity}")
    for parity in supervised.PARITIES
  ]
  for config in built:
    finetune.check(config)
    # What is published knows neither.
    if dataset not in ("folder", "task", "manifest"):
      assert config.loss.balance == "none"
      assert config.evaluation.patience == 0
      assert config.data.splits.test_fraction == 0
