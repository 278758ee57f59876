"""Probes the encoders of a finished pretraining run on labelled tasks.

  python -m audiomosaic_jax.main --config=configs/evaluate.py:tasks=FOLDER \
    --workdir=runs/demo

FOLDER holds a labels.csv (columns path, label, split) or folders that do;
without it, the packaged instrument notes. Every table compares the encoder
with log-mel statistics and with the same encoder before training. How clips
are cut and probed follows the config of the run.
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; `argument` is the text after the colon."""
  args = common.parse_arguments(argument, tasks="demo")
  return ml_collections.ConfigDict(
    {
      "mode": "evaluate",
      "tasks": (args.tasks,),
      "runtime": common.runtime(),
    }
  )
