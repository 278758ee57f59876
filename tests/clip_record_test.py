"""A job goes on, and is tested, with the clips that it began with only."""

import json
import os

import numpy as np
import pytest
import tiny_supervised as tiny

from audiomosaic_jax import (
  classifier_setup,
  clip_record,
  encoder_source,
  evaluate,
  finetune,
)
from configs import evaluate as evaluate_configs


def write_folder(root, count=12):
  rng = np.random.default_rng(0)
  for label in ("low", "high"):
    (root / label).mkdir(parents=True)
    for i in range(count):
      tiny.soundfile.write(
        root / label / f"{i}.wav", 0.1 * rng.normal(size=3_200), tiny.RATE_HZ
      )
  return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Returns (config, workdir, clips) of a probe of a folder cut by us."""
  clips = write_folder(tmp_path_factory.mktemp("data") / "clips")
  workdir = tmp_path_factory.mktemp("run")
  config = tiny.probing(clips, argument="dataset=folder")
  config.evaluation.selection = "last"
  finetune.run(config, workdir)
  return config, workdir, clips


def test_the_same_clips_go_on(trained, capsys):
  config, workdir, _ = trained
  finetune.run(config, workdir)
  assert "finished before" in capsys.readouterr().out
  noted = json.loads((workdir / clip_record.FILE).read_text())["0"]
  assert sum(split["clips"] for split in noted.values()) == 24


def test_other_clips_are_refused_in_training_and_in_tests(trained):
  config, workdir, clips = trained
  moved = clips / "low" / "0.wav"
  moved.rename(clips.parent / "0.wav")
  again = config.copy_and_resolve_references()
  again.num_seeds = 2
  message = r"not those that .* was trained with: .* clips, has .*--workdir"
  with pytest.raises(ValueError, match=message):
    evaluate.run(evaluate_configs.get_config(), workdir)
  with pytest.raises(ValueError, match=message):
    finetune.run(again, workdir)
  (clips.parent / "0.wav").rename(moved)
  finetune.run(again, workdir)


def test_before_anything_is_trained_clips_may_change(tmp_path):
  clips = write_folder(tmp_path / "clips")
  config = tiny.probing(clips, argument="dataset=folder")
  encoder_source.complete(config, None)
  load = classifier_setup.load_splits
  before = load(config, tmp_path, 0)
  (clips / "low" / "0.wav").unlink()
  after = load(config, tmp_path, 0)
  count = sum(len(clips) for clips in before.named().values())
  assert sum(len(clips) for clips in after.named().values()) == count - 1


def test_a_digest_takes_names_that_are_not_text_in_any_order():
  name = os.fsdecode(b"caf\xe9.wav")
  assert clip_record.digest(["a", name]) == clip_record.digest([name, "a"])
  assert clip_record.digest(["a"]) != clip_record.digest(["a", name])
