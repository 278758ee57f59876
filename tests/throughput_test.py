"""FLOPs, peaks and the clock that the loop reads."""

import itertools
import types

import numpy as np
import pytest

from audiomosaic_jax import throughput


@pytest.fixture
def clock(monkeypatch):
  """Sets what the clock of the loop sees; starts at zero."""
  now = types.SimpleNamespace(wall=0.0, cpu=0.0)
  monkeypatch.setattr(
    throughput, "time", types.SimpleNamespace(perf_counter=lambda: now.wall)
  )
  monkeypatch.setattr(throughput, "_cpu_seconds", lambda: now.cpu)
  return now


def slow_batches(clock, seconds):
  """Batches of four clips of ten samples that take a while to read."""
  for _ in itertools.count():
    clock.wall += seconds
    yield {"waveform": np.zeros((4, 10), np.int16), "label": np.zeros(4)}


def step_clock(computes_on_host):
  return throughput.StepClock(
    pairs_per_step=8,
    flops_per_pair=1e9,
    peak_flops=1e11,
    computes_on_host=computes_on_host,
  )


def test_the_clock_tells_speed_waiting_and_the_cost_of_the_input(clock):
  steps = step_clock(computes_on_host=False)
  batches = slow_batches(clock, 0.25)
  for _ in range(4):
    steps.wait_for(batches)
    clock.wall += 0.75
  clock.cpu += 0.032
  figures = steps.read()
  # This process read half of the global batch of eight.
  assert figures == pytest.approx(
    {
      "pairs_per_s": 8.0,
      "mfu": 0.08,
      "host_wait_fraction": 0.25,
      "bytes_per_pair": 20.0,
      "host_cpu_ms_per_pair": 2.0,
    }
  )


def test_reading_starts_a_new_interval(clock):
  steps = step_clock(computes_on_host=False)
  steps.wait_for(slow_batches(clock, 1.0))
  clock.cpu += 1.0
  steps.read()
  clock.wall += 1.0
  assert steps.read()["pairs_per_s"] == 0
  assert steps.read()["host_cpu_ms_per_pair"] == 0


def test_a_cpu_that_computes_the_model_claims_no_cost_of_the_input(clock):
  assert "host_cpu_ms_per_pair" not in step_clock(computes_on_host=True).read()


def test_cpu_time_counts_work_and_not_sleep():
  before = throughput._cpu_seconds()
  x = np.ones((400, 400))
  while throughput._cpu_seconds() == before:
    x = x @ x / 400
  assert throughput._cpu_seconds() > before
