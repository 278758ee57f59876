"""Two processes train as one does, stop together, and go on after a loss.

All is run through `main`, on CPUs joined by gloo. One process of two devices
that nothing interrupts is the reference of every test.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from audiomosaic_jax import checkpoint, cluster

ROOT = pathlib.Path(__file__).parents[1]
STEPS, SAVE_EVERY = 18, 6
WAIT_S = 600

# `python -m audiomosaic_jax.main`, that ends even if nobody is left to end it.
MAIN = f"""
import runpy, signal
signal.alarm({2 * WAIT_S})
runpy.run_module("audiomosaic_jax.main", run_name="__main__", alter_sys=True)
"""

# What a step computes is tested elsewhere; here it is to be compiled soon.
SMALL = (
  "--config=configs/pretrain.py:smoke",
  f"--config.duration.total={STEPS}",
  f"--config.checkpoint.save_every={SAVE_EVERY}",
  "--config.checkpoint.keep_last=10",
  # The rate of a step does not depend on how many there are.
  "--config.schedule.name=constant",
  "--config.batch_size=8",
  "--config.data.pipeline.clip_samples=10640",
  "--config.spectrogram.num_frames=64",
  "--config.augment_waveform.order=('gain',)",
  "--config.augment_fbank.order=()",
  "--config.model.encoder.width=32",
  "--config.model.encoder.depth=1",
  "--config.model.projector.hidden_features=32",
  "--config.model.projector.out_features=16",
  "--config.probe.task=",
  "--config.report=False",
)

# Two stages of a step each, which start from a base that the run writes.
ANSWERING = (
  "--config=configs/instruct.py:debug,batch_size=8",
  "--config.stages.order=('stage_1','stage_2')",
  "--config.stages.stage_1.epochs=0.01",
  "--config.stages.stage_2.epochs=0.01",
  "--config.warmup_steps=0",
  "--config.base.random.hidden_size=32",
  "--config.base.random.intermediate_size=64",
  "--config.evaluation.max_clips=8",
  "--config.evaluation.batch_size=8",
  "--config.evaluation.num_resamples=0",
)


class Job:
  """A run of `main` as so many processes, two devices in all."""

  def __init__(
    self, workdir: pathlib.Path, num_processes: int, *more: str, base=SMALL
  ):
    self.workdir = workdir
    cache = workdir.parent / "compiled"
    command = [
      *(sys.executable, "-c", MAIN),
      *(*base, f"--workdir={workdir}"),
      *(f"--config.runtime.compilation_cache={cache}", *more),
    ]
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(2 // num_processes),
    }
    if num_processes > 1:
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
      environment |= {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(num_processes),
      }
    self.logs = [
      workdir.with_name(f"{workdir.name}_{index}.log")
      for index in range(num_processes)
    ]
    self.processes = []
    for index, log in enumerate(self.logs):
      with log.open("w") as output:
        self.processes.append(
          subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=output,
            stderr=subprocess.STDOUT,
          )
        )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.wait()

  def output(self) -> str:
    return "\n".join(log.read_text() for log in self.logs)

  def wait_for(self, happened) -> None:
    """Waits until something has happened while all processes run."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
      running = all(process.poll() is None for process in self.processes)
      assert running and time.monotonic() < deadline, self.output()
      time.sleep(0.01)

  def end(self) -> tuple[list[int], float]:
    """Waits for all; returns the exit codes, and how long it took."""
    start = time.monotonic()
    codes = [process.wait(timeout=WAIT_S) for process in self.processes]
    return codes, time.monotonic() - start


def losses(workdir: pathlib.Path) -> dict[int, float]:
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  records = [json.loads(line) for line in lines]
  return {record["step"]: record["loss"] for record in records}


def assert_same_losses(workdir, reference, steps):
  """Compares the losses of the steps that the reference made.

  Losses, not parameters: Adam turns rounding in gradients that are almost zero
  into whole steps.
  """
  found, wanted = losses(workdir), losses(reference)
  assert list(found) == list(steps)
  both = [step for step in steps if step in wanted]
  np.testing.assert_allclose(
    [found[step] for step in both],
    [wanted[step] for step in both],
    rtol=1e-4,
  )


def steps_saved(workdir: pathlib.Path) -> list[int]:
  folders = (workdir / "checkpoints").glob("[0-9]*")
  return sorted(int(f.name) for f in folders if f.name.isdigit())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reference(folder):
  """One process that nothing interrupts."""
  with Job(folder / "reference", 1) as job:
    codes, _ = job.end()
    assert codes == [0], job.output()
  return job.workdir


def stop_two(workdir: pathlib.Path, victim: int) -> tuple[list[int], str]:
  """Trains as two from the start, with a SIGTERM to one of them.

  The run has no end, as the notice may take a second, and saves only then.
  """
  endless = (
    "--config.duration.total=1e6",
    "--config.checkpoint.save_every=1000000",
  )
  with Job(workdir, 2, *endless) as job:
    job.wait_for(lambda: 3 in losses(workdir))
    job.processes[victim].send_signal(signal.SIGTERM)
    codes, _ = job.end()
    return codes, job.output()


def lose_one(workdir: pathlib.Path, reference: pathlib.Path, victim: int):
  """Goes on as two from what one process saved, until one of them is lost.

  Returns:
    The exit codes, the time until both had ended, and the output.
  """
  shutil.copytree(reference, workdir)
  for step in steps_saved(workdir)[1:]:
    shutil.rmtree(workdir / "checkpoints" / str(step))
  with Job(workdir, 2) as job:
    # Just after a save, as one that runs is waited for.
    job.wait_for(lambda: 2 * SAVE_EVERY in steps_saved(workdir))
    job.processes[victim].kill()
    codes, seconds = job.end()
    return codes, seconds, job.output()


@pytest.fixture(scope="module")
def stopped(folder):
  return folder / "stopped", *stop_two(folder / "stopped", victim=1)


@pytest.fixture(scope="module")
def lost(folder, reference):
  return folder / "lost", *lose_one(folder / "lost", reference, victim=1)


def test_two_processes_have_the_losses_of_one(reference, stopped):
  workdir, _, _ = stopped
  steps = range(1, len(losses(workdir)) + 1)
  assert len(steps) >= 3
  assert_same_losses(workdir, reference, steps)


def test_a_sigterm_to_one_saves_on_both_at_one_step_and_exits_zero(stopped):
  workdir, codes, output = stopped
  assert codes == [0, 0], output
  (step,) = steps_saved(workdir)
  assert step == max(losses(workdir)) >= 3
  assert f"stopped at step {step}; saved" in output
  # Every leaf is there, and has the fingerprint that both computed.
  state = jax.eval_shape(lambda: {"step": np.int32(0)})
  assert checkpoint.load_params(workdir, state)["step"] == step
  fingerprints = json.loads(
    (workdir / f"checkpoints/{step}/meta/metadata").read_text()
  )["fingerprints"]
  assert len(fingerprints["state"]) > 28


@pytest.mark.slow
def test_two_processes_learn_to_answer_and_are_tested(folder):
  with Job(folder / "ask", 2, base=ANSWERING) as job:
    codes, _ = job.end()
  assert codes == [0, 0], job.output()
  results = json.loads((job.workdir / "results.json").read_text())
  assert results["about"]["stage"] == "stage_2"
  assert results["sets"]["demo"]["clips"] == 8
  assert results["captions"]["demo"]["clips"] == 8


@pytest.mark.slow
def test_both_end_soon_after_one_is_killed(lost):
  workdir, codes, seconds, output = lost
  assert codes[1] == -signal.SIGKILL and codes[0] != 0, output
  assert seconds < cluster.HEARTBEAT_TIMEOUT_S + 30
  assert "Connection" in output or "heartbeat" in output, output
  assert 2 * SAVE_EVERY in steps_saved(workdir)


@pytest.mark.slow
def test_two_go_on_from_what_one_saved(reference, lost):
  workdir, *_ = lost
  steps = range(1, max(losses(workdir)) + 1)
  assert len(steps) >= 2 * SAVE_EVERY
  assert_same_losses(workdir, reference, steps)


@pytest.mark.slow
def test_one_goes_on_from_the_last_save_of_two_after_the_loss(reference, lost):
  workdir, *_ = lost
  saved = max(steps_saved(workdir))
  before = losses(workdir)
  with Job(workdir, 1) as job:
    codes, _ = job.end()
  assert codes == [0], job.output()
  # Nothing but the steps since that save was computed again.
  first = job.output().partition("step ")[2]
  assert first.startswith(f"{saved + 1}/{STEPS}"), job.output()
  after = losses(workdir)
  assert [after[step] for step in range(1, saved + 1)] == [
    before[step] for step in range(1, saved + 1)
  ]
  assert_same_losses(workdir, reference, range(1, STEPS + 1))


@pytest.mark.slow
def test_the_first_process_may_be_the_one_that_is_stopped_or_lost(
  folder, reference
):
  # It is the one that the others found each other through.
  codes, output = stop_two(folder / "first", victim=0)
  assert codes == [0, 0], output
  (step,) = steps_saved(folder / "first")
  with Job(folder / "first", 2, f"--config.duration.total={step + 3}") as job:
    assert job.end()[0] == [0, 0], job.output()
  assert_same_losses(folder / "first", reference, range(1, step + 4))
  codes, seconds, output = lose_one(folder / "first_lost", reference, victim=0)
  assert codes[0] == -signal.SIGKILL and codes[1] != 0, output
  assert seconds < cluster.HEARTBEAT_TIMEOUT_S + 30
  with Job(folder / "first_lost", 2) as job:
    assert job.end()[0] == [0, 0], job.output()
  assert_same_losses(folder / "first_lost", reference, range(1, STEPS + 1))


@pytest.mark.slow
def test_two_processes_probe_and_report_as_one(folder):
  more = "--config.probe.task=demo", "--config.report=True"
  more += f"--config.probe.eval_every={STEPS}", "--config.duration.total=4"
  tables = []
  for num_processes, split in ((1, False), (2, False), (2, True)):
    workdir = folder / f"report_{num_processes}_{split}"
    flags = *more, f"--config.split_state={split}"
    with Job(workdir, num_processes, *flags) as job:
      codes, _ = job.end()
      assert codes == [0] * num_processes, job.output()
    assert (workdir / "report.html").exists()
    tables.append(json.loads((workdir / "probes" / "demo.json").read_text()))
  first, *others = tables
  for other in others:
    assert first.keys() == other.keys()
    for row, scores in first.items():
      for probe, values in scores.items():
        np.testing.assert_allclose(other[row][probe], values, atol=0.02)
