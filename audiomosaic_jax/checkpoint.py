"""Saving and resuming: train state and description together.

The only file that knows Orbax. A checkpoint directory holds one folder per
kept step, and each folder two items:

  checkpoints/1000/state   parameters, batch statistics, optimiser state, step
  checkpoints/1000/meta    JSON: whatever else describes the run, and
                           fingerprints of all of the state

Saving is asynchronous: `save` returns once the arrays are off the device, and
a folder gets its final name only when it is complete. What is read is compared
with its fingerprints: Orbax restores a flipped bit without a word.

Where the data continues is not saved. Batch n is the input of step n and a pure
function of n (`data.pipeline`), so `step` is the position, for any number of
hosts and of data workers, and also when batches had been read ahead.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from audiomosaic_jax import checkpoint_content, checkpoint_folders

PyTree = Any


class Checkpointer:
  """Keeps the newest checkpoints, and every Mth for good.

  with Checkpointer(directory, keep_last=3, keep_every=10_000) as saved:
    if (step := saved.latest_step()) is not None:
      state, meta = saved.restore(step, abstract_state)
    ...
    saved.save(step, state, {"config": config.to_dict()})
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
    self._directory = checkpoint_folders.absolute(directory)
    if jax.process_index() == 0:
      checkpoint_folders.set_aside_incomplete(self._directory)
    ocp.multihost.sync_global_processes("audiomosaic:incomplete_set_aside")
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
    meta: Mapping[str, Any],
  ) -> bool:
    """Starts writing a checkpoint; call it on every process.

    The arrays are copied before this returns, so the next step may donate
    them. An earlier save that is still running is waited for first. The
    fingerprints are computed where the arrays are.

    Args:
      step: number of finished updates, which is also the index of the batch
        to continue with.
      state: pytree of arrays.
      meta: JSON-serialisable description of the run.

    Returns:
      False, having done nothing, if that step is already saved.

    Raises:
      ValueError: `meta` has a field "fingerprints".
    """
    if step in self._manager.all_steps():
      return False
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      meta=ocp.args.JsonSave(checkpoint_content.add_fingerprints(meta, state)),
    )
    return self._manager.save(step, args=items, force=True)

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps; call it on every process."""
    for later in self.all_steps():
      if later > step:
        self._manager.delete(later)

  def restore(
    self, step: int, abstract_state: PyTree
  ) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint onto the shardings of `abstract_state`.

    The devices may be other ones, and another number of them, than those
    that wrote the checkpoint.

    Args:
      step: one of `all_steps()`.
      abstract_state: the state's structure: arrays, or
        `jax.ShapeDtypeStruct`s that carry a sharding.

    Returns:
      (state, meta) as they were saved.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: the state has another structure or shape than the
        checkpoint, or the checkpoint is damaged.
    """
    self.wait()
    if step not in self._manager.all_steps():
      raise FileNotFoundError(
        f"no checkpoint of step {step} in {self._directory}; "
        f"it has {self.all_steps()}"
      )
    path = self._directory / str(step)
    target = _checked_target(path, abstract_state)
    meta, fingerprints = _read_meta(path)
    with _readable(path):
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
      )["state"]
    _check_state(path, state, fingerprints)
    return state, meta

  def wait(self) -> None:
    """Blocks until the running save is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Completes the running save and stops the background threads."""
    self._manager.close()


def check_fits(directory: epath.PathLike, abstract_state: PyTree) -> None:
  """Finds out whether the newest checkpoint could be restored; reads no arrays.

  Args:
    directory: a run's workdir, or its `checkpoints` folder.
    abstract_state: the state's structure.

  Raises:
    ValueError: the state has another structure or shape than the checkpoint.
  """
  try:
    path = checkpoint_folders.step_folder(directory)
  except FileNotFoundError:
    return  # Nothing is restored then.
  _checked_target(path, abstract_state)


def _checked_target(path: epath.Path, abstract_state: PyTree) -> PyTree:
  """Returns what to restore a step into; ValueError if it does not fit."""
  target = jax.tree.map(_abstract_leaf, abstract_state)
  checkpoint_content.check_tree(
    _saved_leaves(path), target, path=path, allow_unused=False
  )
  return target


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
    ValueError: a wanted leaf is missing, has another shape or is damaged.
  """
  path = checkpoint_folders.step_folder(directory)
  saved = _saved_leaves(path)
  checkpoint_content.check_tree(saved, abstract, path=path, allow_unused=True)
  dtypes = [saved[name].dtype for name in checkpoint_content.leaves(abstract)]
  leaves, structure = jax.tree.flatten(abstract)
  first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  # In the dtypes of the fingerprints first; cast when they are verified.
  target = structure.unflatten(
    jax.ShapeDtypeStruct(
      leaf.shape,
      dtype,
      sharding=getattr(leaf, "sharding", None) or first_device,
    )
    for leaf, dtype in zip(leaves, dtypes, strict=True)
  )
  _, fingerprints = _read_meta(path)
  with (
    _readable(path),
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
  ):
    state = reader.restore(
      path / "state",
      args=ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
      ),
    )
  # By the host: a program for every shape would take longer to compile.
  _check_state(path, jax.device_get(state), fingerprints)
  return jax.tree.map(
    lambda leaf, wanted: leaf.astype(wanted.dtype), state, abstract
  )


def load_meta(directory: epath.PathLike) -> dict[str, Any]:
  """Reads the description saved with a checkpoint.

  Args:
    directory: as for `load_params`.

  Returns:
    The `meta` given to `Checkpointer.save`.

  Raises:
    FileNotFoundError: there is no checkpoint at `directory`.
    ValueError: it is damaged.
  """
  meta, _ = _read_meta(checkpoint_folders.step_folder(directory))
  return meta


def identity(directory: epath.PathLike) -> str:
  """Returns what tells a saved state from others, such as "1000@17955838122".

  Args:
    directory: as of `load_params`.

  Returns:
    Its step, and when it was written; a copy of the folder keeps both.

  Raises:
    FileNotFoundError: there is no checkpoint at `directory`.
  """
  path = checkpoint_folders.step_folder(directory)
  about = json.loads((path / "_CHECKPOINT_METADATA").read_text())
  return f"{path.name}@{about['commit_timestamp_nsecs']}"


@contextlib.contextmanager
def _readable(path: epath.Path) -> Iterator[None]:
  """Says which checkpoint it is that Orbax cannot read, and what to do."""
  try:
    yield
  # A file that is missing, cut short or changed raises almost anything.
  except Exception as error:
    remedy = checkpoint_folders.remedy(path)
    message = f"checkpoint {path} cannot be read: {error}; {remedy}"
    raise ValueError(message) from error


def _read_meta(
  path: epath.Path,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Returns the description and the fingerprints of a step folder."""
  with (
    _readable(path),
    ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader,
  ):
    saved = reader.restore(path / "meta", args=ocp.args.JsonRestore())
  meta, fingerprints = checkpoint_content.take_fingerprints(saved)
  if fingerprints is None:
    logging.warning("%s has no fingerprints; it cannot be verified", path)
  else:
    _refuse(path, checkpoint_content.damage_of_meta(meta, fingerprints))
  return meta, fingerprints


def _check_state(
  path: epath.Path, state: PyTree, fingerprints: dict[str, Any] | None
) -> None:
  """Raises ValueError if the state is not the one that was saved."""
  if fingerprints is not None:
    _refuse(path, checkpoint_content.damage_of_state(state, fingerprints))


def _refuse(path: epath.Path, damage: str | None) -> None:
  """Raises ValueError if there is damage."""
  if damage:
    remedy = checkpoint_folders.remedy(path)
    raise ValueError(f"checkpoint {path} is damaged: {damage}; {remedy}")


def _abstract_leaf(leaf: jax.Array | jax.ShapeDtypeStruct) -> PyTree:
  """Returns shape, dtype and sharding of a leaf of the training state."""
  if leaf.sharding is None:
    raise ValueError(
      f"a leaf of shape {leaf.shape} of abstract_state has no sharding; give "
      "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
    )
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _saved_leaves(path: epath.Path) -> dict[str, Any]:
  """Returns leaf path -> shape and dtype of the state in a step folder."""
  with _readable(path):
    handler = ocp.PyTreeCheckpointHandler()
    return checkpoint_content.leaves(handler.metadata(path / "state").tree)
