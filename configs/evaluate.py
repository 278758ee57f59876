"""Evaluates what is in a workdir: pretrained encoders, or classifiers.

Encoders of a pretraining run, probed on labelled tasks:

  python -m audiomosaic_jax.main --config=configs/evaluate.py:tasks=FOLDER \
    --workdir=runs/demo

FOLDER holds a labels.csv (columns path, label, split) or folders that do;
without it, the packaged instrument notes. Every table compares the encoder
with log-mel statistics and with the same encoder before training. How clips
are cut and probed follows the config of the run.

Classifiers that configs/finetune.py or configs/linear_eval.py trained, tested
again with noise, reverberation, codecs and resampling:

  python -m audiomosaic_jax.main --config=configs/evaluate.py \
    --workdir=runs/probe

or on other clips with the same classes, data sets as in configs/finetune.py:

  python -m audiomosaic_jax.main --config=configs/evaluate.py:dataset=task \
    --workdir=runs/probe --config.classifier.source.data_dir=DIR
"""

import ml_collections
from ml_collections import config_dict

from configs import common, finetune, supervised

ConfigDict = ml_collections.ConfigDict


def get_config(argument: str = "") -> ConfigDict:
  """Returns the experiment; `argument` is the text after the colon."""
  args = common.parse_arguments(argument, tasks="demo", dataset="")
  return ConfigDict(
    {
      "mode": "evaluate",
      # Of a pretraining run.
      "tasks": (args.tasks,),
      # Of classifiers.
      "classifier": {
        # Of the files in WORKDIR/evaluations.
        "name": args.dataset or "test",
        **clips(args.dataset),
        # Windows per clip; None is as many as the run was tested with.
        "max_windows": config_dict.placeholder(int),
        "seed": 0,
        # Arguments of data.degrade.degradations, except the sample rate.
        "degradations": {
          "noise_snr_db": (20.0, 10.0, 0.0),
          "room_t60_s": (0.3, 1.0),
          # Audio files.
          "impulse_responses": (),
          "codecs": ("mp3", "opus"),
          "codec_compression": 0.9,
          "resample_hz": (8_000,),
        },
      },
      "runtime": common.runtime(),
    }
  )


def clips(dataset: str) -> dict:
  """Returns arguments of datasets.make_dataset, and splits; {} is the run's."""
  if not dataset:
    return {"source": ConfigDict(), "splits": ()}
  common.choose("dataset", dataset, finetune.DATASETS)
  config = supervised.base("")
  finetune.DATASET_SETTINGS[dataset](config)
  splits = tuple(config.data.splits.test)
  if config.folds > 1:
    splits = tuple(f"fold{i + 1}" for i in range(config.folds))
  return {"source": config.data.source, "splits": splits}
