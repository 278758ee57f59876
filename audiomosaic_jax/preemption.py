"""Being stopped: a notice that every process sees at one step."""

import signal
import sys
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

  Alone, a process listens for SIGTERM and for Ctrl-C itself (and restores the
  previous handlers afterwards); a second Ctrl-C interrupts it as usual. Under
  `jax.distributed`, JAX listens for SIGTERM, and spreads the notice so that all
  processes stop at the same step.
  """

  def __init__(self):
    self._terminated = False
    self._previous_handlers = {}

  def __enter__(self) -> "PreemptionWatcher":
    if not jax.distributed.is_initialized():
      self._previous_handlers = {
        number: signal.signal(number, self._on_signal)
        for number in (signal.SIGTERM, signal.SIGINT)
      }
    return self

  def __exit__(self, *error: object) -> None:
    for number in list(self._previous_handlers):
      self._restore(number)

  def _restore(self, number: int) -> None:
    # None stands for a handler that was not installed from Python.
    previous = self._previous_handlers.pop(number)
    signal.signal(number, previous or signal.SIG_DFL)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    self._terminated = True
    if number == signal.SIGINT:
      self._restore(number)
      print(
        "\nstopping after this step; Ctrl-C again stops at once, unsaved",
        file=sys.stderr,
        flush=True,
      )

  def reached(self, step: int) -> bool:
    """Returns True at the step where every process should save and stop.

    Args:
      step: number of finished updates. Under `jax.distributed`, call this on
        every process at every step: it is how they agree.
    """
    if not jax.distributed.is_initialized():
      return self._terminated
    return multihost_utils.reached_preemption_sync_point(step)
