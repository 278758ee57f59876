"""Encoders are loaded from whatever a run has left."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
import tiny_encoder
import tiny_supervised as tiny
from scipy import special

import audiomosaic_jax as am
from audiomosaic_jax import (
  encoder_probe,
  experiment,
  finetune,
  import_torch,
  torch_settings,
)
from audiomosaic_jax.adapters import huggingface
from audiomosaic_jax.data import datasets

RATE_HZ = 16_000
COUNTS = {"train": 16, "valid": 8, "test": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """What a pretraining run of two seeds leaves."""
  workdir = tmp_path_factory.mktemp("run")
  shape = {"spectrogram.num_frames": 32, "data.pipeline.clip_samples": 5_360}
  for seed in range(2):
    folder = workdir / f"seed_{seed}"
    tiny_encoder.write_run(folder, seed=seed, num_seeds=2, **shape)
    (folder / experiment.CONFIG_FILE).replace(workdir / experiment.CONFIG_FILE)
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


@pytest.mark.parametrize(
  "kind", ["probe", pytest.param("fine-tuned", marks=pytest.mark.slow)]
)
def test_a_classifier_says_of_a_clip_what_its_run_said(kind, run, tmp_path):
  task = tiny.write_task(tmp_path / "task", COUNTS)
  make = tiny.probing if kind == "probe" else tiny.fine_tuning
  config = make(task, **{"init.run": str(run), "duration.total": 2.0})
  config.num_seeds = 2 if kind == "probe" else 1
  config.data.pipeline.pad = "pad"
  config.evaluation.selection = "valid"
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
  # Whole clips as they were tested, what fills them up included.
  clips = [source[i]["waveform"] for i in range(len(source))]
  tested = encoder.classify(clips, RATE_HZ)
  np.testing.assert_allclose(tested, stored["test/logits"], atol=1e-5)
  temperature = encoder.classifier.calibration.temperature
  np.testing.assert_allclose(
    encoder.probabilities(tested),
    special.softmax(tested / temperature, axis=1),
    atol=1e-6,
  )
  if kind == "probe":
    other = am.load_encoder(tmp_path / "fine/runs/seed_1")
    again = other.embed(source[0]["waveform"], RATE_HZ).logits
    assert np.abs(again - logits[0]).max() > 1e-4
    # The encoder was trained on since: its heads no longer fit.
    path = tmp_path / "fine/config.json"
    changed = json.loads(path.read_text())
    changed["init"]["states"] = ["0@1", "0@2"]
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"trained on states \('0@1'"):
      am.load_encoder(tmp_path / "fine")


def test_what_is_no_run_is_refused_with_advice(run, tmp_path):
  with pytest.raises(FileNotFoundError, match="give a workdir"):
    am.load_encoder(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="is not that of a run"):
    am.load_encoder(tmp_path)
  encoder = am.load_encoder(run)
  with pytest.raises(ValueError, match="this encoder has no classifier"):
    encoder.classify([clip()], RATE_HZ)
  with pytest.raises(ValueError, match="this encoder has no calibration"):
    encoder.probabilities(np.zeros((1, 2), np.float32))
  with pytest.raises(AttributeError, match="load_decoder"):
    am.load_decoder  # noqa: B018


def test_a_checkpoint_is_loaded_without_being_imported_first(tmp_path):
  golden = np.load(pathlib.Path(__file__).parent / "golden/encoder_b.npz")
  params = {
    name.removeprefix("param/"): golden[name]
    for name in golden.files
    if name.startswith("param/")
  }
  settings = {
    "num_heads": json.loads(str(golden["cfg_json"]))["num_heads"],
    "audio_preprocessing": {"norm_mean": -4.0, "norm_std": 4.5},
  }
  (tmp_path / "config.json").write_text(json.dumps(settings))
  safetensors.numpy.save_file(params, tmp_path / "model.safetensors")
  choices = torch_settings.Choices(
    num_heads=settings["num_heads"], statistics=(-4.0, 4.5)
  )
  imported = import_torch.read(tmp_path / "model.safetensors", choices)
  import_torch.write(imported, tmp_path / "imported")
  direct = am.load_encoder(tmp_path).embed(clip(), RATE_HZ)
  through = am.load_encoder(tmp_path / "imported").embed(clip(), RATE_HZ)
  np.testing.assert_array_equal(direct.embedding, through.embedding)


def test_a_folder_in_the_form_of_the_hub_is_the_encoder_it_was(run, tmp_path):
  encoder = am.load_encoder(run)
  with pytest.raises(ValueError, match="give another folder"):
    huggingface.save_pretrained(encoder, run)
  huggingface.save_pretrained(encoder, tmp_path / "hub")
  again = am.load_encoder(tmp_path / "hub")
  assert again.model == encoder.model
  np.testing.assert_array_equal(
    again.embed(clip(), RATE_HZ).z, encoder.embed(clip(), RATE_HZ).z
  )
