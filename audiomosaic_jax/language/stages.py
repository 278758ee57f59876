"""The stages of a run, a folder each: which are finished, what comes before.

A stage starts from the last state of the one before. Its folder has a record
once it is finished, with its steps and the fingerprint of its base.
"""

import json
import pathlib
from typing import Any

import jax
import ml_collections

from audiomosaic_jax import cluster, files

ConfigDict = ml_collections.ConfigDict
RECORD = "finished.json"


def names(config: ConfigDict) -> list[str]:
  """Returns all stages that the config knows, the first one first."""
  return sorted(name for name in config.stages if name != "order")


def before(config: ConfigDict, name: str) -> str | None:
  """Returns the stage that one starts from; None for the first."""
  place = names(config).index(name)
  return names(config)[place - 1] if place else None


def read_record(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the record of a stage; None if it is not finished."""
  path = folder / RECORD
  return json.loads(path.read_text()) if path.exists() else None


def write_record(folder: pathlib.Path, record: dict[str, Any]) -> None:
  """Marks a stage as finished; returns when every process can read it."""
  if jax.process_index() == 0:
    files.write_text(folder / RECORD, json.dumps(record) + "\n")
  cluster.wait_for_all(f"{folder.name} is finished")


def find(
  config: ConfigDict, workdir: pathlib.Path, name: str
) -> tuple[pathlib.Path, dict[str, Any]]:
  """Returns folder and record of a finished stage.

  Args:
    config: of the run.
    workdir: its folder.
    name: of the stage; "" is the last that is finished.

  Raises:
    FileNotFoundError: it is not finished, or none is.
  """
  finished = {
    stage: record
    for stage in names(config)
    if (record := read_record(workdir / stage)) is not None
  }
  if not finished or (name and name not in finished):
    raise FileNotFoundError(
      f"{workdir} has no finished {name or 'stage'}, only {list(finished)}; "
      "run it to its end with the command it was started with"
    )
  name = name or max(finished)
  return workdir / name, finished[name]
