"""The table of the splits, what it warns of, and splits.csv as a table."""

import csv

import pytest
from data_own_clips_test import load, source, touch, write_table
from fake_datasets import write_clip

from audiomosaic_jax import split_summary
from audiomosaic_jax.data import supervised
from configs import finetune as configs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Returns a folder of two classes of 0.1 s clips, two of a recording."""
  root = tmp_path_factory.mktemp("clips")
  for label in ("cat", "dog"):
    for recording in range(4):
      for cut in range(2):
        write_clip(root / label / f"{label}{recording}_{cut}.wav")
  return root


def config_of(root):
  config = configs.get_config("dataset=folder")
  config.data.source.data_dir = str(root)
  return config


def seconds_of(splits):
  return {n: supervised.lengths_s(s) for n, s in splits.named().items()}


def rows_of(path):
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


def test_the_table_counts_clips_groups_and_seconds_of_every_class(clips):
  splits = load(clips, r"(.*)_\d")
  table = split_summary.table(splits, seconds_of(splits))
  assert table.columns == [
    *("class", "train", "groups", "seconds", "valid", "groups", "seconds"),
    *("test", "groups", "seconds"),
  ]
  assert table.rows == [
    ["all", "8", "4", "1", "4", "2", "0", "4", "2", "0"],
    ["cat", "4", "2", "0", "2", "1", "0", "2", "1", "0"],
    ["dog", "4", "2", "0", "2", "1", "0", "2", "1", "0"],
  ]


def test_the_file_as_a_table_of_labels_keeps_the_splits(
  clips, tmp_path, capsys
):
  splits = load(clips, r"(.*)_\d")
  split_summary.report(splits, config_of(clips), tmp_path, fold=0)
  rows = rows_of(tmp_path / "splits.csv")
  assert len(rows) == 16
  assert rows[0]["seconds"] == "0.100"
  (clips / "labels.csv").write_text((tmp_path / "splits.csv").read_text())
  # Of another seed, but now they are given.
  again = load(clips, seed=7)
  (clips / "labels.csv").unlink()
  for name, part in splits.named().items():
    assert sorted(again.named()[name].ids) == sorted(part.ids)
    assert set(again.named()[name].groups) == set(part.groups)
  printed = capsys.readouterr().out
  assert f"splits: {tmp_path / 'splits.csv'}" in printed
  assert "note:" not in printed


def test_folders_of_splits_are_paths_of_the_file(tmp_path):
  for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1"):
    write_clip(tmp_path / f"{name}.wav")
  for name in ("test/a/0", "test/b/0"):
    write_clip(tmp_path / f"{name}.wav")
  splits = load(tmp_path, valid_fraction=0.0)
  split_summary.report(splits, config_of(tmp_path), tmp_path / "run", fold=0)
  rows = rows_of(tmp_path / "run" / "splits.csv")
  assert [row["path"] for row in rows[:2]] == [
    *("train/a/0.wav", "train/a/1.wav")
  ]
  assert rows[0]["clip"] == "a/0.wav"


def test_cuts_of_files_have_their_spans_in_the_file(tmp_path):
  rows = []
  for i in range(8):
    write_clip(tmp_path / f"{i}.wav", seconds=0.4)
    rows += [(f"{i}.wav", "ab"[i % 2], t, t + 0.1) for t in (0.0, 0.2)]
  write_table(tmp_path, ("path", "label", "start_s", "end_s"), rows)
  splits = load(tmp_path)
  seconds = seconds_of(splits)
  split_summary.write(tmp_path / "splits.csv", splits, seconds, str(tmp_path))
  written = rows_of(tmp_path / "splits.csv")
  spans = {(r["path"], float(r["start_s"]), float(r["end_s"])) for r in written}
  assert spans == {(path, start, end) for path, _, start, end in rows}
  assert {row["seconds"] for row in written} == {"0.100"}


def test_every_fold_has_a_file(clips, tmp_path):
  config = config_of(clips)
  config.folds = 2
  for fold in range(2):
    splits = load(clips, num_folds=2, fold=fold, valid_fraction=0.0)
    split_summary.report(splits, config, tmp_path, fold)
  tested = [
    {row["clip"] for row in rows_of(path) if row["split"] == "test"}
    for path in sorted(tmp_path.glob("splits_fold_*.csv"))
  ]
  assert len(tested) == 2 and not tested[0] & tested[1]


def test_clips_without_groups_are_told_of(clips, tmp_path, capsys):
  split_summary.report(load(clips), config_of(clips), tmp_path, fold=0)
  assert "recording of its own" in capsys.readouterr().out


def test_other_splits_than_before_are_told_of(clips, tmp_path, capsys):
  for seed, count in ((0, 0), (0, 0), (1, 1)):
    splits = load(clips, r"(.*)_\d", seed=seed)
    split_summary.report(splits, config_of(clips), tmp_path, fold=0)
    assert capsys.readouterr().out.count("is not what it was") == count


def test_a_class_that_is_not_tested_is_told_of(tmp_path):
  names = [f"{c}/{c}{i}_1" for c in ("cat", "dog") for i in range(4)]
  touch(tmp_path, *names, "owl/o1_1", "owl/o1_2")
  (note,) = split_summary.notes(load(tmp_path, r"(.*)_\d"))
  assert "trained and never tested: 1 classes, such as owl" in note
  assert "whose 2 clips are one group, that of owl/o1_1.wav" in note


def test_groups_on_both_sides_are_told_of(tmp_path):
  rows = [
    (f"{split}{i}.wav", "ab"[i % 2], split, group)
    for split, group in (("train", "x"), ("valid", "y"), ("test", "x"))
    for i in range(4)
  ]
  touch(tmp_path, *(name.removesuffix(".wav") for name, *_ in rows))
  write_table(tmp_path, ("path", "label", "split", "group"), rows)
  splits = supervised.load_splits(
    source(tmp_path),
    **{"train": "train", "valid": "valid", "test": ("test",), "seed": 0},
    **{"valid_fraction": 0.0, "test_fraction": 0.0, "fold": 0, "num_folds": 1},
    **{"sample_rate_hz": 8_000, "min_clip_ms": 25.0},
  )
  (note,) = split_summary.notes(splits)
  assert "1 groups, such as 'x', are in train and in test" in note
