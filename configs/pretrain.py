"""Contrastive pretraining, with the published values.

  python -m audiomosaic_jax.main --config=configs/pretrain.py \
    --workdir=runs/pretrain --config.data.source.data_dir=AUDIOSET_DIR

Presets:   configs/pretrain.py:demo      packaged audio, CPU, minutes
           configs/pretrain.py:smoke     two steps of everything
           configs/pretrain.py:short     the demo's recipe on audio of yours,
                                         for calls, notes and words of a second
           configs/pretrain.py:released  the published code's masks and table
Switches:  configs/pretrain.py:short,variant=small,batch_size=1024
           folder                            audio files as they are, of
                                             --config.data.source.data_dir=DIR
           mask=time_freq|time|freq|random   what each view loses
           time_ratio=0.6 freq_ratio=0.4     how much of it
           augment_level=0..7                how many augmentations
           loss=nt_xent|sigmoid              what compares the views
           queue=4096                        negatives kept from earlier steps
"""

import math

import ml_collections
from ml_collections import config_dict

from configs import common

PRESETS = ("paper", "demo", "smoke", "short", "released")

# How the first and the second view are masked.
MASKS = {
  "time_freq": ("time", "freq"),
  "time": ("time", "time"),
  "freq": ("freq", "freq"),
  "random": ("random", "random"),
}

LOSSES = ("nt_xent", "sigmoid")


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; `argument` is the text after the colon."""
  args = common.parse_arguments(
    argument,
    preset="paper",
    folder=False,
    variant="base",
    batch_size=6144,
    mask="time_freq",
    time_ratio=0.6,
    freq_ratio=0.4,
    augment_level=7,
    loss="nt_xent",
    queue=0,
  )
  common.choose("preset", args.preset, PRESETS)
  config = paper(args)
  if args.preset == "released":
    released(config)
  if args.preset in ("demo", "smoke", "short"):
    short(config, args.given)
  if args.preset in ("demo", "smoke"):
    demo(config, args.given)
  if args.preset == "smoke":
    smoke(config, args.given)
  if args.folder:
    folder(config)
  if common.choose("loss", args.loss, LOSSES) == "sigmoid":
    sigmoid(config)
  return config


def paper(args: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The published run: AudioSet, ViT-B/16, 400 epochs of batch 6144."""
  common.choose("mask", args.mask, MASKS)
  first, second = MASKS[args.mask]
  ratios = {"time": args.time_ratio, "freq": args.freq_ratio}
  ratios["random"] = (args.time_ratio + args.freq_ratio) / 2
  return ml_collections.ConfigDict(
    {
      "mode": "pretrain",
      "seed": 0,
      # Repeat with seed, seed + 1, ...; the report then shows the spread.
      "num_seeds": 1,
      "batch_size": args.batch_size,
      # Clips that a device encodes at a time, to save memory; 0 is all it has.
      "micro_batch_size": 0,
      # Split parameters and optimiser state over the devices: for a ViT-L.
      "split_state": False,
      # Neighbouring devices that share one encoder, its heads and hidden
      # channels: for a ViT-H. 1 is an encoder per device.
      "tensor_devices": 1,
      # `total` and `warmup` count "epochs" or "steps".
      "duration": {"unit": "epochs", "total": 400.0, "warmup": 1.0},
      "data": {
        # Arguments of data.datasets.make_dataset.
        "source": {
          "name": "tfds",
          "split": "train",
          "data_dir": "~/tensorflow_datasets/audioset",
        },
        # Bad clips are replaced and listed; above this share the run stops.
        # Decoded clips are kept in memory up to cache_bytes; 0 keeps none.
        "guard": {"max_bad_fraction": 0.05, "cache_bytes": 0},
        # Arguments of data.pipeline.train_iterator.
        "pipeline": {
          "clip_samples": 160_000,
          "crop": "random",
          "pad": "pad",
          "num_threads": 16,
          "prefetch_size": 2,
          "num_workers": 0,
        },
      },
      "fbank": common.fbank(),
      "spectrogram": common.AUDIOSET,
      "augment_waveform": common.augment_waveform(args.augment_level),
      "augment_fbank": common.augment_fbank(),
      "masking": {
        "layout": "paper",
        "view_time": {"mode": first, "ratio": ratios[first]},
        "view_freq": {"mode": second, "ratio": ratios[second]},
      },
      # Arguments of models.audiomosaic.build, except the grid.
      "model": {
        "encoder": common.vit(args.variant),
        "projector": {"hidden_features": 512, "out_features": 128},
        "pooling": "mean",
        "use_fc_norm": True,
        "temperature": 0.1,
        "logit_bias": 0.0,
        "learnable_temperature": False,
        "learnable_bias": False,
        "num_online_classes": 0,
      },
      "loss": {
        # A key of losses.CONTRASTIVE.
        "name": "nt_xent",
        # The matrix of logits is held whole below so many candidates (two per
        # clip, and the queue), else block by block.
        "dense_below": 8192,
        "block_size": 2048,
        # Arguments of memory_queue.create; size 0 is no queue.
        "queue": {"size": args.queue, "momentum": 0.999},
      },
      "optimizer": common.adamw(),
      # Arguments of optimizer.make_schedule, except the steps.
      "schedule": {
        "name": "cosine",
        "base_lr": 6e-4,
        "min_lr": 1e-6,
        "milestones": config_dict.placeholder(tuple),
        "milestone_factor": config_dict.placeholder(float),
      },
      "checkpoint": {"save_every": 1000, "keep_last": 3, "keep_every": 20_000},
      # Non-finite losses roll back to the last checkpoint this many times.
      "max_rollbacks": 3,
      "log_every": 50,
      # Probe on labelled clips while training; task "" turns it off.
      "probe": common.probe(task="", eval_every=5000),
      "report": True,
      "runtime": common.runtime(),
    }
  )


def released(config: ml_collections.ConfigDict) -> None:
  """The published code: tokens read as an (8, 64) grid, see masking.py."""
  config.masking.layout = "released"
  config.model.encoder.pos_layout = "released"


def sigmoid(config: ml_collections.ConfigDict) -> None:
  """Classifies pairs one by one, starting with all of them negative."""
  config.loss.name = "sigmoid"
  config.model.learnable_temperature = True
  config.model.learnable_bias = True
  config.model.logit_bias = -math.log(2 * config.batch_size)


def folder(config: ml_collections.ConfigDict) -> None:
  """Reads audio files as they are; pack them first if there are many."""
  config.data.source = ml_collections.ConfigDict(
    {
      "name": "folder",
      "split": config_dict.placeholder(str),
      "data_dir": "",
      "class_names": config_dict.placeholder(tuple),
    }
  )


def short(config: ml_collections.ConfigDict, given: tuple[str, ...]) -> None:
  """Clips of 1.28 seconds; shorter ones are repeated.

  What differs from the paper, and why: with minutes of audio and of training
  the published seven augmentations leave too little to agree on. A wide shift
  of pitch and tempo makes the same instrument at another pitch a positive, and
  on spectrograms it costs next to nothing on a CPU; another level makes the
  same note from another library one. What was tried is in docs/demo.md.
  """
  config.data.guard.cache_bytes = 2**30
  config.data.pipeline.update(clip_samples=20_720, pad="repeat")
  config.spectrogram.num_frames = 128
  if "augment_level" not in given:
    config.augment_waveform.order = ("roll_and_scale", "gain")
    config.augment_waveform.gain.p = 1.0
  config.augment_fbank.order = ("pitch_and_tempo",)
  config.model.encoder.drop_path = 0.0
  # The first window of a note holds its onset.
  config.probe.max_windows = 1


def demo(config: ml_collections.ConfigDict, given: tuple[str, ...]) -> None:
  """Packaged real audio and a small encoder on two CPU cores.

  One block instead of two and batches of 32 buy more steps.
  """
  if "variant" not in given:
    config.model.encoder.update(common.VIT_SIZES["micro"])
  if "batch_size" not in given:
    config.batch_size = 32
  config.num_seeds = 3
  config.duration = {"unit": "steps", "total": 2600.0, "warmup": 60.0}
  config.data.source = ml_collections.ConfigDict(
    {"name": "demo", "split": "pretrain"}
  )
  config.data.pipeline.update(num_threads=2, prefetch_size=8)
  config.model.encoder.update(remat="none", dtype="float32")
  config.model.projector.hidden_features = 256
  config.schedule.base_lr = 2e-3
  config.checkpoint = {"save_every": 200, "keep_last": 2, "keep_every": 0}
  config.log_every = 20
  config.runtime.keep_freed_memory = True
  config.probe.update(task="demo", eval_every=520)


def smoke(config: ml_collections.ConfigDict, given: tuple[str, ...]) -> None:
  """Every part of the job in two steps, to see that a machine works."""
  config.num_seeds = 1
  if "batch_size" not in given:
    config.batch_size = 16
  config.duration = {"unit": "steps", "total": 2.0, "warmup": 1.0}
  config.checkpoint.save_every = 1
  config.log_every = 1
  config.probe.eval_every = 2
