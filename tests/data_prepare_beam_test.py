"""The same shards by Apache Beam, and into and out of a bucket."""

import os
import subprocess
import sys

import fake_bucket
import pytest
from prepared import (
  RATE_HZ,
  open_paths,
  prepare,
  write_folder,
)

from audiomosaic_jax.data import beam


def prepare_command(*arguments):
  return [
    *(sys.executable, "-m", "audiomosaic_jax.data.prepare"),
    *(f"--sample_rate_hz={RATE_HZ}", "--num_frames=64", "--num_shards=2"),
    *("--shard_mb=1", "--num_workers=2", *arguments),
  ]


def run(arguments, environment=()):
  done = subprocess.run(
    arguments,
    env={**os.environ, **dict(environment)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  return done.stdout


@pytest.fixture
def whole(tmp_path):
  """A folder, and what is prepared of it in this process."""
  folder = write_folder(tmp_path / "in") / "train"
  prepare(tmp_path / "whole" / "data", open_paths(folder))
  return folder, tmp_path / "whole" / "data"


def files_of(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_apache_beam_writes_the_same_shards(whole, tmp_path):
  pytest.importorskip("apache_beam", reason="needs the extra beam")
  folder, expected = whole
  output = tmp_path / "beam" / "data"
  run(
    prepare_command(
      *(f"--input={folder}", f"--output={output}", "--runner=DirectRunner"),
      *("--", "--direct_num_workers=2"),
      "--direct_running_mode=multi_processing",
    )
  )
  assert files_of(output) == files_of(expected)


def test_without_apache_beam_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(
    ImportError, match=r"--runner=Any .*audiomosaic-jax\[beam"
  ):
    beam.run_shards([0], print, "Any", [])


def test_a_bucket_is_written_and_read_like_a_folder(whole):
  pytest.importorskip("gcsfs", reason="needs the extra gcs")
  folder, expected = whole
  with fake_bucket.serve() as server:
    for path in folder.rglob("*.wav"):
      name = path.relative_to(folder).as_posix()
      server.objects[f"in/{name}"] = path.read_bytes()
    environment = {
      "STORAGE_EMULATOR_HOST": server.url,
      "CLOUD_STORAGE_EMULATOR_ENDPOINT": server.url,
      # Or gcsfs looks for an account, and for kinds of buckets.
      "NO_GCE_CHECK": "true",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    arguments = prepare_command(
      "--input=gs://bucket/in", "--output=gs://bucket/data"
    )
    run(arguments, environment)
    stored = {
      name.removeprefix("data/"): content
      for name, content in server.objects.items()
      if name.startswith("data/") and "_prepare" not in name
    }
    # Of files in a bucket, only the rate of what is decoded is known.
    del stored["statistics.json"]
    assert stored == {n: files_of(expected)[n] for n in stored}
    assert len(stored) == 6
    # What is complete is not written again.
    del server.objects["data/_prepare/train-00001.json"]
    server.requests.clear()
    run(arguments, environment)
    uploads = [p for _, p in server.requests if "/upload/" in p]
    (written,) = [path for path in uploads if "array_record" in path]
    assert "00001-of-00002" in written
    code = f"""import sys
from audiomosaic_jax.data import datasets
source = datasets.make_dataset(
  "tfds", "train", data_dir="gs://bucket/data", sample_rate_hz={RATE_HZ})
print(sorted(source.ids), source[0]["waveform"].any())
assert "tensorflow" not in sys.modules
"""
    printed = run([sys.executable, "-c", code], environment)
  names = sorted(
    p.relative_to(folder).as_posix() for p in folder.rglob("*.wav")
  )
  assert printed == f"{names} True\n"
