"""Folders of checkpoints: which steps are there, and which are complete."""

import itertools
import os

from absl import logging
from etils import epath

# Orbax writes this file last. Renaming already makes local saves atomic, but a
# folder half-way through being copied from elsewhere has its final name.
_COMMITTED = "commit_success.txt"


def absolute(directory: epath.PathLike) -> epath.Path:
  """Returns the folder as Orbax wants it, from the root or with a scheme."""
  remote = "://" in str(directory)
  return epath.Path(directory if remote else os.path.abspath(directory))


def set_aside_incomplete(directory: epath.Path) -> None:
  """Renames the step folders that are not complete to `<step>.incomplete`."""
  if not directory.is_dir():
    return
  for folder in directory.iterdir():
    if folder.name.isdigit() and not _is_complete(folder):
      logging.warning("%s is incomplete; ignoring it", folder)
      names = (f"{folder.name}.incomplete{n or ''}" for n in itertools.count())
      folder.rename(
        next(
          path for path in map(directory.joinpath, names) if not path.exists()
        )
      )


def step_folder(directory: epath.PathLike) -> epath.Path:
  """Returns the folder of the newest complete step at or under `directory`.

  Raises:
    FileNotFoundError: there is none.
  """
  directory = absolute(directory)
  if not directory.exists():
    raise FileNotFoundError(
      f"{directory} does not exist; give a workdir, its checkpoints folder or "
      "the folder of one step"
    )
  if (directory / "state").is_dir():
    if not _is_complete(directory):
      raise FileNotFoundError(
        f"checkpoint {directory} has no {_COMMITTED}, so it is not complete; "
        f"{remedy(directory)}"
      )
    return directory
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  steps = _complete_steps(directory)
  if not steps:
    raise FileNotFoundError(
      f"{directory} holds no complete checkpoint (a folder named after its "
      f"step with a file {_COMMITTED}); has the run saved one yet?"
    )
  return directory / str(steps[-1])


def _complete_steps(directory: epath.Path) -> list[int]:
  """Returns the steps that have a complete folder, oldest first."""
  return sorted(
    int(folder.name)
    for folder in directory.iterdir()
    if folder.name.isdigit() and _is_complete(folder)
  )


def remedy(path: epath.Path) -> str:
  """Returns what to do when the folder of a step cannot be used."""
  steps = _complete_steps(path.parent)
  others = [step for step in steps if str(step) != path.name]
  if not others:
    return "copy it again; there is no other step beside it"
  return (
    "copy it again, or move the folder away and use another step of "
    f"{path.parent}: {', '.join(map(str, others))}"
  )


def _is_complete(folder: epath.Path) -> bool:
  """Returns whether Orbax has finished the folder of a step."""
  return (folder / _COMMITTED).exists()
