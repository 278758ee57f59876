"""An encoder fits another task, or is refused with both values."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny_supervised as tiny

from audiomosaic_jax import (
  checkpoint,
  classifier_setup,
  encoder_source,
  experiment,
  train_state,
)
from audiomosaic_jax.models import positions
from configs import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, config, params) of a pretraining run of two seeds."""
  workdir = tmp_path_factory.mktemp("run")
  config = pretrain.get_config("smoke")
  config.num_seeds = 2
  config.model.encoder.update(width=32, depth=2, num_heads=2)
  config.model.projector.update(hidden_features=16, out_features=8)
  config.fbank.num_mel_bins = 32
  config.spectrogram.update(num_frames=64, mean=-5.0)
  experiment.save_config(config, workdir)
  model = experiment.build_model(config)
  init = jax.jit(functools.partial(experiment.init_variables, model, config))
  params = {}
  for seed, folder in experiment.seed_folders(config, workdir).items():
    state = train_state.create(init(jax.random.key(seed)), optax.identity(), {})
    with checkpoint.Checkpointer(
      folder / "checkpoints", keep_last=1, keep_every=0
    ) as saved:
      saved.save(1, state, {})
    params[seed] = jax.device_get(state.params)
  return workdir, config, params


def start(run, argument="dataset=task", **changes):
  """Returns (config, variables) of a classifier on the run's encoder."""
  changes = {"init.run": str(run[0]), **changes}
  config = tiny.fine_tuning(argument=argument, **changes)
  source = encoder_source.find_run(config.init.run)
  lines = encoder_source.complete(config, source)
  model = classifier_setup.build_model(config, 3)
  seed = 1
  return (
    config,
    lines,
    classifier_setup.start_variables(model, config, source, seed),
  )


def test_the_encoder_and_its_norm_are_those_of_the_seed(run):
  config, lines, variables = start(run, **{"spectrogram.num_frames": 64})
  learned, params = run[2][1], variables["params"]
  jax.tree.map(
    np.testing.assert_array_equal, params["encoder"], learned["encoder"]
  )
  np.testing.assert_array_equal(
    params["fc_norm"]["scale"], learned["fc_norm"]["scale"]
  )
  assert config.model.encoder.width == 32
  assert config.spectrogram.mean == -5.0
  assert any("config.spectrogram.mean=-5.0 (from" in line for line in lines)


def test_what_is_set_is_not_taken_from_the_run(run):
  config, lines, _ = start(run, **{"spectrogram.mean": -3.0})
  assert config.spectrogram.mean == -3.0
  assert not any("spectrogram.mean" in line for line in lines)


@pytest.mark.parametrize("method", ["bilinear", "crop"])
def test_positions_are_fitted_to_the_grid_of_the_task(run, method):
  changes = {"init.positions.method": method, "spectrogram.num_frames": 32}
  _, _, variables = start(run, **changes)
  expected = positions.resize_positions(
    run[2][1]["encoder"]["pos_embed"],
    (4, 2),
    (2, 2),
    layout="paper",
    method=method,
  )
  np.testing.assert_array_equal(
    variables["params"]["encoder"]["pos_embed"], expected
  )


def test_the_folder_of_one_seed_can_be_given(run):
  found = encoder_source.find_run(str(run[0] / "seed_0"))
  assert found.folders == (run[0] / "seed_0",)


def test_an_encoder_of_another_size_is_refused_with_both_values(run):
  with pytest.raises(
    ValueError, match=r"width is 192, but .* has 32; leave it"
  ):
    start(run, argument="dataset=task,variant=tiny")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"not a pretraining run"):
    encoder_source.find_run(str(tmp_path / "nothing"))


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_the_norm_of_a_classifier_becomes_the_last_one_if_it_has_one(run, head):
  # The config of a classifier has a head instead of a switch for the norm.
  workdir, config, params = run
  config = config.copy_and_resolve_references()
  with config.unlocked():
    del config.model.use_fc_norm
    config.model.head = head
  source = encoder_source.Run(config, (workdir / "seed_0",))
  own = params[0]["encoder"]
  abstract = {**own, "norm": params[0]["fc_norm"]}
  found = encoder_source.load_encoder(abstract, config, source, 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    found,
    abstract if head == "linear" else own,
  )


def test_without_a_run_the_encoder_is_that_of_the_fallback():
  config = tiny.fine_tuning()
  lines = encoder_source.complete(config, None)
  assert all("(from config.fallback)" in line for line in lines)
  assert encoder_source.load({}, config, None, 0) == {}
