"""A SIGTERM is noticed by one process alone and by several together."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from audiomosaic_jax.preemption import PreemptionWatcher

ROOT = pathlib.Path(__file__).parents[1]


def test_sigterm_is_noticed_and_the_old_handler_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with PreemptionWatcher() as preemption:
    assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached(2)
  assert signal.getsignal(signal.SIGTERM) is before
  with PreemptionWatcher() as preemption:
    assert not preemption.reached(3)


def test_a_second_ctrl_c_interrupts(capsys):
  before = signal.getsignal(signal.SIGINT)
  with PreemptionWatcher() as preemption:
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.reached(1)
    assert "Ctrl-C again" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      preemption.reached(2)
  assert signal.getsignal(signal.SIGINT) is before


PREEMPTED = """
import os, signal, socket, time
import jax
from audiomosaic_jax.preemption import PreemptionWatcher

with socket.socket() as free:
  free.bind(("localhost", 0))
  port = free.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)
with PreemptionWatcher() as preemption:
  for step in range(1, 500):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    if preemption.reached(step):
      print("stopped after the signal:", step > 3)
      break
    time.sleep(0.02)
jax.distributed.shutdown()
"""


def test_sigterm_is_noticed_under_jax_distributed():
  result = subprocess.run(
    [sys.executable, "-c", PREEMPTED],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=120,
  )
  assert "stopped after the signal: True" in result.stdout, result.stdout
