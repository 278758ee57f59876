"""What tests of prepared audio share: sounds, jobs, and reading back."""

import csv

import numpy as np
import soundfile
from etils import epath

from audiomosaic_jax.data import (
  datasets,
  prepare_inputs,
  prepare_job,
  prepare_output,
  prepare_shards,
)

RATE_HZ = 8_000
HALF_STEP = 0.51 / 32768

# An interpreter that finds TensorFlow, and cannot import it.
NO_TENSORFLOW = """
import importlib.machinery, sys

class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] == "tensorflow":
      return importlib.machinery.ModuleSpec(name, self)
  def create_module(self, spec):
    raise ModuleNotFoundError(spec.name)

sys.meta_path.insert(0, Refuse())
"""


def write_clip(path, pitch_hz, rate_hz=RATE_HZ, seconds=0.5):
  path.parent.mkdir(parents=True, exist_ok=True)
  time_s = np.arange(int(seconds * rate_hz)) / rate_hz
  soundfile.write(path, 0.5 * np.sin(2 * np.pi * pitch_hz * time_s), rate_hz)


def write_folder(root):
  for i, name in enumerate(["cat/a", "cat/b", "dog/c", "dog/d", "dog/e"]):
    write_clip(root / "train" / f"{name}.wav", 200 + 100 * i)
  write_clip(root / "valid" / "dog" / "f.mp3", 900, 44_100)
  return root


def open_paths(*inputs, **changes):
  options = dict(
    root=None,
    label_csv=None,
    path_column="path",
    label_column=None,
    split_column=None,
    sample_rate_hz=RATE_HZ,
  )
  return prepare_inputs.open_paths(
    [str(text) for text in inputs], **{**options, **changes}
  )


def open_job(output, inputs, **changes):
  settings = dict(
    format="flac",
    sample_rate_hz=RATE_HZ,
    num_frames=64,
    shard_mb=1.0,
    num_shards=2,
    seed=0,
  )
  return prepare_job.open_job(
    epath.Path(output), inputs, prepare_job.Settings(**{**settings, **changes})
  )


def prepare(output, inputs, **changes):
  """Writes all shards in this process; returns the statistics."""
  job = open_job(output, inputs, **changes)
  for shard in job.missing():
    prepare_shards.write_shard(output, shard)
  return prepare_output.finish(job, inputs.missing)


def read(data_dir, split="train"):
  return datasets.make_dataset(
    "tfds", split, data_dir=data_dir, sample_rate_hz=RATE_HZ
  )


def by_name(source):
  return {source.ids[i]: source[i] for i in range(len(source))}


def read_ledger(output):
  with open(output / "ledger.csv", newline="") as file:
    return list(csv.DictReader(file))
