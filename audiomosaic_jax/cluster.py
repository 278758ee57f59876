"""Joining the other processes of a run on any cluster, and leaving them."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

# A process that is lost without notice ends the others after this time, which
# until then wait for it in a sum over devices. A thread of its own sends the
# heartbeats, so that a long compilation or a slow disk delays none.
HEARTBEAT_TIMEOUT_S = 60
# A process that is done waits this long for the others, as long as they live:
# one writes the report. JAX's 300 seconds would end a slow one.
SHUTDOWN_TIMEOUT_S = 3600


def initialize_distributed(environ: Mapping[str, str] = os.environ) -> bool:
  """Joins the other processes when the environment describes a cluster.

  `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` works
  anywhere; Cloud TPU pods and multi-task SLURM steps are detected by JAX.

  Args:
    environ: environment variables.

  Returns:
    True if `jax.distributed.initialize` was called. Must run before the first
    use of a device.

  Raises:
    ValueError: the coordinator is set but the process count or id is missing.
  """
  if environ.get("JAX_COORDINATOR_ADDRESS"):
    missing = [
      name
      for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
      if not environ.get(name)
    ]
    if missing:
      raise ValueError(
        f"JAX_COORDINATOR_ADDRESS={environ['JAX_COORDINATOR_ADDRESS']} is set "
        f"but {' and '.join(missing)} is not; set all three, or none to run "
        "on this machine alone"
      )
    jax.distributed.initialize(
      environ["JAX_COORDINATOR_ADDRESS"],
      num_processes=int(environ["JAX_NUM_PROCESSES"]),
      process_id=int(environ["JAX_PROCESS_ID"]),
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
      shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    return True
  tpu_pod = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or environ.get(
    "MEGASCALE_COORDINATOR_ADDRESS"
  )
  slurm = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
  if tpu_pod or slurm:
    jax.distributed.initialize(
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
      shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    return True
  return False


def wait_for_all(what: str) -> None:
  """Returns when every process of the run has come here.

  Args:
    what: has happened then; other words in another process are an error.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def ends_alone() -> Iterator[None]:
  """Ends this process at once, see `end`, if an exception leaves the block.

  A process on its own passes the exception on.
  """
  try:
    yield
  except Exception:
    if jax.distributed.is_initialized():
      end(traceback.format_exc())
    raise


def end(message: str) -> NoReturn:
  """Ends the program with status 1, alone if it is one of several processes.

  A process that ends as usual first waits for the others to end. They do not
  while they wait for its part of a sum over devices.

  Args:
    message: for standard error.
  """
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
  raise SystemExit(message)
