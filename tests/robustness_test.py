"""Finished classifiers, loaded and tested again."""

import json

import numpy as np
import pytest
import tiny_supervised as tiny

from audiomosaic_jax import (
  comparison,
  evaluate,
  finetune,
  pretrain,
  results,
  robustness,
)
from configs import evaluate as configs

COUNTS = {"train": 32, "valid": 8, "test": 24}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return tiny.write_task(tmp_path_factory.mktemp("task"), COUNTS)


def few(argument="", **classifier):
  config = configs.get_config(argument)
  config.classifier.degradations.update(
    noise_snr_db=(-10.0,), room_t60_s=(), codecs=("mp3",), resample_hz=()
  )
  config.classifier.update(classifier)
  return config


def rows(workdir, name="test"):
  path = workdir / "evaluations" / f"{name}.json"
  return json.loads(path.read_text())["results"]


def accuracies(workdir):
  return {
    row["degradation"]: row["metrics"]["accuracy"]["mean"]
    for row in rows(workdir)
  }


@pytest.mark.parametrize(
  "kind", ["fine-tuned", pytest.param("probe", marks=pytest.mark.slow)]
)
def test_a_loaded_classifier_says_what_it_said_when_it_was_trained(
  kind, task, tmp_path, capsys
):
  if kind == "probe":
    # Trained on features that were computed once: the head alone is saved.
    config = tiny.probing(
      task,
      argument="dataset=task,probe=layer",
      **{"layers": (1,), "num_seeds": 2, "duration.total": 60.0},
    )
  else:
    config = tiny.fine_tuning(
      task, **{"folds": 2, "evaluation.selection": "last"}
    )
  finetune.run(config, tmp_path)
  evaluate.run(few(), tmp_path)
  clean, noisy, mp3 = accuracies(tmp_path).values()
  (trained,) = json.loads((tmp_path / "results.json").read_text())["results"]
  for end in ("mean", "per_seed", "low", "high"):
    assert rows(tmp_path)[0]["metrics"]["accuracy"][end] == (
      pytest.approx(trained["metrics"]["accuracy"][end])
    )
  assert rows(tmp_path)[0]["num_clips"] == trained["num_clips"]
  printed = capsys.readouterr().out
  for name in ("clean", "noise at -10 dB", "mp3"):
    assert f"test, {name}" in printed
    assert name in (tmp_path / "evaluations" / "test.md").read_text()
  if kind == "probe":
    # The tones drown.
    assert clean > 0.8 and noisy < clean and mp3 > noisy
  assert (tmp_path / "evaluations" / "test.html").exists()
  assert list((tmp_path / "evaluations" / "test").glob("*.png"))


def test_the_windows_of_a_clip_can_be_others_than_it_was_tested_with(
  task, tmp_path, monkeypatch
):
  other = tiny.write_task(tmp_path / "long", {"test": 16}, seconds=0.6)
  finetune.run(tiny.probing(task), tmp_path / "run")
  counts, predictions = [], results.predictions

  def count(windows, source):
    counts.append(len(windows.rows))
    return predictions(windows, source)

  monkeypatch.setattr(results, "predictions", count)
  for max_windows in (None, 1, 2):
    config = few("dataset=task", max_windows=max_windows)
    config.classifier.source.data_dir = str(other)
    evaluate.run(config, tmp_path / "run")
    assert rows(tmp_path / "run", "task")[0]["num_clips"] == 16
  # Each clip clean, in noise and as MP3; as trained is one window.
  assert counts == 3 * [16] + 3 * [16] + 3 * [32]


def test_a_folder_that_is_not_cut_is_tested_as_a_whole(task, tmp_path):
  rng = np.random.default_rng(0)
  for name in ("low/a", "low/b", "high/c"):
    path = tmp_path / "other" / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.soundfile.write(path, 0.1 * rng.normal(size=3_200), tiny.RATE_HZ)
  finetune.run(tiny.probing(task), tmp_path / "run")
  config = few("dataset=folder")
  config.classifier.source.data_dir = str(tmp_path / "other")
  evaluate.run(config, tmp_path / "run")
  assert rows(tmp_path / "run", "folder")[0]["num_clips"] == 3


@pytest.mark.slow
def test_a_head_is_not_put_on_an_encoder_that_it_was_not_trained_on(
  task, tmp_path
):
  pretrained = tmp_path / "pretrained"
  config = tiny.pretraining()
  pretrain.run(config, pretrained)
  config.duration.total = 2.0
  probing = tiny.probing(task, **{"init.run": str(pretrained)})
  finetune.run(probing, tmp_path / "probe")
  evaluate.run(few(), tmp_path / "probe")
  pretrain.run(config, pretrained)
  with pytest.raises(ValueError, match=r"trained on states .*1@.*now has .*2@"):
    evaluate.run(few(), tmp_path / "probe")


def test_a_classifier_is_tested_on_another_data_set(task, tmp_path):
  other = tiny.write_task(tmp_path / "other", {"test": 12}, seed=5)
  # One of the two classes is enough.
  lines = (other / "labels.csv").read_text().splitlines()
  kept = [line for line in lines if ",low," not in line]
  (other / "labels.csv").write_text("\n".join(kept) + "\n")
  config = tiny.probing(task, **{"duration.total": 60.0})
  finetune.run(config, tmp_path / "run")
  config = few("dataset=task")
  config.classifier.source.data_dir = str(other)
  evaluate.run(config, tmp_path / "run")
  found = rows(tmp_path / "run", "task")
  assert {row["num_clips"] for row in found} == {6}
  assert found[0]["metrics"]["accuracy"]["mean"] > 0.6
  renamed = (other / "labels.csv").read_text().replace(",high,", ",shrill,")
  (other / "labels.csv").write_text(renamed)
  with pytest.raises(ValueError, match=r"\['shrill'\].*not among"):
    evaluate.run(config, tmp_path / "run")


def test_a_clip_that_two_folds_hear_is_one_clip_in_the_interval():
  rng = np.random.default_rng(0)
  arrays = {
    "logits": rng.normal(size=(40, 2)).astype("f4"),
    "targets": np.eye(2)[rng.integers(0, 2, 40)],
    "ids": np.array([f"{i}" for i in range(40)]),
  }
  settings = tiny.probing().evaluation
  settings.num_resamples = 300
  once = comparison.metric_summary({0: [arrays]}, settings)["accuracy"]
  twice = comparison.metric_summary({0: [arrays] * 2}, settings)["accuracy"]
  assert once == twice


def test_what_cannot_be_loaded_is_refused(task, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no config\.json"):
    evaluate.run(few(), tmp_path)
  config = tiny.probing(task, argument="dataset=task,probe=knn")
  finetune.run(config, tmp_path / "knn")
  with pytest.raises(ValueError, match="votes of neighbours"):
    evaluate.run(few(), tmp_path / "knn")
  config = tiny.probing(task)
  finetune.run(config, tmp_path / "probe")
  (tmp_path / "probe" / "runs" / "seed_0" / "result.json").unlink()
  with pytest.raises(FileNotFoundError, match="finish the run"):
    robustness.run(few(), tmp_path / "probe")
