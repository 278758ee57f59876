"""Evaluates what a workdir holds: pretrained encoders, or classifiers."""

import os
import pathlib
from collections.abc import Sequence

import ml_collections

from audiomosaic_jax import encoder_probe, experiment, results, robustness

ConfigDict = ml_collections.ConfigDict


def run(config: ConfigDict, workdir: pathlib.Path) -> bool:
  """Evaluates the encoders or the classifiers in a workdir.

  Of a pretraining run it prints the table of `encoder_probe.compare` for every
  task of the config; classifiers are tested again, see `robustness.run`.

  Args:
    config: of `configs/evaluate.py`; `tasks` lists folders, or one folder of
      task folders.
    workdir: of the run.

  Returns:
    True: it is not stopped half-way.
  """
  trained = experiment.load_config(workdir)
  if trained.mode == "finetune":
    if not (workdir / results.RUNS).is_dir():
      raise ValueError(
        f"{workdir} is an imported classifier, which was trained on no clips "
        "that are known here; probe or fine-tune its encoder with "
        f"--config.init.run={workdir}"
      )
    robustness.run(config, workdir)
    return True
  if trained.mode == "instruct":
    raise ValueError(
      f"{workdir} holds a model that answers; give the command that trained it "
      "again, with --config.evaluation of what to test it on"
    )
  for name in task_names(config.tasks):
    task = encoder_probe.load_task(name, trained)
    encoder_probe.compare(trained, workdir, task)
  return True


def task_names(tasks: Sequence[str]) -> list[str]:
  """Expands folders that hold task folders.

  Raises:
    FileNotFoundError: a name that is neither "demo" nor leads to labels.csv.
  """
  names = []
  for task in map(os.path.expanduser, tasks):
    if task == "demo" or (pathlib.Path(task) / "labels.csv").exists():
      names.append(task)
      continue
    inside = sorted(
      str(path.parent) for path in pathlib.Path(task).glob("*/labels.csv")
    )
    if not inside:
      raise FileNotFoundError(
        f"task {task!r}: no labels.csv there or one level below; give 'demo' "
        "or a folder with labels.csv (columns path, label, split)"
      )
    names += inside
  return names
