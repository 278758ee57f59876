"""Splits and folds that make sense, and the errors of those that do not."""

import collections
import json
import os

import numpy as np
import pytest
from fake_datasets import FAKES, RATE_HZ, write_clip

from audiomosaic_jax.data import supervised

OPTIONS = {
  "train": "train",
  "valid": "valid",
  "test": ("test",),
  "valid_fraction": 0.0,
  "test_fraction": 0.0,
  "fold": 0,
  "num_folds": 1,
  "seed": 0,
  "sample_rate_hz": RATE_HZ,
  "min_clip_ms": 25.0,
}


def load(root, rows, **options):
  """Writes a task of rows (label, split) and loads it."""
  text = ["path,label,split,group\n"]
  for i, (label, split) in enumerate(rows):
    write_clip(root / f"{i}.wav")
    text.append(f"{i}.wav,{label},{split},{i // 2}\n")
  (root / "labels.csv").write_text("".join(text))
  return reload(root, **options)


def reload(root, **options):
  source = {"name": "task", "data_dir": str(root)}
  return supervised.load_splits(source, **OPTIONS | options)


ROWS = [
  (label, split)
  for split in ("train", "train", "valid", "test")
  for label in ("a", "b")
]


def test_a_task_has_its_splits_and_groups(tmp_path):
  splits = load(tmp_path, ROWS)
  assert [len(s) for s in splits.named().values()] == [4, 2, 2]
  assert list(splits.named()) == ["train", "valid", "test"]
  assert splits.train.groups == ["0", "0", "1", "1"]


def test_folds_test_every_clip_once_and_keep_groups_whole(tmp_path):
  rows = [("ab"[i // 2 % 2], "train") for i in range(24)]
  tested = collections.Counter()
  for fold in range(3):
    options = {"fold": fold, "num_folds": 3, "valid_fraction": 0.25}
    splits = load(tmp_path, rows, **options)
    parts = [set(s.groups) for s in splits.named().values()]
    assert not (parts[0] & parts[1] or parts[0] & parts[2])
    assert not parts[1] & parts[2]
    assert sum(len(s) for s in splits.named().values()) == 24
    tested.update(splits.tests["test"].ids)
  assert set(tested.values()) == {1} and len(tested) == 24


def test_parts_are_balanced_and_a_function_of_the_seed():
  labels = [(i % 3,) for i in range(120)]
  part = supervised.assign_parts(labels, None, 4, 0)
  for number in range(4):
    chosen = np.array(labels)[part == number, 0]
    assert np.bincount(chosen).tolist() == [10, 10, 10]
  np.testing.assert_array_equal(
    part, supervised.assign_parts(labels, None, 4, 0)
  )
  assert (part != supervised.assign_parts(labels, None, 4, 1)).any()


def test_a_data_set_with_folds_of_its_own_uses_them(tmp_path):
  arguments, _ = FAKES["esc50"]
  source = {"name": "esc50", "max_missing_fraction": 0.0}
  source |= arguments(tmp_path)
  splits = supervised.load_splits(
    source,
    **OPTIONS
    | {
      "train": "not_fold{fold}",
      "valid": "",
      "test": ("fold{fold}",),
      "num_folds": 5,
      "fold": 1,
    },
  )
  assert all(name.startswith("2-") for name in splits.tests["test"].ids)
  assert not any(name.startswith("2-") for name in splits.train.ids)


def test_a_class_that_no_training_clip_has_is_an_error_of_its_line(tmp_path):
  with pytest.raises(ValueError, match=r"labels\.csv, line 10 has label 'c'"):
    load(tmp_path, [*ROWS, ("c", "test")])


def test_a_split_of_one_class_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"split 'test'.*all of one class \(a\)"):
    load(tmp_path, [*ROWS[:-1]])


def test_a_clip_shorter_than_a_frame_is_an_error_of_its_line(tmp_path):
  load(tmp_path, ROWS)
  write_clip(tmp_path / "2.wav", seconds=0.01)
  with pytest.raises(
    ValueError, match=r"labels\.csv, line 4: 2\.wav lasts 10\.0 ms.*25 ms"
  ):
    reload(tmp_path)


def test_a_clip_without_a_class_folder_is_an_error(tmp_path):
  for name in ("train/a/1", "train/b/1", "train/loose", "test/a/1", "test/b/1"):
    write_clip(tmp_path / f"{name}.wav")
  source = {"name": "folder", "data_dir": tmp_path, "class_names": None}
  with pytest.raises(ValueError, match=r"loose\.wav has no label"):
    supervised.load_splits(source, **OPTIONS | {"valid": ""})


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("path,class,split\n", "line 1: no column 'label'"),
    ("path,label,split\n0.wav,,train\n", "line 2: column 'label' is empty"),
    ("path,label,split\n0.wav,a,train\n", "no row has split='test'"),
  ],
)
def test_a_wrong_table_is_an_error_of_its_line(text, message, tmp_path):
  write_clip(tmp_path / "0.wav")
  (tmp_path / "labels.csv").write_text(text)
  with pytest.raises(ValueError, match=message):
    reload(tmp_path)


def test_a_folder_without_a_table_says_what_a_task_is(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"columns path, label, split"):
    reload(tmp_path)


def test_more_parts_than_groups_are_refused():
  with pytest.raises(ValueError, match=r"2 groups .* 3 parts"):
    supervised.assign_parts([(0,)] * 6, ["x", "y"] * 3, 3, 0)


def test_a_validation_share_above_a_half_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"valid_fraction 0\.7"):
    load(tmp_path, ROWS, valid="", valid_fraction=0.7)


def test_folds_are_cut_of_all_splits_that_are_used(tmp_path):
  rows = [("ab"[i % 2], "train" if i < 8 else "test") for i in range(12)]
  rows += [("a", "unused"), ("b", "unused")]
  used = {f"{i}.wav" for i in range(12)}
  load(tmp_path, rows)
  for fold in range(3):
    splits = reload(tmp_path, fold=fold, num_folds=3)
    assert set(splits.train.ids) | set(splits.tests["test"].ids) == used


def test_folds_of_manifests_are_cut_of_those_that_are_named(tmp_path):
  (tmp_path / "classes.csv").write_text(
    "index,mid,display_name\n0,/m/1,Cat\n1,/m/2,Dog\n"
  )
  for split, numbers in (("train", range(8)), ("eval", range(8, 12))):
    entries = [
      {
        "wav": str(write_clip(tmp_path / f"{i}.wav")),
        "labels": f"/m/{i % 2 + 1}",
      }
      for i in numbers
    ]
    (tmp_path / f"{split}.json").write_text(json.dumps({"data": entries}))
  source = {
    "name": "manifest",
    "data_dir": str(tmp_path),
    "label_csv": str(tmp_path / "classes.csv"),
    "root": None,
  }
  splits = supervised.load_splits(
    source, **OPTIONS | {"valid": "", "test": ("eval",), "num_folds": 2}
  )
  assert len(splits.train) + len(splits.tests["test"]) == 12
  assert {len(splits.train), len(splits.tests["test"])} == {6}


def test_the_length_of_a_file_whose_name_is_no_text_is_known(tmp_path):
  source = load(tmp_path, ROWS).train
  name = os.fsdecode(b"caf\xe9.wav")
  os.rename(tmp_path / "0.wav", os.path.join(tmp_path, name))
  source.paths[0] = name
  lengths = supervised.lengths_s(source)
  assert lengths[0] == lengths[1] > 0
