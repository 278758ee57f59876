"""Folders as people have them: found, cut without leaks, or refused with a fix.

Most clips are empty files here: nothing is decoded to make splits of them.
"""

import logging
import shutil

import numpy as np
import pytest
from fake_datasets import RATE_HZ, write_clip

from audiomosaic_jax.data import own_clips, sources, supervised

OPTIONS = {
  **{"train": "train", "valid": "valid", "test": ("test",), "seed": 0},
  **{"valid_fraction": 0.25, "test_fraction": 0.25, "fold": 0, "num_folds": 1},
  **{"sample_rate_hz": RATE_HZ, "min_clip_ms": 25.0},
}


def source(root, **changes):
  arguments = {"name": "folder", "data_dir": str(root), "class_names": None}
  return {**arguments, "group_pattern": "", **changes}


def load(root, group_pattern="", **options):
  arguments = source(root, group_pattern=group_pattern)
  return supervised.load_splits(arguments, **OPTIONS | options)


def touch(root, *names):
  for name in names:
    path = root / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  return root


@pytest.fixture
def classes(tmp_path):
  """Returns a folder of two classes, each of five recordings of three cuts."""
  names = [
    f"{label}/{label[0]}{recording}_{cut}"
    for label in ("cat", "dog")
    for recording in range(5)
    for cut in range(3)
  ]
  return touch(tmp_path, *names)


def test_a_folder_of_classes_is_cut_into_splits_of_whole_recordings(classes):
  splits = load(classes, r"(.*)_\d")
  parts = {name: set(s.groups) for name, s in splits.named().items()}
  assert list(parts) == ["train", "valid", "test"]
  assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 10
  clips = [name for s in splits.named().values() for name in s.ids]
  assert sorted(clips) == sources.list_audio(classes)
  for part in splits.named().values():
    assert part.class_names == ("cat", "dog")
    counts = np.bincount(part.labels)
    assert counts[0] == counts[1] > 0


def test_without_a_pattern_every_clip_is_a_group(classes):
  splits = load(classes)
  assert splits.train.groups is None
  assert [len(s) for s in splits.named().values()] == [16, 6, 8]


def test_the_cut_is_a_function_of_the_seed(classes):
  def cut(seed):
    found = load(classes, r"(.*)_\d", seed=seed).named()
    return {name: tuple(s.ids) for name, s in found.items()}

  assert cut(0) == cut(0) != cut(1)


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
  touch(
    *(tmp_path, "train/a/1", "train/a/2", "train/b/1", "train/b/2"),
    *("Validation/a/1", "Validation/b/1", "test/a/1", "test/b/1"),
  )
  splits = load(tmp_path)
  assert [len(s) for s in splits.named().values()] == [4, 2, 2]
  assert splits.valid.ids == ["a/1.wav", "b/1.wav"]


def test_folders_without_a_validation_split_have_it_from_training(tmp_path):
  names = [f"train/{label}/{i}" for label in "abc" for i in range(4)]
  # A class that nothing is tested of is no error.
  touch(tmp_path, *names, "test/a/0", "test/b/0")
  splits = load(tmp_path)
  assert [len(s) for s in splits.named().values()] == [9, 3, 2]
  assert np.bincount(splits.valid.labels).tolist() == [1, 1, 1]
  assert splits.tests["test"].class_names == ("a", "b", "c")
  assert load(tmp_path, valid="", valid_fraction=0.0).valid is None


def test_folds_are_of_the_clips_of_all_folders(tmp_path):
  names = [
    f"{s}/{c}/{i}" for s in ("train", "test") for c in "ab" for i in "12"
  ]
  touch(tmp_path, *names)
  tested = []
  for fold in range(2):
    splits = load(tmp_path, num_folds=2, fold=fold)
    assert splits.train.class_names == ("a", "b")
    tested += [splits.tests["test"].path(i) for i in range(4)]
  assert len(set(tested)) == 8


def test_a_folder_of_clips_that_is_called_train_is_a_class(tmp_path):
  names = [f"{c}/{i}" for c in ("bus", "train", "test") for i in range(6)]
  splits = load(touch(tmp_path, *names))
  assert splits.train.class_names == ("bus", "test", "train")


def write_table(root, header, rows):
  lines = [",".join(map(str, row)) for row in [header, *rows]]
  (root / "labels.csv").write_text("\n".join(lines) + "\n")
  return root


def test_a_table_in_the_folder_has_the_labels_and_the_groups(classes):
  rows = [
    (name, "ab"[i % 5 // 3], i // 3)
    for i, name in enumerate(sources.list_audio(classes))
  ]
  write_table(classes, ("path", "label", "group"), rows)
  splits = load(classes)
  assert splits.train.class_names == ("a", "b")
  parts = [set(s.groups) for s in splits.named().values()]
  assert len(set.union(*parts)) == sum(map(len, parts)) == 10
  # An error of a clip names the line that lists it.
  tested = splits.tests["test"]
  line = 2 + [name for name, *_ in rows].index(tested.ids[0])
  where = f"{classes / 'labels.csv'}, line {line}"
  assert supervised._where(tested, 0) == where


@pytest.mark.parametrize("valid", ["dev", None])
def test_the_splits_of_a_table_are_taken_as_they_are(valid, tmp_path):
  rows = [
    (f"{split}{i}.wav", "ab"[i % 2], split)
    for split in ("Train", valid, "test")
    for i in range(4)
    if split
  ]
  touch(tmp_path, *(name.removesuffix(".wav") for name, *_ in rows))
  splits = load(write_table(tmp_path, ("path", "label", "split"), rows))
  expected = {"train": 4, "valid": 4, "test": 4}
  if valid is None:
    expected = {"train": 2, "valid": 2, "test": 4}
  assert {n: len(s) for n, s in splits.named().items()} == expected


def test_cuts_of_one_file_are_a_group(tmp_path):
  names = [f"{i}.wav" for i in range(6)]
  touch(tmp_path, *(name.removesuffix(".wav") for name in names))
  rows = [
    (name, "ab"[i % 2], start, start + 1)
    for i, name in enumerate(names)
    for start in range(3)
  ]
  write_table(tmp_path, ("path", "label", "start_s", "end_s"), rows)
  splits = load(tmp_path)
  parts = [set(s.groups) for s in splits.named().values()]
  assert set.union(*parts) == set(names)
  assert sum(map(len, parts)) == 6
  # A cut is as long as its span.
  assert supervised.lengths_s(splits.train).tolist() == [1.0] * 6


def test_a_class_of_one_recording_is_trained_and_not_tested(classes):
  touch(classes, "owl/o1_1", "owl/o1_2")
  splits = load(classes, r"(.*)_\d")
  owls = [(s.labels == 2).sum() for s in splits.named().values()]
  assert owls == [2, 0, 0]
  with pytest.raises(ValueError, match=r"'owl' are of one group.*o1_1\.wav"):
    load(classes, r"(.*)_\d", num_folds=2)


@pytest.mark.parametrize(
  ("pattern", "options", "message"),
  [
    (r"(.)", {}, "every class of .* is of one group only"),
    ("", {"test_fraction": 0.0}, "is not cut into splits.*test_fraction=0.2"),
    ("", {"test_fraction": 0.9}, "test_fraction 0.9 is not above 0, up to 0.5"),
    (r"(\d)_", {}, "fits none of 30 clips"),
  ],
)
def test_what_cannot_be_cut_is_refused(pattern, options, message, classes):
  with pytest.raises(ValueError, match=message):
    load(classes, pattern, **options)


def test_two_recordings_a_class_leave_none_to_select_by(tmp_path):
  names = [f"{c}/{c}{i}_{cut}" for c in "ab" for i in "12" for cut in "12"]
  touch(tmp_path, *names)
  with pytest.raises(ValueError, match=r"selection='last'"):
    load(tmp_path, r"(.*)_\d")
  splits = load(tmp_path, r"(.*)_\d", valid_fraction=0.0)
  assert [len(s) for s in splits.named().values()] == [4, 4]


def test_a_folder_that_is_not_named_is_not_the_working_folder():
  with pytest.raises(ValueError, match=r"data_dir is not set"):
    own_clips.find(source(""))


def test_a_split_without_the_other_is_refused(tmp_path):
  touch(tmp_path, "train/a/1", "train/b/1", "val/a/1", "val/b/1")
  with pytest.raises(ValueError, match=r"has train, val but not test; add it"):
    load(tmp_path)


def test_classes_are_named_in_one_place(classes):
  write_table(classes, ("path", "label"), [("cat/c0_0.wav", "cat")])
  with pytest.raises(
    ValueError, match=r"class_names is set, but .*labels\.csv"
  ):
    own_clips.find(source(classes, class_names=("cat",)))


def test_hidden_files_are_no_clips_and_links_are_followed(classes, tmp_path):
  names = sources.list_audio(classes)
  touch(classes, "cat/._c0_0", "__MACOSX/cat/._c0_0")
  (classes / "dog").rename(tmp_path.parent / "dogs")
  (classes / "dog").symlink_to(tmp_path.parent / "dogs")
  assert sources.list_audio(classes) == names
  assert load(classes).train.class_names == ("cat", "dog")
  shutil.rmtree(tmp_path.parent / "dogs")


def test_formats_that_are_not_read_are_told_of(classes, caplog):
  (classes / "cat" / "c9_0.m4a").touch()
  with caplog.at_level(logging.WARNING):
    load(classes)
  assert "1 files of formats that are not read" in caplog.text


def test_other_data_sets_are_asked_for_their_own_splits(tmp_path):
  arguments = {"name": "esc50", "data_dir": "", "max_missing_fraction": 0.0}
  assert own_clips.find(arguments) == (arguments, None)
  demo = {"name": "task", "data_dir": "demo"}
  assert own_clips.find(demo) == (demo, None)
  write_clip(tmp_path / "a.wav")
  rows = [("a.wav", "x", "fold1"), ("a.wav", "y", "fold2")]
  write_table(tmp_path, ("path", "label", "split"), rows)
  arguments = {"name": "task", "data_dir": str(tmp_path)}
  assert own_clips.find(arguments) == (arguments, None)
