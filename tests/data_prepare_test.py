"""What is prepared reads back the same, without TensorFlow, and is counted."""

import json
import os
import subprocess
import sys
import tarfile

import fake_datasets
import numpy as np
import pytest
import soundfile
from prepared import (
  HALF_STEP,
  NO_TENSORFLOW,
  RATE_HZ,
  by_name,
  open_job,
  open_paths,
  prepare,
  read,
  read_ledger,
  write_clip,
  write_folder,
)

from audiomosaic_jax.data import (
  audio_io,
  audit,
  datasets,
  pipeline,
  prepare_inputs,
  prepare_job,
  prepare_output,
  sources,
  tfds_source,
)


@pytest.fixture
def folder(tmp_path):
  return write_folder(tmp_path / "in")


def write_inputs(root):
  """Writes the same sounds as inputs of every kind.

  Returns:
    Kind -> (inputs, split, the source that it is of).
  """
  train = write_folder(root) / "train"
  (root / "t.csv").write_text(
    "path,kind,fold\n"
    "train/cat/a.wav,cat,1\ntrain/dog/c.wav,dog,1\ntrain/dog/d.wav,dog,2\n"
  )
  (root / "classes.csv").write_text(
    "index,mid,display_name\n0,/m/1,Cat\n1,/m/2,Dog\n2,/m/3,Rain\n"
  )
  entries = [
    {"wav": "train/cat/a.wav", "labels": "/m/1"},
    {"wav": "train/dog/c.wav", "labels": "/m/2,/m/3"},
  ]
  (root / "train.json").write_text(json.dumps({"data": entries}))
  with tarfile.open(root / "one.tar", "w") as file:
    file.add(train / "cat", "mine/cat")
  with tarfile.open(root / "two.tar", "w") as file:
    file.add(train / "dog", "./mine/dog")
  fake_datasets.write_audioset(root / "as")
  columns = dict(label_column="kind", split_column="fold")
  labels = str(root / "classes.csv")
  source = sources.FolderSource(train, class_names=None, sample_rate_hz=RATE_HZ)
  audioset = datasets.make_dataset(
    *("audioset", "full"),
    data_dir=root / "as",
    audio_dir="clips",
    max_missing_fraction=0.0,
    sample_rate_hz=RATE_HZ,
  )
  return {
    "folder": (
      open_paths(f"train={train}", f"valid={root}/valid"),
      *("train", source),
    ),
    "unlabelled": (
      open_paths(train / "dog"),
      "train",
      sources.FolderSource(
        train / "dog", class_names=None, sample_rate_hz=RATE_HZ
      ),
    ),
    "csv": (
      open_paths(root / "t.csv", **columns),
      "1",
      sources.CsvSource(
        root / "t.csv",
        root=None,
        path_column="path",
        split="1",
        class_names=None,
        sample_rate_hz=RATE_HZ,
        **columns,
      ),
    ),
    "manifest": (
      open_paths(f"train={root}/train.json", label_csv=labels),
      "train",
      sources.ManifestSource(
        root / "train.json", label_csv=labels, root=None, sample_rate_hz=RATE_HZ
      ),
    ),
    "tar": (open_paths(root / "*.tar"), "train", source),
    "audioset": (
      prepare_inputs.open_dataset(
        *("audioset", str(root / "as"), [], ["audio_dir=clips"]),
        sample_rate_hz=RATE_HZ,
      ),
      # No clip is stored twice, so this is what is called "full".
      *("unbalanced+balanced", audioset),
    ),
  }


KINDS = ("folder", "unlabelled", "csv", "manifest", "tar", "audioset")
CASES = [(kind, form) for kind in KINDS for form in prepare_job.FORMATS]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """What a process without TensorFlow reads of inputs of every kind.

  Returns:
    (kind, format) -> (what was prepared, class names, name -> (label, samples))
  """
  root = tmp_path_factory.mktemp("kinds")
  inputs = write_inputs(root / "in")
  for kind, form in CASES:
    prepare(root / f"{kind}_{form}", inputs[kind][0], format=form)
  code = f"""{NO_TENSORFLOW}
import pathlib
import grain, numpy as np, tensorflow_datasets as tfds
from audiomosaic_jax.data import datasets
for argument in sys.argv[1:]:
  folder, split = argument.rsplit(":", 1)
  source = datasets.make_dataset(
    "tfds", split, data_dir=folder, sample_rate_hz={RATE_HZ})
  data = grain.MapDataset.source(source).to_iter_dataset()
  found = {{"classes": np.array(source.class_names, object).astype(str)}}
  for element in data:
    i = int(element["id"])
    found[f"label {{source.ids[i]}}"] = element["label"]
    found[f"sound {{source.ids[i]}}"] = element["waveform"]
  np.savez(folder + ".npz", **found)
  raw = tfds.builder_from_directory(folder).as_data_source(split)
  assert len(raw) == len(source)
  assert set(raw[0]) == {{"audio", "id", "label", "name", "sample_rate"}}
assert "tensorflow" not in sys.modules
"""
  arguments = [f"{root}/{k}_{f}:{inputs[k][1]}" for k, f in CASES]
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  return {
    (kind, form): (inputs[kind], dict(np.load(f"{root}/{kind}_{form}.npz")))
    for kind, form in CASES
  }


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_every_input_reads_back_without_tensorflow(stored, kind, form):
  (_, _, source), found = stored[kind, form]
  assert found.pop("classes").tolist() == list(source.class_names)
  # Archives have the folder that they are of in the names.
  prefix = "mine/" if kind == "tar" else ""
  expected = by_name(source)
  assert len(found) == 2 * len(expected)
  for name, element in expected.items():
    np.testing.assert_array_equal(
      found[f"label {prefix}{name}"], element["label"]
    )
    np.testing.assert_allclose(
      audio_io.as_float(found[f"sound {prefix}{name}"]),
      element["waveform"],
      atol=HALF_STEP,
    )


def test_classes_are_those_of_all_splits(folder, tmp_path):
  inputs = open_paths(f"train={folder}/train", f"valid={folder}/valid")
  output = tmp_path / "Some Data" / "2.1.0"
  prepare(output, inputs)
  valid = read(output, "valid")
  assert valid.class_names == ("cat", "dog") and valid.labels.tolist() == [1]
  assert sorted(read(output).labels.tolist()) == [0, 0, 1, 1, 1]
  # Whatever the shards, ids count from 0; slices and sums are of TFDS.
  assert [read(output)[i]["id"] for i in range(5)] == list(range(5))
  assert len(read(output, "train[:40%]+valid")) == 3
  # The folder above is found, too, as TFDS nests versions.
  assert len(read(output.parent)) == 5
  with pytest.raises(ValueError, match="no split 'test'; it has train, valid"):
    read(output, "test")


def test_tfds_finds_it_by_name(folder, tmp_path):
  import tensorflow_datasets as tfds

  prepare(tmp_path / "my_birds" / "1.0.0", open_paths(folder / "train"))
  data = tfds.data_source("my_birds", split="train", data_dir=tmp_path)
  assert len(data) == 5 and data[0]["sample_rate"] == RATE_HZ


def test_integers_are_resampled_like_files(folder, tmp_path):
  names = set()
  for form in prepare_job.FORMATS:
    prepare(tmp_path / form, open_paths(folder / "train"), format=form)
    source = tfds_source.TfdsSource(
      tmp_path / form, split="train", sample_rate_hz=16_000
    )
    names |= {
      (name, e["waveform"].tobytes()) for name, e in by_name(source).items()
    }
  assert len(names) == 5  # Both formats hold the same samples.


def test_prepared_audio_trains(folder, tmp_path):
  prepare(tmp_path / "out", open_paths(folder / "train"), format="int16")
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


def test_missing_and_bad_clips_are_left_out_and_listed(folder, tmp_path):
  (folder / "train" / "cat" / "b.wav").write_bytes(b"garbage")
  soundfile.write(folder / "train" / "quiet.wav", np.zeros(800), RATE_HZ)
  (folder / "t.csv").write_text(
    "path\ntrain/cat/a.wav\ntrain/cat/b.wav\ntrain/gone.wav\ntrain/quiet.wav\n"
  )
  summary = prepare(tmp_path / "out", open_paths(folder / "t.csv"))["train"]
  ledger = {row["clip"]: row for row in read_ledger(tmp_path / "out")}
  assert {name: row["status"] for name, row in ledger.items()} == {
    "train/cat/b.wav": "unreadable",
    "train/gone.wav": "missing",
    "train/quiet.wav": "silent",
  }
  assert all(row["split"] == "train" for row in ledger.values())
  assert "cannot decode" in ledger["train/cat/b.wav"]["reason"]
  assert (summary["listed"], summary["found"], summary["usable"]) == (4, 3, 1)
  assert list(by_name(read(tmp_path / "out"))) == ["train/cat/a.wav"]


def test_clips_that_audioset_lists_and_the_folder_lacks_are_missing(tmp_path):
  fake_datasets.write_audioset(tmp_path)
  (gone,) = (tmp_path / "clips").rglob("*bbbbbbbbbbb*")
  gone.unlink()
  inputs = prepare_inputs.open_dataset(
    *("audioset", str(tmp_path), ["train=full"], ["audio_dir=clips"]),
    sample_rate_hz=RATE_HZ,
  )
  summary = prepare(tmp_path / "out", inputs)["train"]
  assert (summary["missing"], summary["usable"]) == (1, 6)
  (row,) = read_ledger(tmp_path / "out")
  assert row["clip"] == "bbbbbbbbbbb" and row["status"] == "missing"


def test_a_split_without_a_usable_clip_is_refused(folder, tmp_path):
  (folder / "valid" / "dog" / "f.mp3").write_bytes(b"garbage")
  with pytest.raises(ValueError, match="none of the 1 clips of split valid"):
    prepare(tmp_path / "out", open_paths(f"valid={folder}/valid"))
  assert len(read_ledger(tmp_path / "out")) == 1


def test_statistics_are_those_of_an_audit(folder, tmp_path):
  (folder / "train" / "cat" / "b.wav").write_bytes(b"garbage")
  found = prepare(tmp_path / "out", open_paths(folder / "train"))["train"]
  expected, _, _ = audit.audit_split(
    sources.FolderSource(
      folder / "train", class_names=None, sample_rate_hz=RATE_HZ
    ),
    split="train",
    sample_rate_hz=RATE_HZ,
    min_seconds=prepare_output.MIN_SECONDS,
    num_frames=64,
    num_threads=1,
  )
  # They add up in another order.
  assert found.pop("fbank") == pytest.approx(expected.pop("fbank"))
  assert found.pop("seconds") == pytest.approx(expected.pop("seconds"))
  assert found == expected
  path = tmp_path / "out" / "statistics.json"
  assert json.loads(path.read_text())["train"]["usable"] == 4


def test_another_job_is_refused_and_says_what_differs(folder, tmp_path):
  inputs = open_paths(folder / "train")
  output = tmp_path / "out"
  prepare(output, inputs)
  for changes in ({"format": "int16"}, {"seed": 1}, {"num_shards": 3}):
    (name,) = changes
    with pytest.raises(ValueError, match=f"another job: {name} was .* is now"):
      open_job(output, inputs, **changes)
  with pytest.raises(ValueError, match="another job: inputs was"):
    open_job(output, open_paths(f"valid={folder}/train"))
  write_clip(folder / "train" / "cat" / "new.wav", 300)
  with pytest.raises(ValueError, match=r"num_clips was .*5.* is now .*6"):
    open_job(output, open_paths(folder / "train"))
  (folder / "train" / "cat" / "a.wav").unlink()
  with pytest.raises(ValueError, match="clips_sha256 was"):
    open_job(output, open_paths(folder / "train"))
  os.rename(output / "_prepare", tmp_path / "lost")
  with pytest.raises(FileExistsError, match="delete it or choose another"):
    open_job(output, inputs)


def test_shards_have_about_the_size_that_is_wanted(folder, tmp_path):
  inputs = open_paths(folder / "train")  # 5 clips, 8000 bytes each.
  for form, shard_mb, count in [
    ("int16", 0.02, 2),
    ("int16", 0.01, 4),
    ("int16", 0.0001, 5),  # A clip each, at most.
    ("flac", 0.012, 2),
  ]:
    job = open_job(
      tmp_path / f"{form}{shard_mb}",
      inputs,
      format=form,
      shard_mb=shard_mb,
      num_shards=None,
    )
    assert len(job.shards) == count
    held = [clip.index for shard in job.shards for clip in job.clips(shard)]
    assert sorted(held) == list(range(5)) and held != list(range(5))


def test_a_job_goes_on_with_its_cut_though_today_it_would_be_another(tmp_path):
  for i in range(6):
    write_clip(tmp_path / "in" / f"{i}.wav", 200 + 100 * i)
  (tmp_path / "in" / "5.wav").write_bytes(b"garbage")
  wanted = dict(num_shards=None, format="int16", shard_mb=0.02)
  inputs, output = open_paths(tmp_path / "in"), tmp_path / "out"
  prepare(output, inputs, **wanted)
  write_clip(tmp_path / "in" / "5.wav", 700, seconds=20.0)
  other = open_job(tmp_path / "other", inputs, **wanted)
  job = open_job(output, inputs, **wanted)
  assert len(job.shards) != len(other.shards)
  assert job.missing() == []
  # To try the bad clips again, their shards' reports are deleted.
  for shard in job.shards:
    if any(clip.name == "5.wav" for clip in job.clips(shard)):
      job.report(shard).unlink()
  assert len(job.missing()) == 1
  prepare(output, inputs, **wanted)
  assert set(by_name(read(output))) == {f"{i}.wav" for i in range(6)}


def test_names_that_are_not_text_survive(tmp_path):
  name = os.fsdecode(b"caf\xe9.wav")
  write_clip(tmp_path / "in" / "a.wav", 440)
  (tmp_path / "in" / "a.wav").rename(tmp_path / "in" / name)
  prepare(tmp_path / "out", open_paths(tmp_path / "in"))
  assert list(by_name(read(tmp_path / "out"))) == [name]


def test_wrong_inputs_say_what_is_wrong(folder):
  with pytest.raises(ValueError, match="split 'train' is named twice"):
    open_paths(folder / "train", folder / "valid")
  with pytest.raises(ValueError, match="'all' cannot be the name of a split"):
    open_paths(f"all={folder}/train")
  with pytest.raises(ValueError, match="--input=train=: there is no path"):
    open_paths("train=")
  with pytest.raises(FileNotFoundError, match="no such archive"):
    open_paths(folder / "no*.tar")
  (folder / "train.json").write_text("{}")
  with pytest.raises(ValueError, match="--label_csv"):
    open_paths(folder / "train.json")
  with pytest.raises(ValueError, match="needs --data_dir"):
    prepare_inputs.open_dataset("esc50", None, [], [], sample_rate_hz=RATE_HZ)
  with pytest.raises(ValueError, match="no data set 'imagenet'"):
    prepare_inputs.open_dataset(
      "imagenet", str(folder), ["train"], [], sample_rate_hz=RATE_HZ
    )


def test_the_demo_has_the_classes_of_its_notes_in_all_splits():
  inputs = prepare_inputs.open_dataset(
    "demo", None, [], [], sample_rate_hz=RATE_HZ
  )
  assert tuple(inputs.clips) == datasets.DEMO_SPLITS
  assert len(inputs.class_names) == 10
  assert {clip.label for clip in inputs.clips["pretrain"]} == {-1}
  assert {c.label for c in inputs.clips["instruments_test"]} == set(range(10))
  assert any(clip.start_s for clip in inputs.clips["pretrain"])


def test_a_folder_of_several_data_sets_asks_which(tmp_path):
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "dataset_info.json").write_text("{}")
  with pytest.raises(ValueError, match=r"several data sets; .*/two"):
    read(tmp_path)
