"""The loop of pretraining: steps, rollbacks, what it says and writes."""

import json
import math

import numpy as np
import pytest
from tiny_pretrain import STEPS, tiny_config

from audiomosaic_jax import checkpoint, experiment, pretrain, sharding
from audiomosaic_jax.data import pipeline
from configs import pretrain as configs


@pytest.mark.parametrize(
  "preset, tokens",
  [
    # 25 of 64 columns of 8 patches; 4 of 8 rows of 64 patches; a class token.
    ("paper", {"view_time": 25 * 8 + 1, "view_freq": 4 * 64 + 1}),
    # 3 of 8 blocks of 64 patches; 38 of 64 cells in each of 8 blocks.
    ("released", {"view_time": 3 * 64 + 1, "view_freq": 38 * 8 + 1}),
  ],
)
def test_the_two_layouts_encode_the_published_numbers_of_tokens(preset, tokens):
  assert experiment.tokens_per_view(configs.get_config(preset)) == tokens


def test_a_pair_of_the_paper_costs_what_its_tokens_cost():
  flops = experiment.flops_per_pair(configs.get_config())
  tokens = np.array([201, 257])
  linear = 6 * tokens.sum() * (12 * 12 * 768**2 + 256 * 768)
  attention = 12 * 12 * (tokens**2).sum() * 768
  assert flops == pytest.approx(linear + attention)


def test_epochs_and_steps_count_the_same_updates():
  config = configs.get_config()
  assert experiment.count_steps(config, 6144 * 10) == (4000, 10)
  config.duration.unit = "steps"
  assert experiment.count_steps(config, 5) == (400, 1)
  config.duration.unit = "hours"
  with pytest.raises(ValueError, match="hours"):
    experiment.count_steps(config, 5)


def test_a_batch_that_does_not_divide_names_the_next_ones():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match=r"100 .* 8 devices; use 96 or 104"):
    sharding.local_batch_size(100, mesh)


def read_steps(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


def fail_at(monkeypatch, bad_step, times):
  """Makes the loss look non-finite at a step, the first `times` times."""
  check, failures = pretrain.check_finite, []

  def check_and_fail(step, scalars):
    if step == bad_step and len(failures) < times:
      failures.append(step)
      raise FloatingPointError(f"loss is nan at step {step}")
    check(step, scalars)

  monkeypatch.setattr(pretrain, "check_finite", check_and_fail)


@pytest.mark.slow
def test_a_non_finite_loss_goes_back_and_on_with_other_clips(
  monkeypatch, tmp_path
):
  fail_at(monkeypatch, bad_step=4, times=1)
  config = tiny_config()
  config.checkpoint.save_every = 2
  assert pretrain.train(config, 0, tmp_path, None)
  assert read_steps(tmp_path) == list(range(1, STEPS + 1))
  assert checkpoint.load_meta(tmp_path)["rollbacks"] == 1


@pytest.mark.slow
def test_a_rollback_has_other_clips_than_those_before_a_restart(
  monkeypatch, tmp_path
):
  seeds = []
  make = pipeline.train_iterator

  def open_one(*args, seed, **kwargs):
    seeds.append(seed)
    return make(*args, seed=seed, **kwargs)

  monkeypatch.setattr(pipeline, "train_iterator", open_one)
  fail_at(monkeypatch, bad_step=2, times=1)
  config = tiny_config()
  config.duration.unit = "steps"
  for total in (STEPS, STEPS + 4):
    config.duration.total = total
    assert pretrain.train(config, 0, tmp_path, None)
    fail_at(monkeypatch, bad_step=STEPS + 2, times=1)
  first, second, resumed, third = seeds
  assert len({first, second, third}) == 3
  assert resumed == second
  assert checkpoint.load_meta(tmp_path)["rollbacks"] == 2


@pytest.mark.slow
def test_a_loss_that_stays_non_finite_stops_with_advice(monkeypatch, tmp_path):
  fail_at(monkeypatch, bad_step=3, times=math.inf)
  config = tiny_config(max_rollbacks=1)
  with pytest.raises(pretrain.NonFiniteLossError, match=r"2 times.*base_lr"):
    pretrain.train(config, 0, tmp_path, None)


@pytest.mark.slow
def test_every_iterator_is_closed_after_a_rollback_too(monkeypatch, tmp_path):
  opened, closed = [], []
  make, close = pipeline.train_iterator, pipeline.TrainIterator.close

  def open_one(*args, **kwargs):
    opened.append(make(*args, **kwargs))
    return opened[-1]

  def close_one(batches):
    closed.append(batches)
    close(batches)

  monkeypatch.setattr(pipeline, "train_iterator", open_one)
  monkeypatch.setattr(pipeline.TrainIterator, "close", close_one)
  fail_at(monkeypatch, bad_step=2, times=1)
  assert pretrain.train(tiny_config(), 0, tmp_path, None)
  assert len(opened) == 2
  assert closed == opened


def test_a_finished_run_is_not_trained_again(tmp_path):
  config = tiny_config()
  assert pretrain.train(config, 0, tmp_path, None)
  before = (tmp_path / "metrics.jsonl").read_text()
  assert pretrain.train(config, 0, tmp_path, None)
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_resumed_run_says_which_settings_changed(tmp_path):
  config = tiny_config()
  assert experiment.save_config(config, tmp_path) == []
  config.schedule.base_lr = 1e-2
  (difference,) = experiment.save_config(config, tmp_path)
  assert "schedule.base_lr" in difference and "0.01" in difference
  assert experiment.load_config(tmp_path).schedule.base_lr == 1e-2


def test_a_run_stays_described_as_it_is_if_it_cannot_go_on(tmp_path, capsys):
  config = tiny_config(report=False)
  assert pretrain.run(config, tmp_path)
  assert f"{STEPS} steps of" in capsys.readouterr().out
  other = tiny_config(report=False, **{"model.encoder.width": 64})
  with pytest.raises(ValueError, match="has shape"):
    pretrain.run(other, tmp_path)
  assert experiment.load_config(tmp_path).model.encoder.width == 32
  assert pretrain.run(config, tmp_path)
  assert f"going on from step {STEPS} of {STEPS}" in capsys.readouterr().out


def test_another_kind_of_job_does_not_take_over_a_run(tmp_path):
  config = tiny_config()
  experiment.save_config(config, tmp_path)
  config.mode = "finetune"
  with pytest.raises(ValueError, match=r"mode 'pretrain'.*'finetune'.*workdir"):
    experiment.save_config(config, tmp_path)
  assert experiment.load_config(tmp_path).mode == "pretrain"
