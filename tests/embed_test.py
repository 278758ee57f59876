"""Embedding many recordings: nothing lost, nothing done twice."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import tiny_encoder as tiny
from absl import flags
from absl.testing import flagsaver

from audiomosaic_jax import embed, embed_output, embed_shards, encoder_files
from audiomosaic_jax.data import recordings

ROOT = pathlib.Path(__file__).parents[1]
RATE_HZ = tiny.RATE_HZ
LENGTHS_S = [0.3, 2.0, 1.0, 4.0, 0.1, 1.3, 0.7]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return tiny.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Recordings of several lengths, one of them broken, one silent."""
  folder = tmp_path_factory.mktemp("recordings")
  for i, seconds in enumerate(LENGTHS_S):
    path = folder / f"site{i % 2}" / f"{i}.wav"
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, tiny.noise(seconds, i), RATE_HZ)
  (folder / "site0/broken.wav").write_bytes(b"RIFF, but then nothing")
  soundfile.write(folder / "site1/silent.flac", np.zeros(RATE_HZ), RATE_HZ)
  return folder


def job(run, folder, output, *, shard_size=4, **changes):
  settings = {
    "encoder": str(run),
    "dtype": "float32",
    "batch_size": 8,
    "frames": False,
    "hop_ms": None,
    "overlap": 0.0,
    "segment_s": 0.0,
    "segment_hop_s": 0.0,
    "num_threads": 2,
  } | changes
  made = embed_shards.Job(
    embed_output.parts_folder(output),
    embed_shards.Settings(**settings),
    recordings.find(str(folder)),
    shard_size,
  )
  made.open()
  return made


def finish(made, output):
  for shard in made.missing():
    made.embed_shard(shard)
  return embed_output.join(made, output)


@pytest.fixture(scope="module")
def whole(run, folder, tmp_path_factory):
  """The table of all recordings, and what was left out."""
  output = tmp_path_factory.mktemp("whole") / "out.parquet"
  made = job(run, folder, output)
  finish(made, output)
  return pyarrow.parquet.read_table(output).to_pydict(), made.bad()


def test_every_row_is_what_the_encoder_says_of_the_file(run, folder, whole):
  table, _ = whole
  encoder = encoder_files.load_encoder(run)
  assert table["id"] == sorted(
    f"site{i % 2}/{i}.wav" for i in range(len(LENGTHS_S))
  )
  for row, name in enumerate(table["id"]):
    expected = encoder.embed(folder / name).embedding
    found = np.array(table["embedding"][row])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    seconds = LENGTHS_S[int(pathlib.Path(name).stem)]
    assert table["end_s"][row] == pytest.approx(seconds, abs=1e-3)
    assert table["start_s"][row] == 0


def test_recordings_without_sound_are_listed_with_the_reason(whole):
  _, bad = whole
  assert [record["id"] for record in bad] == [
    "site0/broken.wav",
    "site1/silent.flac",
  ]
  assert "cannot decode" in bad[0]["reason"]
  assert "silent" in bad[1]["reason"]


@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_other_formats_hold_the_same_table(
  run, folder, whole, suffix, tmp_path
):
  output = tmp_path / f"out{suffix}"
  rows = finish(job(run, folder, output), output)
  if suffix == ".npz":
    stored = np.load(output)
  else:
    import zarr

    stored = zarr.open_group(output, mode="r")
  table, _ = whole
  assert rows == len(table["id"]) == 7
  assert set(stored) == set(table)
  assert list(stored["id"][:]) == table["id"]
  for name in ("embedding", "start_s", "end_s"):
    np.testing.assert_array_equal(stored[name][:], np.array(table[name]))
  # The shards are gone once they are joined.
  assert sorted(p.name for p in tmp_path.iterdir()) == [output.name]


def test_frames_have_a_row_each_and_segments_too(run, folder, tmp_path):
  encoder = encoder_files.load_encoder(run)
  output = tmp_path / "frames.parquet"
  finish(job(run, folder, output, frames=True, hop_ms=80.0), output)
  table = pyarrow.parquet.read_table(output).to_pydict()
  expected = encoder.embed(folder / "site1/3.wav", hop_ms=80)
  rows = [i for i, name in enumerate(table["id"]) if name == "site1/3.wav"]
  times = np.array(table["timestamp_s"])[rows]
  np.testing.assert_allclose(times, expected.timestamps_s)
  frames = np.array(table["embedding"])[rows]
  np.testing.assert_allclose(frames, expected.frames, atol=2e-5)

  output = tmp_path / "segments.parquet"
  finish(job(run, folder, output, segment_s=1.5, segment_hop_s=1.0), output)
  table = pyarrow.parquet.read_table(output).to_pydict()
  rows = [i for i, name in enumerate(table["id"]) if name == "site1/3.wav"]
  assert [table["start_s"][i] for i in rows] == [0.0, 1.0, 2.0, 3.0]
  assert [table["end_s"][i] for i in rows] == [1.5, 2.5, 3.5, 4.0]
  samples, _ = soundfile.read(folder / "site1/3.wav", dtype="float32")
  expected = encoder.embed(samples[32_000:56_000], RATE_HZ).embedding
  found = np.array(table["embedding"][rows[2]])
  np.testing.assert_allclose(found, expected, atol=2e-5)
  assert "site0/broken.wav" not in table["id"]


def test_a_folder_of_another_job_is_not_mixed_up(run, folder, tmp_path):
  output = tmp_path / "out.parquet"
  job(run, folder, output)
  job(run, folder, output, num_threads=1, batch_size=16)
  with pytest.raises(ValueError, match=r"overlap was 0\.0, is now 0\.5"):
    job(run, folder, output, overlap=0.5)
  with pytest.raises(ValueError, match="recordings was 9, is now 4"):
    job(run, folder / "site1", output)
  # Other recordings of the same names, and another normalisation.
  twin = shutil.copytree(folder, tmp_path / "twin")
  with pytest.raises(ValueError, match="recordings_sha256 was"):
    job(run, twin, output)
  louder = tiny.write_run(tmp_path / "louder", **{"spectrogram.std": 9.0})
  with pytest.raises(ValueError, match="encoder_fingerprint was"):
    job(louder, folder, output)
  other = tiny.write_run(tmp_path / "other", seed=1)
  with pytest.raises(ValueError, match="encoder_fingerprint was"):
    job(other, folder, output)


def command(run, folder, output, *more):
  return [
    *(sys.executable, "-m", "audiomosaic_jax.embed", f"--encoder={run}"),
    *(f"--input={folder}", f"--output={output}", "--batch_size=8", *more),
  ]


ENVIRONMENT = os.environ | {
  "JAX_PLATFORMS": "cpu",
  "JAX_NUM_CPU_DEVICES": "1",
  "PYTHONPATH": str(ROOT),
}


def test_a_killed_job_goes_on_where_it_was(run, folder, whole, tmp_path):
  output = tmp_path / "out.npz"
  arguments = command(
    run, folder, output, "--shard_size=1", "--max_bad_fraction=0.5"
  )
  parts = tmp_path / "out.npz.parts"
  job = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE)
  deadline = time.monotonic() + 120
  while len(list(parts.glob("part-*"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.005)
  job.send_signal(signal.SIGKILL)
  job.communicate()
  before = {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*")}
  assert 2 <= len(before) < 9 and not output.exists()

  # A second process that only looks: what was there is not computed again.
  done = subprocess.run(
    arguments, env=ENVIRONMENT, capture_output=True, text=True, check=True
  )
  assert f"{len(before)} of 9 shards are there" in done.stdout
  assert "2 recordings were left out" in done.stdout
  table, _ = whole
  stored = np.load(output)
  assert list(stored["id"]) == table["id"]
  np.testing.assert_allclose(stored["embedding"], table["embedding"], atol=2e-5)
  lines = pathlib.Path(f"{output}.bad.jsonl").read_text().splitlines()
  assert [json.loads(line)["id"] for line in lines] == [
    "site0/broken.wav",
    "site1/silent.flac",
  ]


def test_two_processes_share_the_shards(run, folder, whole, tmp_path):
  output = tmp_path / "out.npz"
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  processes = [
    subprocess.Popen(
      command(run, folder, output, "--shard_size=2", "--max_bad_fraction=0.5"),
      env=ENVIRONMENT
      | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=240) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  # Each had a bar of its own shards: 2 + 2 + 1 and 2 + 2 recordings.
  assert "5/5" in outputs[0][1] and "4/4" in outputs[1][1]
  table, _ = whole
  stored = np.load(output)
  assert list(stored["id"]) == table["id"]
  np.testing.assert_allclose(stored["embedding"], table["embedding"], atol=2e-5)


def test_too_many_bad_recordings_fail_after_the_good_are_written(
  run, folder, tmp_path
):
  output = tmp_path / "out.parquet"
  failed = subprocess.run(
    command(run, folder / "site0", output),
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert failed.returncode == 1
  assert "1 of 5 recordings have no usable sound" in failed.stderr
  assert pyarrow.parquet.read_table(output).num_rows == 4


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--output=out.csv"], r"ends in '\.csv'; use one of \.parquet"),
    (["--output={tmp_path}/there.npz"], r"there\.npz exists; remove it"),
    (["--input=nowhere"], "nowhere: no audio there"),
    (["--segment_s=2", "--segment_hop_s=3"], "segment_hop_s is 3; use"),
    (["--segment_hop_s=3"], "segment_hop_s is 3 but segment_s is 0"),
    (["--overlap=1.5"], r"overlap is 1\.5; use a part"),
    (["--frames", "--hop_ms=50"], "hop_ms is 50, which does not divide"),
    (["--encoder=nowhere"], "give a workdir"),
    (["stray"], "unexpected arguments: stray"),
  ],
)
def test_a_mistake_is_told_before_anything_is_computed(
  run, folder, tmp_path, more, message
):
  (tmp_path / "there.npz").write_bytes(b"")
  more = [item.format(tmp_path=tmp_path) for item in more]
  arguments = command(run, folder, tmp_path / "out.parquet", *more)[2:]
  with flagsaver.flagsaver():
    rest = flags.FLAGS(arguments)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      embed.run(rest[1:])
  # Or the same command without the mistake would be of another job.
  assert not list(tmp_path.rglob("_about.json"))


def test_names_that_are_no_text_are_embedded_and_told(run, tmp_path, capsys):
  folder = tmp_path / os.fsdecode(b"d\xe9j\xe0")
  folder.mkdir()
  name = os.fsdecode(b"caf\xe9.wav")
  soundfile.write(os.fsencode(folder / name), tiny.noise(1.0), RATE_HZ)
  (folder / os.fsdecode(b"broken\xe9.wav")).write_bytes(b"no audio")
  arguments = command(
    run, folder, tmp_path / "out.parquet", "--max_bad_fraction=1"
  )
  with flagsaver.flagsaver():
    flags.FLAGS(arguments[2:])
    assert embed.run([]) == (1, 2)
  table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
  assert table["id"] == ["caf\ufffd.wav"]
  assert "broken\ufffd.wav: cannot decode" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("error", "told"),
  [
    (ValueError("overlap is 2"), "error: overlap is 2"),
    (RuntimeError("out of memory"), "RuntimeError: out of memory"),
  ],
)
def test_one_of_several_processes_that_fails_waits_for_none(
  error, told, monkeypatch, capsys
):
  def fail(options):
    raise error

  def leave(status):
    raise SystemExit(f"left at once with {status}")

  monkeypatch.setattr(embed, "run", fail)
  monkeypatch.setattr(embed.cluster, "initialize_distributed", lambda: True)
  monkeypatch.setattr(embed.jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(embed.cluster.os, "_exit", leave)
  with flagsaver.flagsaver(keep_freed_memory=False):
    flags.FLAGS(["embed"])
    with pytest.raises(SystemExit, match="left at once with 1"):
      embed.main(["embed"])
  assert told in capsys.readouterr().err


def test_apache_beam_computes_the_same_shards(run, folder, whole, tmp_path):
  pytest.importorskip("apache_beam", reason="needs the extra beam")
  output = tmp_path / "out.npz"
  subprocess.run(
    command(
      *(run, folder, output, "--shard_size=2", "--max_bad_fraction=0.5"),
      *("--runner=DirectRunner", "--", "--direct_num_workers=2"),
      "--direct_running_mode=multi_processing",
    ),
    env=ENVIRONMENT,
    check=True,
    capture_output=True,
  )
  table, _ = whole
  stored = np.load(output)
  assert list(stored["id"]) == table["id"]
  np.testing.assert_allclose(stored["embedding"], table["embedding"], atol=2e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_hours_of_sound_need_little_more_than_their_frames(tmp_path):
  # Windows of ten seconds and 128 bands, as the published encoders have.
  run = tiny.write_run(
    tmp_path / "run",
    **{
      "fbank.num_mel_bins": 128,
      "spectrogram.num_frames": 1024,
      "model.encoder.width": 128,
    },
  )
  path = tmp_path / "long.flac"
  minute = tiny.noise(60.0)
  with soundfile.SoundFile(path, "w", RATE_HZ, 1) as file:
    for _ in range(180):
      file.write(minute)
  output = tmp_path / "out.parquet"
  program = (
    "import resource, subprocess, sys\n"
    "subprocess.run(sys.argv[1:], check=True)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, *command(run, path, output, "--frames")],
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
    check=True,
  )
  peak_bytes = 1024 * int(done.stdout.splitlines()[-1])
  # Measured: 0.92 GB. Their samples would be 0.7 more.
  assert peak_bytes < 1.2e9
  table = pyarrow.parquet.read_table(output)
  # A column of 16 frames is 160 ms; the last frame ends with the recording.
  assert table.num_rows == -(-(1 + (180 * 60 * RATE_HZ - 400) // 160) // 16)
  print(f"{peak_bytes / 1e6:.0f} MB")
