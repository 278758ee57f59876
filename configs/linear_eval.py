"""Probes of a frozen encoder: what it knows, without changing it.

  python -m audiomosaic_jax.main \
    --config=configs/linear_eval.py:dataset=task,probe=linear \
    --workdir=runs/probe --config.init.run=runs/demo

Data sets: those of configs/finetune.py
Probes:    linear layer weighted_sum attentive prototype knn
           (layer probes every block, one after the other)
Switches:  augment=none       features of every clip are computed once, then a
                              probe trains in seconds
           augment=published  as published for as20k, as2m and esc50: clips are
                              augmented and the encoder runs in every epoch
           parity=released, variant=, batch_size= as in configs/finetune.py

Published linear numbers depend on the protocol above all: of one encoder,
BEATs, three groups report 72.7, 86.5 and 86.9 on ESC-50.
"""

import ml_collections

from configs import common, finetune, supervised

ConfigDict = ml_collections.ConfigDict

PROBES = (*supervised.HEADS[:-1], "knn")
AUGMENT = ("none", "published")
WITH_PUBLISHED_PROBE = ("as20k", "as2m", "esc50")

# What others report for a linear probe, in percent.
PUBLISHED = {
  "as20k": (
    *("AudioMosaic: 29.4", "AudioMosaic, layer 10: 30.2"),
    *("AudioMosaic, attentive: 33.55", "Audio-MAE: 18.3", "SSLAM: 15.0"),
    *("EAT: 12.5", "BEATs: 8.2"),
  ),
  "as2m": (
    *("AudioMosaic: 28.7", "Audio-MAE: 20.5", "SSLAM: 19.5"),
    *("EAT: 18.4", "BEATs: 12.2"),
  ),
  "esc50": (
    *("AudioMosaic: 93.0", "SSLAM: 87.1", "Audio-MAE: 86.9"),
    *("EAT: 83.5", "BEATs: 72.7"),
  ),
}


def get_config(argument: str = "") -> ConfigDict:
  """Returns the experiment; `argument` is the text after the colon."""
  args = common.parse_arguments(
    argument,
    dataset="task",
    probe="linear",
    augment="none",
    variant="",
    batch_size=0,
    parity="paper",
  )
  common.choose("dataset", args.dataset, finetune.DATASETS)
  common.choose("probe", args.probe, PROBES)
  common.choose("augment", args.augment, AUGMENT)
  common.choose("parity", args.parity, supervised.PARITIES)
  if args.augment == "published":
    common.choose("dataset", args.dataset, WITH_PUBLISHED_PROBE)
  config = supervised.base(args.variant)
  finetune.DATASET_SETTINGS[args.dataset](config)
  train_a_probe(config, args.dataset, args.probe)
  if args.batch_size:
    config.schedule.base_lr *= args.batch_size / config.batch_size
    config.batch_size = args.batch_size
  config.model.freeze_encoder = True
  config.optimizer.frozen = ("encoder/.*",)
  supervised.set_head(config, "linear" if args.probe == "knn" else args.probe)
  if args.augment == "none":
    augment_nothing(config)
  if args.parity == "released":
    supervised.released(config)
  if args.probe == "knn":
    config.knn.k = 10
    config.evaluation.selection = "last"
  config.name += f", {args.probe} probe of a frozen encoder"
  config.published = PUBLISHED.get(args.dataset, ())
  return config


def augment_nothing(config: ConfigDict) -> None:
  """The head sees the same of every clip in every epoch."""
  for block in ("augment_waveform", "augment_fbank", "augment_input"):
    config[block].order = ()
  config.mixup.p = 0.0
  config.masking.mode = "none"
  config.data.pipeline.crop = "start"
  # Nothing is decoded while the head trains, so draws would save nothing.
  config.data.sampling.balanced = False


def train_a_probe(config: ConfigDict, dataset: str, probe: str) -> None:
  """The published settings where there are any.

  Differs from upstream: probes of several layers decay no bias and no norm.
  """
  config.optimizer.update(weight_decay=0.0, layer_decay=1.0)
  # It takes seconds, and the last epochs of the schedule are the best.
  config.evaluation.patience = 0
  if dataset in ("as20k", "as2m") and probe not in ("linear", "knn"):
    config.optimizer.weight_decay = 0.01
    config.batch_size = 64
    config.schedule.base_lr = 5e-4 * 64 / 256
    config.duration.update(total=60.0, warmup=4.0)
  elif dataset == "as20k":
    config.batch_size = 16
    config.schedule.base_lr = 1e-3 * 16 / 256
  elif dataset == "as2m":
    config.batch_size = 16
    config.schedule.base_lr = 0.1 * 16 / 256
    config.duration.update(total=20.0, warmup=10.0)
  elif dataset == "esc50":
    config.batch_size = 32
    config.schedule.base_lr = 0.1 * 32 / 256
  else:
    config.batch_size = 64
    config.schedule.base_lr = 1e-2
    config.duration.update(total=100.0, warmup=5.0)
    config.evaluation.eval_every_epochs = 5.0
