"""Stages train what they say, whatever cuts the batch, and go on exactly."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from audiomosaic_jax import (
  checkpoint,
  encoder_source,
  instruct,
  optimizer,
  sharding,
)
from audiomosaic_jax.data import pipeline, questions
from audiomosaic_jax.language import (
  base,
  build,
  demo,
  evaluation,
  partition,
  stages,
)
from audiomosaic_jax.models import llama_config, lora
from audiomosaic_jax.models.llama import Llama
from configs import common
from configs import instruct as configs
from tests import tiny_instruct

SEVEN_B = {
  "model_type": "llama",
  "vocab_size": 32_000,
  "hidden_size": 4096,
  "intermediate_size": 11_008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "rms_norm_eps": 1e-6,
}


def full_shapes():
  """Returns config and own parameters of the published model, as shapes."""
  config = configs.get_config("variant=base")
  config.fbank.update(common.fbank())
  config.spectrogram.update(common.AUDIOSET)
  attributes = llama_config.from_hf_config(SEVEN_B)
  llama = Llama(**attributes, **config.model.llama, use_kernel=None)
  model = build.build_model(config, llama)
  return config, build.abstract_own(model, config)


def test_stages_learn_the_published_numbers_of_parameters():
  config, own = full_shapes()
  counts = {}
  for name in configs.STAGES:
    learns, rest = partition.split(own, config.stages[name].trainable)
    counts[name] = partition.count(learns)
    assert counts[name] + partition.count(rest) == partition.count(own)
  assert counts == {
    "stage_1": 3_152_896,
    "stage_2": 92_995_328,
    "stage_3": 92_995_328,
    "stage_4": 92_995_328,
  }
  assert partition.count(own["llama"]) == 4_194_304
  assert partition.count(own["encoder"]) == 85_651_200
  assert partition.count(own["projector"]) == 3_149_824


def test_the_norms_of_the_bridge_are_the_outer_ones():
  _, own = full_shapes()
  learns, _ = partition.split(own, configs.BRIDGE)
  assert set(traverse_util.flatten_dict(learns, sep="/")) == {
    "projector/proj/kernel",
    "projector/proj/bias",
    *(
      f"encoder/{n}/{p}"
      for n in ("norm", "norm_pre")
      for p in ("scale", "bias")
    ),
  }


def test_a_pattern_that_matches_nothing_is_named():
  with pytest.raises(ValueError, match=r"'encoder/none' matches none of 1"):
    partition.split({"encoder": {"norm": np.zeros(3)}}, ("encoder/none",))


class Setup:
  """One step of a tiny stage on a mesh, and what it starts from."""

  def __init__(self, config, workdir, devices, stage="stage_2"):
    self.config, self.mesh = config, sharding.make_mesh(devices)
    self.held = tiny_instruct.open_base(config, workdir, self.mesh)
    self.model = build.build_model(config, self.held.llama)
    self.own = build.init_own(self.model, config, None, jax.random.key(0))
    # Adapters that do something, or their first factors get no gradient.
    self.own["llama"] = jax.tree.map(
      lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape),
      self.own["llama"],
    )
    self.trainable = config.stages[stage].trainable
    learns, _ = partition.split(self.own, self.trainable)
    self.tx = optimizer.make_optimizer(
      learns, schedule=lambda _: 1e-2, **config.optimizer
    )
    opt_state = self.tx.init(learns)
    self.state = instruct.train_state.TrainState(
      jnp.int32(0), self.own, {}, opt_state, {}
    )

  def step(self, batch):
    step = instruct.make_train_step(
      self.model, self.tx, self.trainable, self.config, self.mesh
    )
    everywhere = sharding.replicated(self.mesh)
    state, metrics = jax.jit(step, out_shardings=everywhere)(
      jax.device_put(self.state, everywhere),
      self.held.params,
      sharding.put_batch(batch, sharding.batch_sharded(self.mesh)),
      jax.random.key(1),
    )
    return tiny_instruct.host(state.params), tiny_instruct.host(metrics)


def batch_of(config, workdir, held):
  source = instruct.load_questions(config, "stage_1", held, workdir / "stage_1")
  batches = pipeline.train_iterator(
    source,
    seed=0,
    batch_size=config.batch_size,
    process_index=0,
    process_count=1,
    weights=None,
    **config.data.pipeline,
  )
  batch = questions.to_arrays(next(batches), config.text.buckets)
  batches.close()
  # One row without sound.
  batch["has_audio"] = np.arange(config.batch_size) != 2
  return batch


def assert_same(found, expected, tolerance):
  leaves = traverse_util.flatten_dict(expected, sep="/")
  for path, leaf in traverse_util.flatten_dict(found, sep="/").items():
    np.testing.assert_allclose(leaf, leaves[path], atol=tolerance, err_msg=path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A step of a whole batch on one device."""
  workdir = tmp_path_factory.mktemp("instruct")
  config = tiny_instruct.tiny_config(workdir)
  setup = Setup(config, workdir, jax.devices()[:1])
  batch = batch_of(config, workdir, setup.held)
  return workdir, setup, batch, setup.step(batch)


@pytest.mark.parametrize(
  ("micro", "devices"),
  [(2, 1), pytest.param(1, 4, marks=pytest.mark.slow), (8, 8)],
)
def test_micro_batches_and_devices_change_nothing(whole, micro, devices):
  workdir, _, batch, (params, metrics) = whole
  config = tiny_instruct.tiny_config(workdir, micro_batch_size=micro)
  setup = Setup(config, workdir, jax.devices()[:devices])
  found, values = setup.step(batch)
  np.testing.assert_allclose(values["loss"], metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(
    values["grad_norm"], metrics["grad_norm"], rtol=1e-4
  )
  # Adam divides by the gradient's size: rounding shows where it is tiny.
  assert_same(found, params, 2e-3)


def test_a_step_moves_what_learns_and_nothing_else(whole):
  _, setup, _, (params, _) = whole
  before = traverse_util.flatten_dict(tiny_instruct.host(setup.own), sep="/")
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    assert not np.array_equal(leaf, before[path]), path
  config = setup.config
  workdir = whole[0]
  bridge = Setup(config, workdir, jax.devices()[:1], stage="stage_1")
  moved, _ = bridge.step(whole[2])
  for path, leaf in traverse_util.flatten_dict(moved, sep="/").items():
    outer = path.startswith(("projector", "encoder/norm/", "encoder/norm_pre"))
    assert np.array_equal(leaf, before[path]) != outer, path


def run(config, workdir):
  return instruct.run(config, workdir)


def losses_of(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of two stages that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("finished")
  assert run(tiny_instruct.tiny_config(workdir), workdir)
  return workdir


def learned_in(workdir, stage="stage_2"):
  config = instruct.experiment.load_config(workdir)
  mesh = sharding.make_mesh()
  held = tiny_instruct.open_base(config, workdir, mesh)
  model = build.build_model(config, held.llama)
  return tiny_instruct.host(build.load_own(model, config, workdir / stage))


def test_a_run_that_is_stopped_in_every_stage_ends_at_the_same_numbers(
  finished, tmp_path, monkeypatch
):
  watcher = instruct.preemption.PreemptionWatcher
  monkeypatch.setattr(watcher, "reached", lambda self, step: step == 1)
  config = tiny_instruct.tiny_config(tmp_path)
  stops = 0
  while not run(tiny_instruct.tiny_config(tmp_path), tmp_path):
    stops += 1
    assert stops <= 2
  assert stops == 2
  for name in config.stages.order:
    assert losses_of(tmp_path / name) == losses_of(finished / name)
  assert len(losses_of(tmp_path / "stage_1")) == 2
  jax.tree.map(
    np.testing.assert_array_equal, learned_in(tmp_path), learned_in(finished)
  )


def test_the_base_is_as_it_was_and_in_no_checkpoint(finished):
  config = instruct.experiment.load_config(finished)
  mesh = sharding.make_mesh()
  held = tiny_instruct.open_base(config, finished, mesh)
  now = base.fingerprint_of(held.params)
  for name in config.stages.order:
    record = json.loads((finished / name / "finished.json").read_text())
    assert record["base"] == now
    meta = checkpoint.load_meta(finished / name)
    assert meta["base"] == now
  saved = {
    path: leaf.size
    for path, leaf in traverse_util.flatten_dict(learned_in(finished)).items()
  }
  frozen = traverse_util.flatten_dict({"llama": held.params})
  assert not set(saved) & set(frozen)


def test_another_base_is_refused(finished, tmp_path):
  config = tiny_instruct.tiny_config(tmp_path, seed=1)
  other = tiny_instruct.open_base(config, tmp_path, sharding.make_mesh())
  saved = checkpoint.load_meta(finished / "stage_2")["base"]
  found = base.fingerprint_of(other.params)
  with pytest.raises(ValueError, match=f"fingerprint {saved}.*has {found}"):
    base.check(saved, found, finished)


def test_results_hold_all_conditions_and_the_base(finished):
  results = json.loads((finished / "results.json").read_text())
  assert results["about"]["stage"] == "stage_2"
  assert set(results["sets"]["demo"]) == {
    *("metric", "clips", "audio", "other_audio", "no_audio"),
  }
  assert results["sets"]["demo"]["clips"] == 4
  assert "| demo | accuracy, 4 clips |" in (finished / "results.md").read_text()
  lines = (finished / "predictions" / "demo.jsonl").read_text().splitlines()
  assert len(lines) == 4
  captions = (finished / "captions" / "demo.jsonl").read_text().splitlines()
  assert results["captions"]["demo"]["clips"] == len(captions) > 1


def test_a_finished_run_trains_nothing_again(finished, monkeypatch, capsys):
  monkeypatch.setattr(
    instruct, "train", lambda job: pytest.fail("trained again")
  )
  assert run(tiny_instruct.tiny_config(finished), finished)
  assert capsys.readouterr().out.count("finished before") == 2


@pytest.mark.parametrize("process", [0, 1])
def test_no_process_goes_on_before_a_stage_has_its_record(
  tmp_path, monkeypatch, process
):
  folder, met = tmp_path / "stage_1", []
  folder.mkdir()

  def wait(what):
    met.append((what, stages.read_record(folder)))

  monkeypatch.setattr(stages.jax, "process_index", lambda: process)
  monkeypatch.setattr(stages.cluster, "wait_for_all", wait)
  stages.write_record(folder, {"steps": 3})
  # Process 0 writes it first; the other ones write nothing.
  found = None if process else {"steps": 3}
  assert met == [("stage_1 is finished", found)]


def test_a_stage_without_the_one_before_is_refused(tmp_path):
  config = tiny_instruct.tiny_config(tmp_path)
  config.stages.order = ("stage_3",)
  with pytest.raises(FileNotFoundError, match="stage_2 is not finished"):
    run(config, tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"micro_batch_size": 3, "batch_size": 32},
      "3 x 8 devices does not divide batch_size 32",
    ),
    ({"text.cutoff": 97}, r"text\.cutoff 97 is above .* \(48, 96\)"),
    ({"batch_size": 12}, r"batch_size 12 is not divisible by 8 devices"),
  ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, message):
  config = tiny_instruct.tiny_config(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    instruct.check(config)


def test_a_set_that_is_not_there_is_named_before_training(tmp_path):
  config = tiny_instruct.tiny_config(tmp_path)
  config.evaluation.sets.order = ("esc50", "vggsound")
  config.evaluation.sets.esc50.source.data_dir = str(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match="none of set esc50 does not"):
    run(config, tmp_path)
  assert not (tmp_path / "stage_1").exists()


def test_captions_whose_clips_are_elsewhere_are_named_before_training(tmp_path):
  config = tiny_instruct.tiny_config(tmp_path)
  table = tmp_path / "clotho.csv"
  table.write_text("file_name,caption_1\na.wav,rain\n")
  config.evaluation.captions.order = ("clotho",)
  chosen = config.evaluation.captions.clotho
  chosen.update(table=str(table), folder=str(tmp_path / "none"))
  with pytest.raises(FileNotFoundError, match=r"none of 1 clips .*clotho\.csv"):
    run(config, tmp_path)
  assert not (tmp_path / "stage_1").exists()


def test_results_of_a_set_are_written_before_the_next_one(
  tmp_path, monkeypatch
):
  config = tiny_instruct.tiny_config(tmp_path)
  sets = config.evaluation.sets
  sets.order = ("esc50", "tut17")
  for name in sets.order:
    sets[name].source.data_dir = "there"
  value = {"value": 0.5}
  found = {"metric": "accuracy", "clips": 4}
  found |= dict.fromkeys(evaluation.CONDITIONS, value)

  def evaluate(talker, name, clips, workdir):
    if name == "tut17":
      raise RuntimeError("out of memory")
    return found

  for module, name in (
    (evaluation.build, "build_model"),
    (evaluation.build, "load_own"),
    (evaluation.chat, "Chat"),
    (evaluation, "load_clips"),
  ):
    monkeypatch.setattr(module, name, lambda *_: None)
  monkeypatch.setattr(evaluation, "evaluate_set", evaluate)
  monkeypatch.setattr(
    evaluation.stages, "find", lambda *_: (tmp_path / "stage_1", {"steps": 3})
  )
  held = base.Base(*4 * [None])
  with pytest.raises(RuntimeError, match="out of memory"):
    evaluation.run(config, held, tmp_path, None)
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["sets"] == {"esc50": found}
  assert (
    "| esc50 | accuracy, 4 clips |" in (tmp_path / "results.md").read_text()
  )


def test_a_run_without_a_base_says_where_to_get_one(tmp_path):
  config = tiny_instruct.tiny_config(tmp_path)
  config.base.folder = ""
  with pytest.raises(ValueError, match=r"base\.folder is empty; .*:debug"):
    base.place(config, tmp_path)


def test_micro_batches_take_rows_from_all_over_the_batch():
  batch = {"ids": jnp.arange(8)}
  cut = instruct.micro_batches(batch, 4)["ids"]
  assert cut.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_debug_keeps_what_was_asked_for():
  assert configs.get_config("debug").batch_size == 32
  assert configs.get_config("debug,batch_size=64").batch_size == 64


@pytest.mark.parametrize(
  ("preset", "frames", "samples"),
  [("debug,", 128, 20_720), ("", 1024, 160_000)],
)
def test_released_has_frames_for_the_length_of_the_clips(
  preset, frames, samples
):
  config = configs.get_config(f"{preset}parity=released")
  encoder_source.complete(config, None)
  assert config.spectrogram.num_frames == frames
  assert config.data.pipeline.clip_samples == samples
  assert config.spectrogram.mean == -5.081


def test_one_process_writes_the_demo_and_the_others_wait(tmp_path, monkeypatch):
  config = tiny_instruct.tiny_config(tmp_path)
  met = []
  monkeypatch.setattr(demo.cluster, "wait_for_all", met.append)
  monkeypatch.setattr(demo.jax, "process_index", lambda: 1)
  demo.write(config, tmp_path)
  assert len(met) == 1 and not (tmp_path / "base").exists()
  monkeypatch.undo()
  demo.write(config, tmp_path)
  assert (tmp_path / "base" / "tokenizer.json").exists()


def test_a_base_without_its_tokenizer_does_not_count_as_there(
  tmp_path, monkeypatch
):
  config = tiny_instruct.tiny_config(tmp_path)

  def kill(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(demo.text, "train_tokenizer", kill)
  with pytest.raises(KeyboardInterrupt):
    demo.write(config, tmp_path)
  monkeypatch.undo()
  demo.write(config, tmp_path)
  assert (tmp_path / "base" / "tokenizer.json").exists()


def test_without_micro_batches_a_device_sees_all_it_has(tmp_path):
  config = tiny_instruct.tiny_config(tmp_path, micro_batch_size=0)
  assert instruct.rows_at_once(config, sharding.make_mesh()) == 8
  instruct.check(config)


def test_adapters_are_drawn_as_one_tree_with_the_rest():
  _, own = full_shapes()
  adapters = traverse_util.flatten_dict(own["llama"])
  assert {path[-1] for path in adapters} == set(lora.FACTORS)
  assert functools.reduce(max, (x.ndim for x in adapters.values())) == 3
