"""Runs the job that a config file describes.

  python -m audiomosaic_jax.main --config=configs/pretrain.py:demo \
    --workdir=runs/demo

Any field can be overridden: `--config.optimizer.weight_decay=0.01`. A run that
was interrupted continues when the same command is given again.
"""

import importlib
import pathlib
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from audiomosaic_jax import cluster, heap

MODES = {
  "pretrain": "audiomosaic_jax.pretrain",
  "evaluate": "audiomosaic_jax.evaluate",
  "finetune": "audiomosaic_jax.finetune",
  "instruct": "audiomosaic_jax.instruct",
}

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a file in configs/, with :arguments.",
  lock_config=True,
)  # fmt: skip
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where checkpoints, metrics and reports are written."
)
STOPPED_STATUS = flags.DEFINE_integer(
  "stopped_status",
  0,
  "Exit status of a job that a SIGTERM stopped before its end, everything "
  "saved. A launcher that is to start it again tells it from a finished one.",
  lower_bound=0,
  upper_bound=255,
)


def main(argv: list[str]) -> None:
  """Joins the cluster if there is one, then hands over to the mode's loop."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
  if config.mode not in MODES:
    raise app.UsageError(
      f"config.mode is {config.mode!r}; choose one of {', '.join(MODES)}"
    )
  logging.set_verbosity(logging.WARNING)
  if config.runtime.keep_freed_memory:
    heap.keep_freed_memory()
  cluster.initialize_distributed()
  use_compilation_cache(config.runtime.compilation_cache, workdir)
  mode = importlib.import_module(MODES[config.mode])
  trace = workdir / "error.txt"
  with cluster.ends_alone():
    try:
      finished = mode.run(config, workdir)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
      # What a person can mend is told in one message, the rest is in a file.
      workdir.mkdir(parents=True, exist_ok=True)
      # One process fails, and then the others because of it: all are kept.
      with trace.open("a" if jax.distributed.is_initialized() else "w") as file:
        file.write(traceback.format_exc())
      cluster.end(f"error: {error}\n(traceback: {trace})")
  if jax.process_index() == 0:
    trace.unlink(missing_ok=True)  # Of a run that has got over it.
  if not finished:
    raise SystemExit(STOPPED_STATUS.value)


def use_compilation_cache(setting: str, workdir: pathlib.Path) -> None:
  """Keeps compiled programs on disk, so that a restart starts at once.

  Args:
    setting: a folder, "workdir" for one in the workdir, "" for none.
    workdir: the run's folder.
  """
  if not setting:
    return
  folder = workdir / "compiled" if setting == "workdir" else setting
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
