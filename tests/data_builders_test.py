"""What the TFDS builders write reads back the same, without TensorFlow."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from audiomosaic_jax.data import datasets, pipeline, wrappers
from audiomosaic_jax.data.builders import (
  audio_folder,
  audiomosaic_demo,
  packing,
)

RATE_HZ = 8_000


def clip(pitch_hz, rate_hz=RATE_HZ, seconds=0.5):
  time_s = np.arange(int(seconds * rate_hz)) / rate_hz
  return 0.5 * np.sin(2 * np.pi * pitch_hz * time_s)


@pytest.fixture
def folder(tmp_path):
  for i, name in enumerate(["cat/a", "cat/b", "dog/c", "dog/d", "dog/e"]):
    path = tmp_path / "in" / "train" / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, clip(200 + 100 * i), RATE_HZ, subtype="PCM_16")
  path = tmp_path / "in" / "valid" / "dog" / "f.mp3"
  path.parent.mkdir(parents=True)
  soundfile.write(path, clip(900, 44_100), 44_100)
  return tmp_path / "in"


def make_splits(inputs, **changes):
  options = dict(
    root=None,
    label_csv=None,
    path_column="path",
    label_column=None,
    split_column=None,
    sample_rate_hz=RATE_HZ,
  )
  return audio_folder.make_splits(
    [str(text) for text in inputs], **{**options, **changes}
  )


def write(splits, output, builder=audio_folder.AudioFolder, bad=0.0):
  return packing.write(
    builder(
      splits=splits,
      data_dir=output,
      sample_rate_hz=RATE_HZ,
      max_bad_fraction=bad,
      num_threads=2,
    )
  )


def read(data_dir, split="train"):
  return datasets.make_dataset(
    "tfds", split, data_dir=data_dir, sample_rate_hz=RATE_HZ
  )


def by_name(source):
  return {source.ids[i]: source[i] for i in range(len(source))}


def assert_round_trip(packed, original):
  """Same names, labels and, within half a 16-bit step, samples."""
  assert packed.class_names == original.class_names
  packed, original = by_name(packed), by_name(original)
  assert set(packed) == set(original)
  for name, element in original.items():
    np.testing.assert_array_equal(packed[name]["label"], element["label"])
    np.testing.assert_allclose(
      packed[name]["waveform"], element["waveform"], atol=0.51 / 32768
    )


def test_a_folder_reads_back_with_the_classes_of_all_splits(folder, tmp_path):
  splits = make_splits([f"train={folder}/train", f"valid={folder}/valid"])
  output = tmp_path / "out"
  directory = write(splits, output)
  assert directory == output / "audio_folder" / "1.0.0"
  for name, original in splits.items():
    for data_dir in (output, directory):
      assert_round_trip(read(data_dir, name), original)
  source = read(output)
  assert sorted(source.labels.tolist()) == [0, 0, 1, 1, 1]
  assert [source[i]["id"] for i in range(5)] == list(range(5))
  assert len(read(output, "train[:40%]")) == 2
  with pytest.raises(ValueError, match="no split 'test'; it has train, valid"):
    read(output, "test")
  with pytest.raises(FileExistsError, match="delete it or choose another"):
    write(splits, output)


def test_packed_audio_trains(folder, tmp_path):
  write(make_splits([folder / "train"]), tmp_path / "out")
  iterator = pipeline.train_iterator(
    read(tmp_path / "out"),
    seed=0,
    batch_size=5,
    clip_samples=1000,
    crop="random",
    pad="pad",
    process_index=0,
    process_count=1,
    num_threads=4,
    prefetch_size=4,
    num_workers=0,
    weights=None,
  )
  batch = next(iterator)
  iterator.close()
  assert sorted(batch["id"].tolist()) == list(range(5))
  assert batch["waveform"].any(axis=1).all()


def test_a_manifest_stays_multi_hot(folder, tmp_path):
  (folder / "classes.csv").write_text(
    "index,mid,display_name\n0,/m/1,Cat\n1,/m/2,Dog\n2,/m/3,Rain\n"
  )
  entries = [
    {"wav": "train/cat/a.wav", "labels": "/m/1"},
    {"wav": "train/dog/c.wav", "labels": "/m/2,/m/3"},
  ]
  (folder / "train.json").write_text(json.dumps({"data": entries}))
  with pytest.raises(ValueError, match="--label_csv"):
    make_splits([folder / "train.json"])
  splits = make_splits(
    [f"train={folder}/train.json"], label_csv=str(folder / "classes.csv")
  )
  write(splits, tmp_path / "out")
  source = read(tmp_path / "out")
  assert_round_trip(source, splits["train"])
  assert source.labels.dtype == np.float32 and source.labels.shape == (2, 3)


def test_an_unlabelled_folder_stays_unlabelled(folder, tmp_path):
  splits = make_splits([folder / "train" / "cat"])
  write(splits, tmp_path / "out")
  assert_round_trip(read(tmp_path / "out"), splits["train"])
  assert read(tmp_path / "out").labels.tolist() == [-1, -1]


def test_the_columns_of_a_csv_name_splits_and_classes(folder):
  table = folder / "t.csv"
  table.write_text(
    "path,kind,fold\ntrain/cat/a.wav,cat,fold1\ntrain/dog/c.wav,dog,fold2\n"
  )
  splits = make_splits([table], label_column="kind", split_column="fold")
  assert {n: s.labels.tolist() for n, s in splits.items()} == {
    "fold1": [0],
    "fold2": [1],
  }
  with pytest.raises(ValueError, match="split 'train' is named twice"):
    make_splits([folder / "train", folder / "valid"])


def test_bad_clips_are_left_out_up_to_a_share(folder, tmp_path):
  (folder / "train" / "cat" / "b.wav").write_bytes(b"garbage")
  splits = make_splits([folder / "train"])
  with pytest.raises(
    wrappers.TooManyBadClipsError, match=r"1 of 5 clips of split train"
  ):
    write(splits, tmp_path / "strict")
  write(splits, tmp_path / "lenient", bad=0.2)
  names = set(by_name(read(tmp_path / "lenient")))
  assert names == {"cat/a.wav", "dog/c.wav", "dog/d.wav", "dog/e.wav"}


def test_the_demo_reads_back(tmp_path):
  def few(split, *, sample_rate_hz):
    source = datasets.demo(split, sample_rate_hz=sample_rate_hz)
    return wrappers.SubsetSource(source, [0, len(source) - 1])

  splits = audiomosaic_demo.splits(RATE_HZ, few)
  assert set(splits) == set(datasets.DEMO_SPLITS)
  write(splits, tmp_path, audiomosaic_demo.AudiomosaicDemo)
  for name, original in splits.items():
    assert_round_trip(read(tmp_path, name), original)
  assert read(tmp_path, "pretrain").labels.tolist() == [-1, -1]


def test_a_folder_of_several_data_sets_asks_which(tmp_path):
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "dataset_info.json").write_text("{}")
  with pytest.raises(ValueError, match=r"several data sets; .*/two"):
    read(tmp_path)


@pytest.mark.parametrize("module", ["audio_folder", "audiomosaic_demo"])
def test_the_builders_explain_themselves(module):
  result = subprocess.run(
    [sys.executable, "-m", f"audiomosaic_jax.data.builders.{module}", "--help"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert "--output" in result.stdout and "python -m" in result.stdout


def test_the_command_packs_a_folder_without_tensorflow(folder, tmp_path):
  code = """
import runpy, sys
try:
  runpy.run_module("audiomosaic_jax.data.builders.audio_folder",
                   run_name="__main__", alter_sys=True)
finally:
  print("tensorflow" in sys.modules, "flax" in sys.modules)
"""
  output = tmp_path / "out"
  result = subprocess.run(
    [
      *(sys.executable, "-c", code),
      f"--input={folder}/train",
      f"--output={output}",
      f"--sample_rate_hz={RATE_HZ}",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.stdout.endswith("False False\n"), result.stderr
  assert f"wrote {output}" in result.stdout
  assert "5/5" in result.stderr
  assert_round_trip(read(output), make_splits([folder / "train"])["train"])
