"""Saving and resuming: train state, data position and description together.

The only file that knows Orbax. A checkpoint directory holds one folder per
kept step, and each folder three items:

  checkpoints/1000/state   parameters, batch statistics, optimiser state, step
  checkpoints/1000/data    Grain's own iterator state, one file per process
  checkpoints/1000/meta    JSON: the config and whatever else describes the run

Saving is asynchronous: `save` returns once the arrays are off the device, and
a folder gets its final name only when it is complete.

Where the data continues. Batch n is the input of step n and every pipeline is a
pure function of the batch index, so `step` is the data position. Restoring sets
that index, which is right for any number of hosts and of data workers, also
when a batch had been fetched ahead. Grain cannot set an index across several
worker *processes*; for those its own saved state is used, which needs the same
number of hosts and workers.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

PyTree = Any

# Orbax writes this file last. Renaming already makes local saves atomic, but a
# folder half-way through being copied from elsewhere has its final name.
_COMMITTED = "commit_success.txt"


class Checkpointer:
  """Keeps the newest checkpoints, and every Mth for good.

  with Checkpointer(directory, keep_last=3, keep_every=10_000) as saved:
    if (step := saved.latest_step()) is not None:
      state, meta = saved.restore(step, abstract_state, batches)
    ...
    saved.save(step, state, batches, {"config": config.to_dict()})
  """

  def __init__(
    self, directory: epath.PathLike, *, keep_last: int, keep_every: int
  ):
    """Opens `directory`, creating it, and clears what a killed run left.

    Folders that were never completed are removed when Orbax wrote them and
    renamed to `<step>.incomplete` when they were copied there.

    Args:
      directory: a local folder or an object-store path (`gs://...`).
      keep_last: how many of the newest checkpoints to keep, at least 1.
      keep_every: also keep every step divisible by this; 0 keeps none. Only
        steps that are saved can be kept, so make it a multiple of the
        interval at which the loop saves.

    Raises:
      ValueError: `keep_last` < 1 or `keep_every` < 0.
    """
    if keep_last < 1 or keep_every < 0:
      raise ValueError(
        f"keep_last={keep_last}, keep_every={keep_every}; keep at least the "
        "last checkpoint, and use keep_every=0 to keep no other"
      )
    self._directory = _absolute(directory)
    _set_aside_incomplete(self._directory)
    policies = ocp.checkpoint_managers
    keep = [policies.LatestN(keep_last)]
    if keep_every:
      keep.append(policies.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        # The loop decides when to save; the manager never refuses a new step.
        save_decision_policy=policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
    )

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def latest_step(self) -> int | None:
    """Returns the newest complete step, or None in a fresh directory."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Returns the steps that can be restored, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: PyTree,
    data_iterator: Iterator | None,
    meta: Mapping[str, Any],
  ) -> bool:
    """Starts writing a checkpoint; call it on every process.

    The arrays are copied before this returns, so the next step may donate
    them. An earlier save that is still running is waited for first.

    Args:
      step: number of finished updates, which is also the index of the batch
        to continue with.
      state: pytree of arrays.
      data_iterator: Grain iterator, or None if the data has no position.
      meta: JSON-serialisable description of the run.

    Returns:
      False, having done nothing, if that step is already saved.
    """
    if step in self._manager.all_steps():
      return False
    items = {
      "state": ocp.args.StandardSave(state),
      "meta": ocp.args.JsonSave(dict(meta)),
    }
    if data_iterator is not None:
      items["data"] = grain.checkpoint.CheckpointSave(data_iterator)
    return self._manager.save(
      step, args=ocp.args.Composite(**items), force=True
    )

  def restore(
    self, step: int, abstract_state: PyTree, data_iterator: Iterator | None
  ) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint onto the shardings of `abstract_state`.

    The devices may be other ones, and another number of them, than those
    that wrote the checkpoint.

    Args:
      step: one of `all_steps()`.
      abstract_state: the state's structure: arrays, or
        `jax.ShapeDtypeStruct`s that carry a sharding.
      data_iterator: repositioned in place to batch number `step`; None if
        the data has no position.

    Returns:
      (state, meta) as they were saved.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: the state has another structure, shape or data position than
        the checkpoint.
    """
    self.wait()
    if step not in self._manager.all_steps():
      raise FileNotFoundError(
        f"no checkpoint of step {step} in {self._directory}; "
        f"it has {self.all_steps()}"
      )
    path = self._directory / str(step)
    target = jax.tree.map(_abstract_leaf, abstract_state)
    _check_tree(_saved_leaves(path), target, path=path, allow_unused=False)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
      ),
    )
    if data_iterator is not None:
      self._reposition(data_iterator, step)
    return restored["state"], restored["meta"]

  def _reposition(self, data_iterator: Iterator, step: int) -> None:
    """Makes batch number `step` the next one that `data_iterator` yields."""
    try:
      grain.experimental.set_next_index(data_iterator, step)
      return
    except (NotImplementedError, ValueError):
      logging.info("The data iterator has no single index; using its state.")
    data = grain.checkpoint.CheckpointRestore(data_iterator)
    workers = jax.tree.structure(data_iterator.get_state())
    try:
      self._manager.restore(step, args=ocp.args.Composite(data=data))
      # Grain takes the state of another number of workers without a word.
      if jax.tree.structure(data_iterator.get_state()) != workers:
        raise ValueError("it was saved with another number of data workers")
    except (KeyError, ValueError, FileNotFoundError) as error:
      raise ValueError(
        f"the data position of step {step} in {self._directory} cannot be "
        f"restored: {error}; resume with the numbers of hosts and of data "
        "worker processes it was saved with, or with at most one worker "
        "process per host, which can start anywhere"
      ) from error

  def wait(self) -> None:
    """Blocks until the running save is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Completes the running save and stops the background threads."""
    self._manager.close()


def load_params(directory: epath.PathLike, abstract: PyTree) -> PyTree:
  """Reads the wanted part of a saved train state, for downstream use.

  Only what is asked for is read: the encoder without the projector and
  without the optimiser, for example.

  Args:
    directory: a run's workdir, its `checkpoints` folder (newest step) or the
      folder of one step.
    abstract: the wanted subtree from the root of the state, for example
      `{"params": {"encoder": ...}, "batch_stats": ...}`, with arrays or
      `jax.ShapeDtypeStruct`s as leaves. Leaves without a sharding go to the
      first local device; a leaf's dtype may differ from the saved one.

  Returns:
    The same tree with the saved values.

  Raises:
    FileNotFoundError: there is no checkpoint at `directory`.
    ValueError: a wanted leaf is missing or has another shape.
  """
  path = _step_folder(_absolute(directory))
  first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=getattr(leaf, "sharding", None) or first_device,
    ),
    abstract,
  )
  _check_tree(_saved_leaves(path), target, path=path, allow_unused=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(
      path / "state",
      args=ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
      ),
    )


def load_meta(directory: epath.PathLike) -> dict[str, Any]:
  """Reads the description saved with a checkpoint.

  Args:
    directory: as for `load_params`.

  Returns:
    The `meta` given to `Checkpointer.save`.

  Raises:
    FileNotFoundError: there is no checkpoint at `directory`.
  """
  path = _step_folder(_absolute(directory))
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    return reader.restore(path / "meta", args=ocp.args.JsonRestore())


def identity(directory: epath.PathLike) -> str:
  """Returns what tells a saved state from others, such as "1000@17955838122".

  Args:
    directory: as of `load_params`.

  Returns:
    Its step, and when it was written; a copy of the folder keeps both.

  Raises:
    FileNotFoundError: there is no checkpoint at `directory`.
  """
  path = _step_folder(_absolute(directory))
  about = json.loads((path / "_CHECKPOINT_METADATA").read_text())
  return f"{path.name}@{about['commit_timestamp_nsecs']}"


def _absolute(directory: epath.PathLike) -> epath.Path:
  """Returns the folder as Orbax wants it, from the root or with a scheme."""
  remote = "://" in str(directory)
  return epath.Path(directory if remote else os.path.abspath(directory))


def _set_aside_incomplete(directory: epath.Path) -> None:
  """Renames step folders that lack Orbax's commit file."""
  if jax.process_index() == 0 and directory.is_dir():
    for folder in directory.iterdir():
      if folder.name.isdigit() and not (folder / _COMMITTED).exists():
        logging.warning("%s is incomplete; ignoring it", folder)
        folder.rename(directory / f"{folder.name}.incomplete")
  ocp.multihost.sync_global_processes("audiomosaic:incomplete_set_aside")


def _step_folder(directory: epath.Path) -> epath.Path:
  """Returns the folder of the newest complete step at or under `directory`."""
  if not directory.exists():
    raise FileNotFoundError(
      f"{directory} does not exist; give a workdir, its checkpoints folder or "
      "the folder of one step"
    )
  if (directory / "state").is_dir():
    return directory
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  steps = [
    folder
    for folder in directory.iterdir()
    if folder.name.isdigit() and (folder / _COMMITTED).exists()
  ]
  if not steps:
    raise FileNotFoundError(
      f"{directory} holds no complete checkpoint (a folder named after its "
      f"step with a file {_COMMITTED}); has the run saved one yet?"
    )
  return max(steps, key=lambda folder: int(folder.name))


def _abstract_leaf(leaf: jax.Array | jax.ShapeDtypeStruct) -> PyTree:
  """Returns shape, dtype and sharding of a leaf of the training state."""
  if leaf.sharding is None:
    raise ValueError(
      f"a leaf of shape {leaf.shape} of abstract_state has no sharding; give "
      "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
    )
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _saved_leaves(path: epath.Path) -> dict[str, tuple[int, ...]]:
  """Returns leaf path -> shape of the state saved in a step folder."""
  return _shapes(ocp.PyTreeCheckpointHandler().metadata(path / "state").tree)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  """Returns leaf path -> shape; attributes, keys and indices look alike."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_tree(
  saved: Mapping[str, tuple[int, ...]],
  target: PyTree,
  *,
  path: epath.Path,
  allow_unused: bool,
) -> None:
  """Raises ValueError naming the first leaf in which the two trees differ."""
  wanted = _shapes(target)
  for name, shape in wanted.items():
    if name not in saved:
      raise ValueError(
        f"checkpoint {path} has no {name} (wanted with shape {shape}); was it "
        "written by another model or optimizer configuration?"
      )
    if saved[name] != shape:
      raise ValueError(
        f"checkpoint {path}: {name} has shape {saved[name]} but the model "
        f"wants {shape}; use the configuration it was trained with"
      )
  unused = [name for name in saved if name not in wanted]
  if unused and not allow_unused:
    raise ValueError(
      f"checkpoint {path} has {len(unused)} leaves that the model lacks, the "
      f"first is {unused[0]} of shape {saved[unused[0]]}; was it written by "
      "another model or optimizer configuration?"
    )
