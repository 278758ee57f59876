"""Being stopped: a notice of SIGTERM that every process sees at one step."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class PreemptionWatcher:
  """Notices that this job is about to be stopped, in time to save.

  with PreemptionWatcher() as preemption:
    for step in ...:
      ...
      if preemption.reached(step):
        checkpointer.save(step, ...); break

  Alone, a process listens for SIGTERM itself (and restores the previous
  handler afterwards). Under `jax.distributed`, JAX listens, and spreads the
  notice so that all processes stop at the same step.
  """

  def __init__(self):
    self._terminated = False
    self._previous_handler = None
    self._listens = False

  def __enter__(self) -> "PreemptionWatcher":
    if not jax.distributed.is_initialized():
      self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
      self._listens = True
    return self

  def __exit__(self, *error: object) -> None:
    if self._listens:
      # None stands for a handler that was not installed from Python.
      signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)
      self._listens = False

  def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
    self._terminated = True

  def reached(self, step: int) -> bool:
    """Returns True at the step where every process should save and stop.

    Args:
      step: number of finished updates. Under `jax.distributed`, call this on
        every process at every step: it is how they agree.
    """
    if self._listens:
      return self._terminated
    return multihost_utils.reached_preemption_sync_point(step)
