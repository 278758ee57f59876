"""Encoders are loaded from whatever a run has left."""

import numpy as np
import pytest
import tiny_supervised as tiny

import audiomosaic_jax as am
from audiomosaic_jax import encoder_probe, experiment, finetune, pretrain
from audiomosaic_jax.data import datasets

RATE_HZ = 16_000
COUNTS = {"train": 16, "valid": 8, "test": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A pretraining run of two seeds."""
  workdir = tmp_path_factory.mktemp("run")
  config = tiny.pretraining()
  config.num_seeds = 2
  pretrain.run(config, workdir)
  return workdir


def clip(seed=0):
  return 0.1 * np.random.default_rng(seed).normal(size=5_360)


def test_a_pretraining_run_gives_the_embeddings_of_its_probes(run):
  encoder = am.load_encoder(run)
  config = experiment.load_config(run)
  model = experiment.build_model(config)
  embed = encoder_probe.make_embed_fn(model, config)
  pcm = np.int16(32_768 * np.stack([clip(i) for i in range(8)]))
  variables = encoder_probe.load_variables(config, run / "seed_0")
  [expected] = embed(variables, [pcm])
  found = encoder.embed_batch(list(pcm), RATE_HZ)
  # The probes run as the encoder was trained, in bfloat16.
  for row, out in zip(expected["mean"], found, strict=True):
    np.testing.assert_allclose(out.embedding, row, atol=0.05)


def test_each_seed_is_an_encoder_of_its_own(run):
  first, second = (am.load_encoder(run / f"seed_{i}") for i in range(2))
  default = am.load_encoder(str(run)).embed(clip(), RATE_HZ)
  one, other = (e.embed(clip(), RATE_HZ) for e in (first, second))
  np.testing.assert_array_equal(default.embedding, one.embedding)
  assert np.abs(one.embedding - other.embedding).max() > 0.01


@pytest.mark.parametrize("kind", ["probe", "fine-tuned"])
def test_a_classifier_says_of_a_clip_what_its_run_said(kind, run, tmp_path):
  task = tiny.write_task(tmp_path / "task", COUNTS)
  make = tiny.probing if kind == "probe" else tiny.fine_tuning
  config = make(task, **{"init.run": str(run), "duration.total": 2.0})
  config.num_seeds = 2 if kind == "probe" else 1
  config.data.pipeline.pad = "pad"
  finetune.run(config, tmp_path / "fine")
  encoder = am.load_encoder(tmp_path / "fine")
  assert encoder.class_names == ("high", "low")
  stored = np.load(tmp_path / "fine/runs/seed_0/predictions.npz")
  source = datasets.make_dataset(
    "task", "test", data_dir=task, sample_rate_hz=RATE_HZ
  )
  found = encoder.embed_batch(
    [source[i]["waveform"] for i in range(len(source))], RATE_HZ
  )
  logits = np.stack([out.logits for out in found])
  np.testing.assert_allclose(logits, stored["test/logits"], atol=2e-3)
  if kind == "probe":
    other = am.load_encoder(tmp_path / "fine/runs/seed_1")
    again = other.embed(source[0]["waveform"], RATE_HZ).logits
    assert np.abs(again - logits[0]).max() > 1e-4


def test_what_is_no_run_is_refused_with_advice(run, tmp_path):
  with pytest.raises(FileNotFoundError, match="give a workdir"):
    am.load_encoder(tmp_path)
  with pytest.raises(AttributeError, match="load_decoder"):
    am.load_decoder  # noqa: B018
