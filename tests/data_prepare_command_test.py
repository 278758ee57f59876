"""The command prepares, fails, is killed and goes on as it says."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from prepared import (
  NO_TENSORFLOW,
  RATE_HZ,
  open_job,
  open_paths,
  prepare,
  read,
  write_clip,
  write_folder,
)

from audiomosaic_jax.data import datasets


@pytest.fixture
def folder(tmp_path):
  return write_folder(tmp_path / "in")


def command(*arguments):
  code = f"""{NO_TENSORFLOW}
import runpy
try:
  runpy.run_module("audiomosaic_jax.data.prepare", run_name="__main__",
                   alter_sys=True)
finally:
  print({{"tensorflow", "flax"}} & set(sys.modules))
"""
  return [sys.executable, "-c", code, *map(str, arguments)]


def test_the_command_fails_above_a_share_of_bad_clips_and_keeps_the_others(
  folder, tmp_path
):
  (folder / "train" / "cat" / "b.wav").write_bytes(b"garbage")
  output = tmp_path / "out"
  arguments = [
    *(f"--input={folder}/train", f"--output={output}", "--num_workers=2"),
    *(f"--sample_rate_hz={RATE_HZ}", "--num_shards=3"),
  ]
  done = subprocess.run(
    command(*arguments), capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert "1 of 5 clips of split train are bad" in done.stderr
  assert "5/5" in done.stderr  # The progress bar.
  assert "4 of 5 clips are written" in done.stdout
  assert "--config.spectrogram.mean=" in done.stdout
  assert done.stdout.endswith("set()\n")
  assert len(read(output)) == 4
  before = {p: p.stat().st_mtime_ns for p in output.glob("*.array_record*")}
  done = subprocess.run(
    command(*arguments, "--max_bad_fraction=0.2"),
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  assert before == {p: p.stat().st_mtime_ns for p in before}


def processes_of(text):
  """Returns the processes that have a text in their command line."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      if text.encode() in path.read_bytes():
        found.append(int(path.parent.name))
    except OSError:
      pass
  return found


def wait_until(condition, seconds=40.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path):
  # Long enough to be in the middle of it for a while.
  for i in range(16):
    write_clip(tmp_path / "in" / f"{i}.wav", 200 + 50 * i, seconds=40.0)
  (tmp_path / "in" / "bad.wav").write_bytes(b"garbage")
  inputs = open_paths(tmp_path / "in")
  whole, killed = tmp_path / "whole" / "data", tmp_path / "killed" / "data"
  prepare(whole, inputs, num_shards=8)
  reports = killed / "_prepare"
  process = subprocess.Popen(
    command(
      *(f"--input={tmp_path}/in", f"--output={killed}", "--num_shards=8"),
      *("--num_workers=2", f"--sample_rate_hz={RATE_HZ}"),
      *("--num_frames=64", "--shard_mb=1"),
    ),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  wait_until(
    lambda: (
      len(list(reports.glob("train-*.json"))) >= 1
      and any(killed.glob(".*.tmp"))
    )
  )
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  # Its workers notice, and leave too.
  wait_until(lambda: not processes_of(str(killed)))
  assert list(killed.glob(".*.tmp"))
  job = open_job(killed, inputs, num_shards=8)
  assert 0 < len(job.missing()) < 8
  with pytest.raises(datasets.DatasetNotPreparedError):
    read(killed)
  prepare(killed, inputs, num_shards=8)
  files = sorted(path.name for path in whole.iterdir() if path.is_file())
  assert files == sorted(p.name for p in killed.iterdir() if p.is_file())
  assert sum("array_record" in name for name in files) == 8
  for name in files:
    assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_the_command_explains_itself():
  done = subprocess.run(
    [sys.executable, "-m", "audiomosaic_jax.data.prepare", "--help"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert "--output" in done.stdout and "python -m" in done.stdout
