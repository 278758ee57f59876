"""Every experiment builds, says what is wrong, and has the published values."""

import functools
import importlib
import inspect
import math
import pathlib
import re

import jax
import pytest
from absl import flags
from command_line import parse
from ml_collections import ConfigDict

from audiomosaic_jax import (
  augment_fbank,
  augment_waveform,
  experiment,
  features,
  main,
  masking,
  optimizer,
)
from audiomosaic_jax.data import datasets, pipeline
from audiomosaic_jax.models import audiomosaic, heads, vit
from configs import common, evaluate, finetune, pretrain

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "common", "supervised")
)
SWITCHES = (
  *(f"variant={size}" for size in common.VIT_SIZES),
  *(f"mask={mask}" for mask in pretrain.MASKS),
  *(f"augment_level={level}" for level in range(8)),
  "batch_size=512",
  "time_ratio=0.3",
  "freq_ratio=0.7",
  "folder",
  "short,folder",
)
ARGUMENTS = ("", *pretrain.PRESETS, *SWITCHES)

# Written down from the paper and the published configuration, not from here.
PUBLISHED = {
  "batch_size": 6144,
  "duration": {"unit": "epochs", "total": 400, "warmup": 1},
  "data.pipeline.clip_samples": 10 * 16_000,
  "fbank": {
    "sample_rate_hz": 16_000,
    "frame_length_ms": 25,
    "frame_shift_ms": 10,
    "num_mel_bins": 128,
    "low_freq_hz": 20,
    "high_freq_hz": 8_000,
    "preemphasis": 0.97,
  },
  "spectrogram": {"num_frames": 1024, "mean": -4.2677393, "std": 4.5689974},
  "augment_waveform.order": (
    "roll_and_scale",
    "polarity_inversion",
    "time_stretch",
    "gaussian_snr",
    "gain",
    "high_pass",
    "band_stop",
    "pitch_shift",
  ),
  "augment_waveform.roll_and_scale": {"alpha": 10, "beta": 10, "offset": 0.5},
  "augment_waveform.polarity_inversion": {"p": 0.5},
  "augment_waveform.time_stretch": {"p": 0.7, "min_rate": 0.7, "max_rate": 1.3},
  "augment_waveform.gaussian_snr": {
    "p": 0.5,
    "min_snr_db": 5,
    "max_snr_db": 40,
  },
  "augment_waveform.gain": {"p": 0.3, "min_gain_db": -12, "max_gain_db": 12},
  "augment_waveform.high_pass.p": 0.3,
  "augment_waveform.high_pass.min_cutoff_freq": 20,
  "augment_waveform.high_pass.max_cutoff_freq": 2_400,
  "augment_waveform.band_stop.p": 0.5,
  "augment_waveform.band_stop.min_center_freq": 200,
  "augment_waveform.band_stop.max_center_freq": 4_000,
  "augment_waveform.pitch_shift": {
    "p": 0.6,
    "min_semitones": -4,
    "max_semitones": 4,
  },
  "masking.view_time": {"mode": "time", "ratio": 0.6},
  "masking.view_freq": {"mode": "freq", "ratio": 0.4},
  "model.encoder.patch_size": 16,
  "model.encoder.width": 768,
  "model.encoder.depth": 12,
  "model.encoder.num_heads": 12,
  "model.encoder.mlp_ratio": 4,
  "model.encoder.drop_path": 0.1,
  "model.encoder.dtype": "bfloat16",
  "model.projector": {"hidden_features": 512, "out_features": 128},
  "model.pooling": "mean",
  "model.use_fc_norm": True,
  "model.temperature": 0.1,
  "model.learnable_temperature": False,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.eps": 1e-8,
  "optimizer.weight_decay": 0.05,
  "optimizer.layer_decay": 1,
  "schedule.name": "cosine",
  "schedule.base_lr": 6e-4,
  "schedule.min_lr": 1e-6,
}

# By hand: L (12 D^2 + 13 D) of the blocks, 1289 D of patches, class token,
# 513 positions, two norms and the projector's first layer, 66,816 of the rest
# of the projector. The count of "base" is also the published one.
PARAMETERS = {
  "micro": 430_080,
  "tiny": 5_652_672,
  "small": 21_855_360,
  "base": 86_111_232,
  "large": 303_696_128,
  "huge": 631_394_816,
}


def build(name: str, argument: str) -> ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config(argument)


def flatten(tree, prefix: str = "") -> dict[str, object]:
  """Returns dotted name -> value."""
  values = {}
  for name, value in tree.items():
    if hasattr(value, "items"):
      values |= flatten(value, f"{prefix}{name}.")
    else:
      values[prefix + name] = value
  return values


def differences(one: ConfigDict, other: ConfigDict) -> set[str]:
  one, other = flatten(one), flatten(other)
  missing = object()
  return {
    name
    for name in one | other
    if one.get(name, missing) != other.get(name, missing)
  }


def parameters(function) -> set[str]:
  """Returns the arguments of a function, or the fields of a module."""
  names = set(inspect.signature(function).parameters)
  return names - {"parent", "name"} if isinstance(function, type) else names


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds_and_names_a_loop(name):
  config = build(name, "")
  assert config.mode in main.MODES
  assert "compilation_cache" in config.runtime


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_shows_the_command_that_runs_it(name):
  text = importlib.import_module(f"configs.{name}").__doc__
  assert f"--config=configs/{name}.py" in text and "--workdir=" in text


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_preset_and_switch_builds_a_model_and_a_schedule(argument):
  config = pretrain.get_config(argument).lock()
  model = experiment.build_model(config)
  assert model.encoder.grid == experiment.token_grid(config)
  total, warmup = experiment.count_steps(config, num_clips=2_000_000)
  schedule = optimizer.make_schedule(
    **config.schedule, total_steps=total, warmup_steps=warmup
  )
  assert schedule(0) == 0
  assert all(n > 1 for n in experiment.tokens_per_view(config).values())


@pytest.mark.parametrize("preset", pretrain.PRESETS)
def test_switches_win_over_the_preset(preset):
  config = pretrain.get_config(
    f"{preset},variant=tiny,batch_size=64,augment_level=1,folder,queue=128,"
    "loss=sigmoid,mask=time,time_ratio=0.25"
  )
  assert config.model.encoder.width == 192
  assert config.batch_size == 64
  assert config.augment_waveform.order == (
    "roll_and_scale",
    "polarity_inversion",
  )
  assert config.data.source.name == "folder"
  assert config.loss.queue.size == 128
  assert config.loss.name == "sigmoid"
  assert config.masking.view_freq.to_dict() == {"mode": "time", "ratio": 0.25}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configs_hold_plain_values_only(name):
  for argument in ARGUMENTS if name == "pretrain" else ("",):
    for field, value in flatten(build(name, argument)).items():
      values = value if isinstance(value, tuple) else (value,)
      plain = (bool, int, float, str, type(None))
      assert all(isinstance(v, plain) for v in values), field


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_can_be_set_on_the_command_line(name):
  config = build(name, "")
  words = [f"--config=configs/{name}.py"]
  some = {int: "1", float: "0.5", bool: "True", str: "x", tuple: "(1,)"}
  for field, value in flatten(config).items():
    if value is None:
      *path, last = field.split(".")
      block = functools.reduce(lambda tree, name: tree[name], path, config)
      value = some[block.get_type(last)]
    words.append(f"--config.{field}={value}")
  parsed = parse(*words)
  nothing = {f for f, v in flatten(config).items() if v is None}
  assert differences(parsed, config) == nothing


def test_a_mistyped_field_is_an_error_that_names_it():
  with pytest.raises(AttributeError, match="save_evry"):
    parse("--config=configs/pretrain.py", "--config.checkpoint.save_evry=1")


def test_a_value_of_another_type_is_an_error_that_names_the_field():
  with pytest.raises(flags.IllegalFlagValueError, match="batch_size"):
    parse("--config=configs/pretrain.py", "--config.batch_size=many")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("papr", "preset='papr'.*paper, demo, smoke, short, released"),
    ("varient=base", "unknown argument 'varient'.*variant"),
    ("variant=giant", "variant='giant'.*micro, tiny, small, base, large, huge"),
    ("mask=diagonal", "mask='diagonal'.*time_freq, time, freq, random"),
    ("batch_size=many", "batch_size='many' is not a int"),
    ("time_ratio=most", "time_ratio='most' is not a float"),
    ("augment_level=8", "augment_level=8; choose 0 to 7"),
    ("augment_level=-1", "augment_level=-1; choose 0 to 7"),
    ("demo,released", "preset is given twice .*: demo and released"),
    ("queue=1,queue=2", "queue is given twice .*: queue=1 and queue=2"),
    ("folder=False", "folder is a word without a value"),
  ],
)
def test_a_wrong_argument_is_refused_with_the_choices(argument, message):
  with pytest.raises(ValueError, match=message):
    pretrain.get_config(argument)


def test_evaluation_refuses_an_unknown_argument():
  with pytest.raises(ValueError, match=r"unknown argument 'task'.*tasks"):
    evaluate.get_config("task=demo")


def test_evaluation_takes_a_folder_and_leaves_the_protocol_to_the_run():
  config = evaluate.get_config("tasks=some/folder")
  assert config.tasks == ("some/folder",)
  assert set(config) == {"mode", "tasks", "classifier", "runtime"}


@pytest.mark.parametrize(
  ("argument", "name", "splits"),
  [
    ("", None, ()),
    ("dataset=task", "task", ("test",)),
    ("dataset=envsdd_ata", "envsdd", tuple(f"test0{i}" for i in range(1, 5))),
    ("dataset=esc50", "esc50", tuple(f"fold{i}" for i in range(1, 6))),
  ],
)
def test_evaluation_names_other_clips_to_test_on(argument, name, splits):
  classifier = evaluate.get_config(argument).classifier
  assert classifier.source.get("name") == name
  assert classifier.splits == splits


@pytest.mark.parametrize("field", PUBLISHED)
def test_the_default_has_the_published_values(field):
  value = pretrain.get_config()
  for name in field.split("."):
    value = value[name]
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  assert value == PUBLISHED[field]


def test_released_differs_in_masks_and_position_table_only():
  paper, released = pretrain.get_config(), pretrain.get_config("released")
  fields = {"masking.layout", "model.encoder.pos_layout"}
  assert differences(paper, released) == fields
  assert {flatten(released)[field] for field in fields} == {"released"}
  assert {flatten(paper)[field] for field in fields} == {"paper"}


@pytest.mark.parametrize("level", range(8))
def test_augment_level_counts_the_augmentations_after_the_roll(level):
  config = pretrain.get_config(f"augment_level={level}")
  order = config.augment_waveform.order
  assert order == PUBLISHED["augment_waveform.order"][: level + 1]
  changed = differences(pretrain.get_config(), config)
  assert changed == ({"augment_waveform.order"} if level < 7 else set())


@pytest.mark.parametrize(
  ("mask", "modes", "ratios"),
  [
    ("time_freq", ("time", "freq"), (0.7, 0.2)),
    ("time", ("time", "time"), (0.7, 0.7)),
    ("freq", ("freq", "freq"), (0.2, 0.2)),
    ("random", ("random", "random"), (0.45, 0.45)),
  ],
)
def test_a_mask_takes_the_ratio_of_its_axis(mask, modes, ratios):
  config = pretrain.get_config(f"mask={mask},time_ratio=0.7,freq_ratio=0.2")
  views = config.masking.view_time, config.masking.view_freq
  assert tuple(view.mode for view in views) == modes
  assert tuple(view.ratio for view in views) == pytest.approx(ratios)


@pytest.mark.parametrize("size", common.VIT_SIZES)
def test_every_size_has_its_number_of_parameters(size):
  config = pretrain.get_config(f"variant={size}")
  model = experiment.build_model(config)
  shapes = jax.eval_shape(
    lambda key: experiment.init_variables(model, config, key),
    jax.random.key(0),
  )
  leaves = jax.tree.leaves(shapes["params"])
  assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[size]


@pytest.mark.parametrize(
  ("block", "accepted", "given_elsewhere"),
  [
    ("fbank", parameters(features.log_mel_fbank), {"waveform"}),
    ("spectrogram", parameters(features.standardize), {"fbank"}),
    (
      "masking.view_time",
      parameters(masking.keep_ids),
      {"key", "batch_size", "grid", "layout"},
    ),
    ("model.encoder", parameters(vit.ViT), {"grid"}),
    ("model.projector", parameters(heads.Projector), set()),
    ("model", parameters(audiomosaic.AudioMosaic), set()),
    (
      "optimizer",
      parameters(optimizer.make_optimizer),
      {"params", "schedule"},
    ),
    (
      "schedule",
      parameters(optimizer.make_schedule),
      {"total_steps", "warmup_steps"},
    ),
    ("data.guard", parameters(datasets.guard), {"source", "report_path"}),
    (
      "data.pipeline",
      parameters(pipeline.train_iterator),
      {
        *("source", "seed", "batch_size", "weights"),
        *("process_index", "process_count"),
      },
    ),
    ("data.source", parameters(datasets.tfds) | {"name"}, {"sample_rate_hz"}),
  ],
)
def test_a_block_is_exactly_the_arguments_of_its_function(
  block, accepted, given_elsewhere
):
  values = pretrain.get_config()
  for name in block.split("."):
    values = values[name]
  assert set(values) == accepted - given_elsewhere


@pytest.mark.parametrize(
  "settings, table, given",
  [
    (
      common.augment_waveform(7),
      augment_waveform.AUGMENTATIONS,
      {"key", "waveform", "sample_rate_hz"},
    ),
    (
      common.augment_fbank().to_dict()
      | finetune.get_config("dataset=esc50").augment_fbank.to_dict()
      | finetune.get_config("dataset=esc50").augment_input.to_dict(),
      augment_fbank.AUGMENTATIONS,
      {"key", "fbank", "low_freq_hz", "high_freq_hz"},
    ),
  ],
  ids=["waveform", "fbank"],
)
def test_an_augment_block_has_the_settings_of_every_augmentation(
  settings, table, given
):
  assert set(settings) - {"order"} == set(table)
  for name, function in table.items():
    assert set(settings[name]) == parameters(function) - given


def test_the_presets_of_the_docstring_are_all_presets():
  named = set(re.findall(r"configs/pretrain\.py:(\w+)(?=\s)", pretrain.__doc__))
  assert named == set(pretrain.PRESETS) - {"paper"}
