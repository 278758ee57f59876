"""The loop: frozen is frozen, cached is uncached, killed is whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import tiny_supervised as tiny

from audiomosaic_jax import (
  checkpoint,
  classifier_setup,
  finetune,
  metric_writer,
  predict,
  preemption,
  sharding,
)

COUNTS = {"train": 24, "valid": 8, "test": 16}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return tiny.write_task(tmp_path_factory.mktemp("task"), COUNTS)


def assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def take_steps(job, count):
  """Returns the state before and after some steps."""
  state = job.init()
  before = jax.device_get(state)
  rows = sharding.batch_sharded(job.mesh)
  for _ in range(count):
    batch = {k: v for k, v in next(job.batches).items() if k != "id"}
    batch = sharding.put_batch(batch, rows)
    state, _ = job.step(state, batch, jax.random.key(0))
  return before, jax.device_get(state)


def test_a_frozen_encoder_is_bit_identical_and_has_no_optimiser_state(
  task, tmp_path
):
  config = tiny.fine_tuning(
    task,
    **{
      "model.freeze_encoder": True,
      "optimizer.frozen": ("encoder/.*",),
      "optimizer.weight_decay": 0.5,
    },
  )
  before, after = take_steps(tiny.job(config, tmp_path), 3)
  assert_equal(before.params["encoder"], after.params["encoder"])
  assert not np.array_equal(
    before.params["head"]["kernel"], after.params["head"]["kernel"]
  )
  moments = [np.shape(x) for x in jax.tree.leaves(after.opt_state)]
  head = [
    np.shape(x)
    for name in ("head", "fc_norm")
    for x in jax.tree.leaves(after.params[name])
  ]
  assert sorted(s for s in moments if s) == sorted(head * 2)


def test_fine_tuning_changes_every_parameter(task, tmp_path):
  before, after = take_steps(
    tiny.job(tiny.fine_tuning(task, **{"masking.mode": "none"}), tmp_path), 3
  )
  same = jax.tree.map(np.array_equal, before.params, after.params)
  assert not any(jax.tree.leaves(same))


def test_freezing_the_encoder_but_not_its_optimiser_is_refused(task, tmp_path):
  config = tiny.fine_tuning(task, **{"model.freeze_encoder": True})
  with pytest.raises(ValueError, match="weight decay would"):
    tiny.job(config, tmp_path)


@pytest.mark.parametrize(
  "probe", ["linear", "layer", "weighted_sum", "attentive", "prototype"]
)
def test_cached_features_give_the_logits_of_the_whole_model(
  probe, task, tmp_path
):
  config = tiny.probing(task, argument=f"dataset=task,probe={probe}")
  job = tiny.job(config, tmp_path)
  assert "encoder" not in job.init().params
  model = classifier_setup.build_model(config, 2)
  variables = classifier_setup.start_variables(model, config, None, 0)
  head = classifier_setup.without_encoder(variables["params"])
  # Away from the start, where all logits are alike.
  head = jax.tree.map(
    lambda x: x + 0.3 * np.random.default_rng(0).normal(size=x.shape), head
  )
  cached = job.logits_of({"params": head}, job.clips["test"])
  whole = predict.make_window_fn(model, config, "__call__")(
    {"params": variables["params"] | head}, job.splits.tests["test"]
  )
  np.testing.assert_array_equal(cached.clip, whole.clip)
  np.testing.assert_allclose(cached.rows, whole.rows, atol=2e-5)
  assert np.abs(whole.rows).max() > 0.05


def test_features_are_computed_once_and_again_for_another_encoder(
  task, tmp_path
):
  config = tiny.probing(task)
  tiny.job(config, tmp_path)
  files = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()}
  assert len(files) == 3 and not list(tmp_path.rglob("*.tmp"))
  tiny.job(config, tmp_path)
  again = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()}
  assert again == files
  tiny.job(config, tmp_path, seed=1)
  assert len(list((tmp_path / "features").iterdir())) == 6


def test_features_beyond_the_limit_are_not_kept(task, tmp_path, capsys):
  config = tiny.probing(task, **{"cache.limit_bytes": 1000})
  job = tiny.job(config, tmp_path)
  assert "encoder" in job.init().params
  assert "exceed cache.limit_bytes=1,000" in capsys.readouterr().out


def test_a_linear_probe_agrees_with_logistic_regression(tmp_path):
  counts = {"train": 300, "valid": 4, "test": 200}
  task = tiny.write_task(tmp_path / "task", counts, spread=0.9)
  config = tiny.probing(
    task,
    **{
      "fallback.model.encoder.width": 8,
      "duration.total": 600.0,
      "batch_size": 296,
      "schedule.base_lr": 0.1,
      "evaluation.selection": "last",
      "evaluation.batch_size": 64,
      "log_every": 1000,
      "checkpoint.save_every": 1000,
    },
  )
  job = tiny.job(config, tmp_path)
  variables, _ = finetune.train(job)
  logits = job.logits_of(variables, job.clips["test"])
  ours, _ = predict.evaluation(logits, job.splits.tests["test"])

  def normed(windows):
    x = windows.rows.astype(np.float64)
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt(x.var(1, keepdims=True) + 1e-6)

  theirs = sklearn.linear_model.LogisticRegression(C=1e6, max_iter=20_000)
  train = job.clips["train"]
  theirs.fit(normed(train), job.splits.train.labels[train.clip])
  expected = theirs.score(normed(job.clips["test"]), ours.labels)
  assert 0.6 < expected < 0.99
  assert abs(ours.hits.mean() - expected) <= 0.005 + 1e-9


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
  task, tmp_path, monkeypatch
):
  changes = {"duration.total": 6.0, "evaluation.selection": "valid"}
  whole = finetune.train(
    tiny.job(tiny.fine_tuning(task, **changes), tmp_path / "whole")
  )
  parts = tmp_path / "parts"
  with monkeypatch.context() as patch:
    patch.setattr(
      preemption.PreemptionWatcher, "reached", lambda self, step: step == 3
    )
    job = tiny.job(tiny.fine_tuning(task, **changes), parts)
    assert finetune.train(job) is None
  resumed = finetune.train(tiny.job(tiny.fine_tuning(task, **changes), parts))
  assert whole[1] == resumed[1]
  assert_equal(jax.device_get(whole[0]), jax.device_get(resumed[0]))
  lines = metric_writer.read_metrics(parts / "run")
  expected = metric_writer.read_metrics(tmp_path / "whole" / "run")
  steps = {line["step"]: line["loss"] for line in lines if "loss" in line}
  assert steps[6] == {l["step"]: l for l in expected if "loss" in l}[6]["loss"]


@pytest.mark.slow
def test_folds_and_seeds_are_run_once_each_and_averaged(task, tmp_path, capsys):
  config = tiny.probing(task, **{"folds": 3, "num_seeds": 2})
  config.evaluation.selection = "last"
  finetune.run(config, tmp_path)
  results = json.loads((tmp_path / "results.json").read_text())
  (row,) = results["results"]
  assert row["num_clips"] == sum(COUNTS.values())
  values = {}
  for path in sorted(tmp_path.glob("runs/*/result.json")):
    result = json.loads(path.read_text())
    score = result["splits"]["test"]["metrics"]["accuracy"]
    values.setdefault(result["seed"], []).append(score)
  assert {seed: len(v) for seed, v in values.items()} == {0: 3, 1: 3}
  per_seed = [np.mean(v) for v in values.values()]
  accuracy = row["metrics"]["accuracy"]
  assert accuracy["per_seed"] == pytest.approx(per_seed)
  assert accuracy["mean"] == pytest.approx(np.mean(per_seed))
  assert accuracy["std"] == pytest.approx(np.std(per_seed, ddof=1))
  assert accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
  lines = (tmp_path / "predictions.csv").read_text().splitlines()
  ids = [line.split(",")[0] for line in lines[1:]]
  assert len(ids) == 2 * len(set(ids)) == 2 * row["num_clips"]
  assert (tmp_path / "report.html").exists()
  assert "last step" in (tmp_path / "results.md").read_text()

  before = results
  capsys.readouterr()
  config = tiny.probing(task, **{"folds": 3, "num_seeds": 2})
  config.evaluation.selection = "last"
  finetune.run(config, tmp_path)
  assert capsys.readouterr().out.count("finished before") == 6
  assert json.loads((tmp_path / "results.json").read_text()) == before
  config = tiny.probing(task, **{"folds": 3, "schedule.base_lr": 0.3})
  with pytest.raises(ValueError, match="result of another config or encoder"):
    finetune.run(config, tmp_path)


def test_own_clips_can_be_cut_into_folds_and_still_select_by_validation(
  task, tmp_path
):
  config = tiny.probing(task, **{"folds": 2})
  assert config.evaluation.selection == "valid"
  finetune.run(config, tmp_path)
  (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
  assert row["num_clips"] == sum(COUNTS.values())


@pytest.mark.slow
def test_a_seed_decides_everything(task, tmp_path):
  finals = []
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    config = tiny.fine_tuning(task)
    job = tiny.job(config, tmp_path / name, seed=seed)
    finals.append(jax.device_get(finetune.train(job)[0]["params"]))
  assert_equal(finals[0], finals[1])
  kernels = [f["head"]["kernel"] for f in finals]
  assert not np.array_equal(kernels[0], kernels[2])


def test_neighbours_need_no_training(task, tmp_path):
  config = tiny.probing(task, argument="dataset=task,probe=knn")
  finetune.run(config, tmp_path)
  (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
  assert row["metrics"]["accuracy"]["mean"] > 0.6
  assert not list(tmp_path.rglob("checkpoints"))


def test_training_stops_when_patience_runs_out(task, tmp_path):
  config = tiny.probing(
    task,
    **{
      "duration.total": 500.0,
      "schedule.base_lr": 1e-9,
      "schedule.min_lr": 1e-9,
      "evaluation.patience": 2,
      "log_every": 1000,
    },
  )
  job = tiny.job(config, tmp_path)
  _, step = finetune.train(job)
  # The first evaluation is the best; two more bring nothing.
  assert step == job.eval_every
  with checkpoint.Checkpointer(
    tmp_path / "run" / "checkpoints", keep_last=1, keep_every=0
  ) as saved:
    assert saved.latest_step() == 3 * job.eval_every


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"loss.name": "hinge"}, "loss.name is 'hinge'.*softmax"),
    ({"evaluation.selection": "best"}, "selection is 'best'.*last"),
    ({"evaluation.metrics": ("f1",)}, r"metrics\[0\] is 'f1'.*accuracy"),
    (
      {"evaluation.selection": "last", "evaluation.patience": 3},
      "patience is 3 but selection is 'last'",
    ),
    (
      {"data.splits.valid": "", "data.splits.valid_fraction": 0.0},
      "selection is 'valid' but .*valid_fraction",
    ),
    ({"batch_size": 12}, "batch_size 12 is not divisible by 8"),
    ({"loss.class_weights": (1.0,)}, "1 values for 2 classes"),
  ],
)
def test_settings_that_do_not_fit_are_refused_before_training(
  changes, message, task, tmp_path
):
  config = tiny.fine_tuning(task, **changes)
  with pytest.raises(ValueError, match=message):
    finetune.run(config, tmp_path)


def test_a_best_state_of_steps_that_were_lost_is_no_trap(task, tmp_path):
  changes = {
    "duration.total": 8.0,
    "checkpoint.save_every": 1000,
    "evaluation.selection": "valid",
    "evaluation.eval_every_epochs": 1 / 3,
  }
  job = tiny.job(tiny.fine_tuning(task, **changes), tmp_path)
  assert job.eval_every == 1
  step = job.step

  def fail_late(state, batch, key):
    state, scalars = step(state, batch, key)
    if fail_late.steps == 5:
      raise KeyboardInterrupt
    fail_late.steps += 1
    return state, scalars

  fail_late.steps = 0
  with pytest.raises(KeyboardInterrupt):
    finetune.train(dataclasses.replace(job, step=fail_late))
  with checkpoint.Checkpointer(
    tmp_path / "run" / "checkpoints", keep_last=9, keep_every=0
  ) as saved:
    last = saved.latest_step()
    # As though a best state had been saved and the checkpoint had not.
    with checkpoint.Checkpointer(
      tmp_path / "run" / "best", keep_last=2, keep_every=0
    ) as best:
      assert best.all_steps()[-1] == last
      best.save(last + 1, jax.tree.map(jnp.zeros_like, job.init()), {})
  job = tiny.job(tiny.fine_tuning(task, **changes), tmp_path)
  variables, step = finetune.train(job)
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(variables))
  assert step <= 8


def test_a_metric_of_two_classes_is_refused_before_three_are_trained(tmp_path):
  root = tiny.write_task(tmp_path / "task", {"train": 9, "test": 9})
  lines = (root / "labels.csv").read_text().splitlines()
  third = [line.replace(",low,", ",mid,") for line in lines[1::3]]
  (root / "labels.csv").write_text(
    "\n".join([lines[0], *lines[2::3], *lines[3::3], *third]) + "\n"
  )
  config = tiny.fine_tuning(root, **{"evaluation.selection": "last"})
  config.evaluation.metrics = ("accuracy", "eer")
  with pytest.raises(ValueError, match="'eer' needs 2 classes, got 3"):
    finetune.run(config, tmp_path / "run")
  assert not (tmp_path / "run" / "runs").exists()
