"""Probes the encoders of a finished pretraining run on labelled tasks.

  python -m audiomosaic_jax.main --config=configs/evaluate.py:tasks=FOLDER \
    --workdir=runs/demo

FOLDER holds a labels.csv (columns path, label, split) or folders that do;
without it, the packaged instrument notes. Every table compares the encoder
with log-mel statistics and with the same encoder before training.
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; `argument` is the text after the colon."""
  args = common.parse_arguments(argument, tasks="demo")
  probe = common.probe(task="", eval_every=0)
  return ml_collections.ConfigDict(
    {
      "mode": "evaluate",
      "tasks": (args.tasks,),
      "probe": {
        name: probe[name]
        for name in ("batch_size", "max_windows", "knn_neighbours", "linear_c")
      },
      "runtime": common.runtime(),
    }
  )
