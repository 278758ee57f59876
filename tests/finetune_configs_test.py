"""Every published variant: its values, its size, and two steps of it."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_supervised as tiny
from fake_datasets import FAKES
from models_heads_test import AASIST

from audiomosaic_jax import classifier_setup, encoder_source, optimizer
from audiomosaic_jax import finetune as loop
from configs import finetune, linear_eval, supervised

GOLDEN = pathlib.Path(__file__).parent / "golden"
CLASSES = {
  **{"as20k": 527, "as2m": 527, "esc50": 50, "spc1": 11, "spc2": 35},
  **{"envsdd_ata": 2, "envsdd_tta": 2, "folder": 5, "task": 5},
  **{"fsd50k": 200, "vggsound": 309, "manifest": 5},
}
# Trained in the published code, as counted there.
PARAMETERS = {
  **{"as20k": 86_056_463, "as2m": 86_056_463, "esc50": 85_493_042},
  **{"spc1": 85_315_595, "spc2": 85_334_051},
  **{"envsdd_ata": 85_652_738, "envsdd_tta": 85_652_738},
}
# Read from the published settings: epochs, warm-up, batch, rate, layer decay.
RECIPES = {
  "as20k": (60, 4, 64, 1.25e-4, 0.65),
  "as2m": (100, 10, 256, 2e-4, 0.75),
  "esc50": (60, 5, 16, 3.125e-5, 0.75),
  "spc1": (100, 5, 64, 2.5e-4, 0.75),
  "spc2": (200, 5, 64, 2.5e-4, 0.75),
  "envsdd_ata": (20, 1, 128, 5e-4, 0.75),
  "envsdd_tta": (20, 1, 128, 5e-4, 0.75),
}
FAKE_NAMES = {
  **{"as20k": "audioset", "as2m": "audioset", "esc50": "esc50"},
  **{"spc1": "speech_commands_v1", "spc2": "speech_commands_v2"},
  **{"envsdd_ata": "envsdd", "envsdd_tta": "envsdd", "task": "task"},
  **{"fsd50k": "fsd50k", "vggsound": "vggsound"},
}


def shapes(config, num_classes):
  encoder_source.complete(config, None)
  loop.check(config)
  model = classifier_setup.build_model(config, num_classes)
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  return jax.eval_shape(
    lambda key: model.init(
      key, jnp.zeros((1, frames, bins)), None, train=False
    ),
    jax.random.key(0),
  )["params"]


def count(params):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("dataset", finetune.DATASETS)
def test_every_data_set_builds_at_full_size(dataset):
  config = finetune.get_config(f"dataset={dataset},variant=base").lock()
  params = shapes(config, CLASSES[dataset])
  if dataset in PARAMETERS:
    assert count(params) == PARAMETERS[dataset]


@pytest.mark.parametrize("parity", supervised.PARITIES)
@pytest.mark.parametrize("probe", linear_eval.PROBES)
def test_every_probe_builds_at_full_size(probe, parity):
  argument = f"dataset=as20k,variant=base,probe={probe},parity={parity}"
  config = linear_eval.get_config(argument).lock()
  params = shapes(config, 527)
  trained = {"linear": 406_799, "knn": 406_799, "layer": 406_799}
  # With the output of the encoder again, as the published ones count layers.
  trained |= {"weighted_sum": 406_812, "attentive": 1_607_183}
  if probe in trained and (parity == "released" or probe == "layer"):
    head = classifier_setup.without_encoder(params)
    assert count(head) == trained[probe]


@pytest.mark.parametrize("dataset", RECIPES)
def test_recipes_are_the_published_ones(dataset):
  config = finetune.get_config(f"dataset={dataset}")
  assert (
    config.duration.total,
    config.duration.warmup,
    config.batch_size,
    config.schedule.base_lr,
    config.optimizer.layer_decay,
  ) == pytest.approx(RECIPES[dataset])
  speech, spoof = dataset.startswith("spc"), dataset.startswith("envsdd")
  esc = dataset == "esc50"
  rolled = () if speech or spoof else ("roll_and_scale",)
  assert config.augment_waveform.order == rolled
  assert config.mixup.p == (0.0 if esc or spoof else 0.8)
  widths = [
    config.augment_fbank[name].max_width
    for name in ("frequency_mask", "time_mask")
  ]
  assert widths == ([24, 96] if esc else [48, 48] if speech else [48, 192])
  noise = ("uniform_noise", "roll_frames") if speech else ()
  assert config.augment_input.order == noise
  assert config.masking.mode == ("none" if spoof else "time_freq")
  assert config.loss.name == ("softmax" if esc or spoof else "sigmoid")


def test_released_takes_the_best_epoch_on_the_test_set():
  for dataset in finetune.DATASETS:
    config = finetune.get_config(f"dataset={dataset},parity=released")
    assert config.evaluation.selection == "test"
    assert config.init.positions.layout == "released"
  config = finetune.get_config("dataset=envsdd_ata,head=aasist,parity=released")
  assert config.masking.mode == "time_freq" and config.masking.ratio == (0, 0)


def test_aasist_has_the_published_back_end():
  config = finetune.get_config("dataset=envsdd_ata,head=aasist,variant=base")
  settings = {name: config.model[name] for name in AASIST}
  assert settings == AASIST


def test_the_learning_rate_follows_the_batch():
  config = finetune.get_config("dataset=as20k,batch_size=128")
  assert config.schedule.base_lr == pytest.approx(2.5e-4)


def test_the_rates_and_decays_of_layers_are_the_published_groups():
  groups = json.loads((GOLDEN / "optim_param_groups.json").read_text())
  run = groups["finetune_as20k"]
  config = finetune.get_config("dataset=as20k,variant=base")
  params = shapes(config, 527)
  scales = optimizer.layer_scales(
    params, depth=12, decay=config.optimizer.layer_decay
  )
  decays = optimizer.decay_mask(params)
  golden = run["params"]
  encoder, mask = scales["encoder"], decays["encoder"]
  ours = {
    "cls_token": (encoder["cls_token"], mask["cls_token"]),
    "pos_embed": (encoder["pos_embed"], mask["pos_embed"]),
    "norm_pre.weight": (
      encoder["norm_pre"]["scale"],
      mask["norm_pre"]["scale"],
    ),
    "head.weight": (scales["head"]["kernel"], decays["head"]["kernel"]),
    "head.bias": (scales["head"]["bias"], decays["head"]["bias"]),
    "fc_norm.weight": (scales["fc_norm"]["scale"], decays["fc_norm"]["scale"]),
  }
  for name, (scale, decayed) in ours.items():
    assert float(scale) == pytest.approx(golden[name]["lr_scale"]), name
    rate = config.optimizer.weight_decay if decayed else 0.0
    assert rate == golden[name]["weight_decay"], name
  for block, scale in enumerate(
    np.ravel(jax.tree.leaves(encoder["blocks"])[0])
  ):
    expected = golden[f"blocks.{block}.norm1.bias"]["lr_scale"]
    assert float(scale) == pytest.approx(expected)


# Their recipes are those of another one.
SIMILAR = ("as20k", "as2m", "envsdd_tta", "spc1", "spc2", "vggsound")


@pytest.mark.parametrize(
  "dataset",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SIMILAR))
    for name in FAKE_NAMES
  ],
)
def test_every_data_set_trains_two_steps_on_a_fake_copy(dataset, tmp_path):
  arguments = FAKES[FAKE_NAMES[dataset]][0](tmp_path / "data")
  config = tiny.fine_tuning(
    argument=f"dataset={dataset}",
    **{
      "duration.total": 2.0,
      "folds": 1,
      "data.pipeline.clip_samples": 5_360,
      "evaluation.num_resamples": 2,
    },
  )
  config.data.sampling.epoch_clips = 0
  for name, value in arguments.items():
    if name != "track":
      value = str(value) if isinstance(value, pathlib.Path) else value
      config.data.source[name] = value
  loop.run(config, tmp_path / "run")
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  splits = [row["split"] for row in results["results"]]
  spoof = [f"test0{i}" for i in range(1, 5)]
  assert splits == (spoof if dataset.startswith("envsdd") else ["test"])
  for row in results["results"]:
    for value in row["metrics"].values():
      assert value["mean"] is None or np.isfinite(value["mean"])


@pytest.mark.parametrize(
  ("build", "argument", "message"),
  [
    (finetune.get_config, "dataset=imagenet", "dataset='imagenet'.*as20k"),
    (finetune.get_config, "head=mlp", "head='mlp'.*linear"),
    (finetune.get_config, "parity=both", "parity='both'.*released"),
    (linear_eval.get_config, "probe=mlp", "probe='mlp'.*attentive"),
    (
      linear_eval.get_config,
      "dataset=spc1,augment=published",
      "dataset='spc1'.*as20k, as2m, esc50",
    ),
  ],
)
def test_a_wrong_argument_is_refused_with_the_choices(build, argument, message):
  with pytest.raises(ValueError, match=message):
    build(argument)
