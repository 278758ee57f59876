"""The whole job as its users run it: through `main`, killed and restarted."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 8

# As small as the job can be: one narrow block, two short clips per device.
TINY = (
  "--config.duration.total=8",
  "--config.batch_size=8",
  "--config.model.encoder.width=32",
  "--config.model.encoder.depth=1",
  "--config.model.encoder.drop_path=0.1",
  "--config.model.projector.hidden_features=32",
  "--config.model.projector.out_features=16",
  "--config.augment_waveform.order=('roll_and_scale','gaussian_snr')",
  "--config.checkpoint.save_every=1",
  "--config.probe.task=",
  "--config.report=False",
)


def command(workdir, cache, *overrides, config="configs/pretrain.py:smoke"):
  return [
    sys.executable,
    "-m",
    "audiomosaic_jax.main",
    f"--config={config}",
    f"--workdir={workdir}",
    f"--config.runtime.compilation_cache={cache}",
    *TINY,
    *overrides,
  ]


def environment(num_devices=1):
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(num_devices),
  }


def run(arguments, num_devices=1):
  result = subprocess.run(
    arguments,
    cwd=ROOT,
    env=environment(num_devices),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


def final_state(workdir):
  """Returns leaf path -> array of the last checkpoint, read by Orbax alone."""
  import jax
  import orbax.checkpoint as ocp

  path = pathlib.Path(workdir).resolve() / "checkpoints" / str(STEPS) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.restore(path)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves}


def assert_bit_identical(one, other):
  assert one.keys() == other.keys()
  for name, leaf in one.items():
    np.testing.assert_array_equal(leaf, other[name], err_msg=name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
  """A run that nothing interrupts, and what it printed."""
  workdir = tmp_path_factory.mktemp("reference")
  output = run(command(workdir, cache))
  return workdir, output


def start(arguments, num_devices):
  return subprocess.Popen(
    arguments,
    cwd=ROOT,
    env=environment(num_devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def kill_after(arguments, seconds, number=signal.SIGKILL):
  """Starts a run and signals it; returns (exit code, output)."""
  process = start(arguments, num_devices=1)
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    process.send_signal(number)
  output, _ = process.communicate(timeout=120)
  return process.returncode, output


def kill_when(arguments, workdir, step, number, num_devices=1):
  """Signals a run as soon as its metrics reach a step."""
  process = start(arguments, num_devices)
  path = pathlib.Path(workdir) / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and process.poll() is None:
    if path.exists() and f'"step": {step},' in path.read_text():
      process.send_signal(number)
      break
    time.sleep(0.01)
  output, _ = process.communicate(timeout=120)
  return process.returncode, output


def losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


def test_a_run_logs_every_step_and_ends_with_a_checkpoint(reference):
  workdir, output = reference
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record["step"] for record in records] == list(range(1, STEPS + 1))
  wanted = "loss accuracy grad_norm lr pairs_per_s mfu host_wait_fraction"
  wanted += " bytes_per_pair"
  wanted += " effective_rank alignment uniformity lid"
  for name in wanted.split():
    assert np.isfinite(records[-1][name]), name
  assert f"step {STEPS}/{STEPS}" in output
  assert "parameters in" in output


def test_a_killed_run_ends_bit_identical_to_an_uninterrupted_one(
  reference, cache, tmp_path
):
  arguments = command(tmp_path, cache)
  code, _ = kill_when(arguments, tmp_path, 3, signal.SIGKILL)
  assert code == -signal.SIGKILL
  run(arguments)
  assert_bit_identical(final_state(tmp_path), final_state(reference[0]))
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines]
  assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_saves_exits_as_told_and_the_run_goes_on(
  reference, cache, tmp_path
):
  arguments = command(
    tmp_path,
    cache,
    "--config.checkpoint.save_every=1000",
    "--stopped_status=75",
  )
  code, output = kill_when(arguments, tmp_path, 3, signal.SIGTERM)
  assert code == 75, output
  assert "stopped at step" in output
  run(arguments)
  assert_bit_identical(final_state(tmp_path), final_state(reference[0]))


@pytest.mark.slow
def test_a_run_with_a_probe_ends_with_a_table_and_a_report(cache, tmp_path):
  arguments = command(
    tmp_path,
    cache,
    "--config.num_seeds=2",
    "--config.probe.task=demo",
    "--config.report=True",
  )
  output = run(arguments)
  encoders = [
    f"{encoder} encoder, {readout}"
    for encoder in ("random", "pretrained")
    for readout in ("mean of the tokens", "mean of each band")
  ]
  for row in ("log-mel mean and std", *encoders):
    assert row in output
  scores = json.loads((tmp_path / "probes" / "demo.json").read_text())
  for probe in ("knn", "linear"):
    for row in encoders:
      assert len(scores[row][probe]) == 2
      assert all(0 < s < 1 for s in scores[row][probe])
  page = (tmp_path / "report.html").read_text()
  assert page.count("data:image/png;base64") == 4
  records = [
    json.loads(line)
    for line in (tmp_path / "seed_1" / "metrics.jsonl").read_text().splitlines()
  ]
  assert any("knn" in record and "ridge" in record for record in records)


@pytest.mark.slow
def test_killed_at_20_random_moments_a_run_still_ends_bit_identical(
  reference, cache, tmp_path
):
  rng = random.Random(0)
  start = time.monotonic()
  run(command(tmp_path / "timed", cache))
  duration = time.monotonic() - start
  arguments = command(tmp_path / "killed", cache)
  killed = 0
  while killed < 20:
    code, _ = kill_after(arguments, rng.uniform(0.3, 0.98) * duration)
    killed += code == -signal.SIGKILL
    if code == 0:
      # It finished before the blow; begin another run to be killed.
      assert_bit_identical(
        final_state(tmp_path / "killed"), final_state(reference[0])
      )
      (tmp_path / "killed").rename(tmp_path / f"done_{killed}")
  run(arguments)
  assert_bit_identical(
    final_state(tmp_path / "killed"), final_state(reference[0])
  )


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [4, 1])
def test_a_run_on_eight_devices_goes_on_with_fewer(
  num_devices, cache, tmp_path
):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  run(command(whole, cache), num_devices=8)
  arguments = command(parts, cache)
  code, _ = kill_when(arguments, parts, 4, signal.SIGKILL, num_devices=8)
  assert code == -signal.SIGKILL
  run(arguments, num_devices=num_devices)
  # Losses, not parameters: Adam turns rounding in gradients that are almost
  # zero into whole steps.
  np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-4)


def test_the_paper_config_without_audioset_says_what_to_do(tmp_path):
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "audiomosaic_jax.main",
      "--config=configs/pretrain.py",
      f"--workdir={tmp_path}",
      f"--config.data.source.data_dir={tmp_path / 'nothing'}",
    ],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode != 0
  message = result.stderr.strip()
  assert "Traceback" not in message
  assert str(tmp_path / "nothing") in message
  assert "audiomosaic_jax.data.prepare" in message
  assert "configs/pretrain.py:demo" in message
