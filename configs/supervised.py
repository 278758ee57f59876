"""Blocks of supervised experiments: fine-tuning and probes share them.

A value of None is taken from the pretraining run of `init.run` or, without
one, from `fallback`.
"""

import ml_collections
from ml_collections import config_dict

from configs import common

ConfigDict = ml_collections.ConfigDict

PARITIES = ("paper", "released")
HEADS = ("linear", "layer", "weighted_sum", "attentive", "prototype", "aasist")

# Fields of the encoder that follow from the run it was pretrained in.
OF_THE_RUN = (
  *("patch_size", "width", "depth", "num_heads", "mlp_ratio", "norm"),
  *("activation", "qk_norm", "qkv_bias", "proj_bias", "pos_embed"),
  *("pos_layout", "class_token", "final_norm"),
)


def base(variant: str) -> ConfigDict:
  """What all data sets share: a linear head on the mean of the tokens."""
  return ConfigDict(
    {
      "mode": "finetune",
      "name": "",
      "seed": 0,
      # Repeat with seed, seed + 1, ... and on every fold.
      "num_seeds": 1,
      "folds": 1,
      # With head "layer": which to probe, one after the other; () is all.
      "layers": (),
      "batch_size": 64,
      "duration": {"unit": "epochs", "total": 60.0, "warmup": 4.0},
      "data": {
        # Arguments of data.datasets.make_dataset, except the split.
        "source": {},
        # Arguments of data.supervised.load_splits.
        "splits": {
          "train": "train",
          "valid": "",
          "test": ("test",),
          "valid_fraction": 0.0,
          "test_fraction": 0.0,
        },
        # Draw rare classes as often as common ones, so many clips an epoch,
        # none of them twice; 0 is as many as there are, some of them twice.
        "sampling": {"balanced": False, "epoch_clips": 0},
        "guard": {"max_bad_fraction": 0.05, "cache_bytes": 0},
        # Arguments of data.pipeline.train_iterator.
        "pipeline": {
          "clip_samples": 160_000,
          "crop": "start",
          "pad": "pad",
          "num_threads": 16,
          "prefetch_size": 2,
          "num_workers": 0,
        },
      },
      "fbank": nothing(common.fbank()),
      "spectrogram": dict(common.AUDIOSET),
      # Every clip is rolled and scaled, then mixed, masked as a spectrogram,
      # standardised, and changed once more as the encoder's input.
      "augment_waveform": {
        "order": ("roll_and_scale",),
        "roll_and_scale": {"alpha": 10.0, "beta": 10.0, "offset": 0.5},
      },
      "mixup": {"p": 0.8, "alpha": 10.0, "beta": 10.0},
      "augment_fbank": {
        "order": ("frequency_mask", "time_mask"),
        "frequency_mask": {"max_width": 48},
        "time_mask": {"max_width": 192},
      },
      "augment_input": {
        "order": (),
        "uniform_noise": {"max_scale": 0.1},
        "roll_frames": {"max_shift": 10},
      },
      # Arguments of masking.keep_ids: tokens the encoder does not see.
      "masking": {
        "layout": "paper",
        "mode": "time_freq",
        "ratio": (0.2, 0.2),
      },
      "init": {
        # Workdir of a pretraining run, or "" for a random encoder.
        "run": "",
        # Filled in: the states of the run's seeds, so that results of others
        # are not taken for theirs.
        "states": (),
        # Start from the norm that pretraining has after its pooling, too.
        "fc_norm": True,
        # How positions are fitted to clips of another length: arguments of
        # models.positions.resize_positions. "crop" is a method.
        "positions": {"layout": "paper", "method": "bilinear"},
      },
      # Arguments of models.heads.build, except the grid and the classes.
      "model": {
        "head": "linear",
        "encoder": encoder(variant),
        "pooling": "mean",
        "freeze_encoder": False,
      },
      "loss": {
        "name": "sigmoid",
        # Of each class; or "balance": "inverse" to its training clips.
        "class_weights": (),
        "balance": "none",
        "label_smoothing": 0.0,
      },
      # Arguments of optimizer.make_optimizer, except the schedule.
      "optimizer": {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "layer_decay": 0.75,
        "frozen": (),
        "grad_clip_norm": config_dict.placeholder(float),
      },
      # Arguments of optimizer.make_schedule, except the steps.
      "schedule": {
        "name": "cosine",
        "base_lr": 5e-4,
        "min_lr": 1e-6,
        "milestones": config_dict.placeholder(tuple),
        "milestone_factor": config_dict.placeholder(float),
      },
      # Votes of the k nearest training clips instead of training; 0 trains.
      "knn": {"k": 0, "temperature": 0.07},
      "evaluation": {
        # The first one selects.
        "metrics": ("accuracy",),
        "batch_size": 128,
        # Longer clips are cut to windows whose logits are averaged.
        "max_windows": 1,
        # Which step is reported: the "last", or the best on the "valid" or,
        # as published, on the "test" clips.
        "selection": "last",
        "eval_every_epochs": 1.0,
        # Stop after so many evaluations without a better one; 0 never does.
        "patience": 0,
        "num_resamples": 1000,
        "confidence": 0.95,
      },
      "checkpoint": {"save_every": 1000, "keep_last": 1, "keep_every": 0},
      # Features of a frozen encoder, if nothing is augmented: kept in this
      # folder ("" is one in the workdir) up to so many bytes.
      "cache": {"folder": "", "limit_bytes": 8 * 2**30},
      # Rows to beat: the same with a "random" encoder, and the statistics of
      # "log_mel" frames.
      "baselines": (),
      # What others report for the first metric, in percent.
      "published": (),
      "fallback": fallback(variant or "base"),
      "log_every": 50,
      "runtime": common.runtime(),
    }
  )


def nothing(block: ConfigDict) -> ConfigDict:
  """Returns the block without values, to be filled in from the run."""
  return ConfigDict(
    {
      name: config_dict.placeholder(type(value))
      for name, value in block.items()
    }
  )


def encoder(variant: str) -> ConfigDict:
  """Arguments of models.vit.ViT; of the run's size, or of a given one."""
  block = common.vit(variant or "base")
  if not variant:
    empty = nothing(ConfigDict({name: block[name] for name in OF_THE_RUN}))
    block = ConfigDict(
      {**block, **dict(empty.items(preserve_field_references=True))}
    )
  return block


def fallback(variant: str) -> ConfigDict:
  """What fields that are None become when there is no pretraining run."""
  vit = common.vit(variant)
  return ConfigDict(
    {
      "fbank": common.fbank(),
      "spectrogram": dict(common.AUDIOSET),
      "data": {"pipeline": {"clip_samples": 160_000, "pad": "pad"}},
      "model": {"encoder": {name: vit[name] for name in OF_THE_RUN}},
    }
  )


def set_head(config: ConfigDict, head: str) -> None:
  """Sets the arguments of one of models.heads.HEADS."""
  shared = {name: config.model[name] for name in ("encoder", "freeze_encoder")}
  layers = {"pooling": "mean", "parity": "paper"}
  own = {
    "linear": {"pooling": "mean"},
    "layer": {"pooling": "mean", "layer": 0},
    "weighted_sum": layers,
    "attentive": {**layers, "num_queries": 1},
    "prototype": {"num_prototypes": 20},
    # The values of the published back end.
    "aasist": {
      "width": 128,
      "filters": (32, 32, 64, 64, 64, 64),
      "graph_width": 64,
      "branch_width": 32,
      "pool_ratio": 0.5,
      "temperatures": (2.0, 2.0, 100.0),
      "input_dropout": 0.2,
      "pool_dropout": 0.3,
      "branch_dropout": 0.2,
      "readout_dropout": 0.5,
    },
  }[head]
  config.model = ConfigDict({"head": head, **shared, **own})


def released(config: ConfigDict) -> None:
  """The published code: its position grid, its layers, its choice of epoch."""
  config.init.positions.layout = "released"
  config.evaluation.selection = "test"
  config.data.splits.valid_fraction = 0.0
  config.evaluation.patience = 0
  if "parity" in config.model:
    config.model.parity = "released"
  if config.model.head == "aasist":
    # All tokens, in random order.
    config.masking.update(mode="time_freq", ratio=(0.0, 0.0))


def own_clips(config: ConfigDict) -> None:
  """A few hundred clips on any machine; nothing published says how.

  Of the published augmentations only roll and gain are left: with the rest a
  few hundred steps teach the head less than a probe of the frozen encoder
  knows (on the packaged notes, validation accuracy 0.77 against 0.93).
  """
  pipeline = common.ConfigDict(config.data.pipeline)
  pipeline.update(crop="random", num_threads=2, prefetch_size=8)
  config.data.pipeline = ConfigDict(
    {
      **pipeline,
      "clip_samples": config_dict.placeholder(int),
      "pad": config_dict.placeholder(str),
    }
  )
  config.data.guard.cache_bytes = 2**30
  config.spectrogram = nothing(ConfigDict(dict(common.AUDIOSET)))
  config.augment_fbank.order = ()
  config.mixup.p = 0.0
  config.masking.mode = "none"
  config.loss.name = "softmax"
  config.batch_size = 32
  config.duration.update(total=60.0, warmup=2.0)
  config.schedule.base_lr = 1e-3
  config.evaluation.update(
    metrics=("balanced_accuracy", "accuracy"), selection="valid"
  )
  config.baselines = ("random", "log_mel")
  if config.model.encoder.width is None:
    small = fallback("micro")
    small.spectrogram.num_frames = 128
    small.data.pipeline.update(clip_samples=20_720, pad="repeat")
    config.fallback = small
  # Recomputing is faster than memory traffic on a CPU, and so is float32.
  config.model.encoder.update(dtype="float32", remat="none")
