"""ESC-50 and FSD50K: folds and splits, class numbers, wrong tables."""

import pytest
from fake_datasets import RATE_HZ, write_esc50, write_fsd50k

from audiomosaic_jax.data import datasets


def open_split(name, root, split, **changes):
  arguments = dict(
    data_dir=root, max_missing_fraction=0.0, sample_rate_hz=RATE_HZ
  )
  return datasets.make_dataset(name, split, **{**arguments, **changes})


def test_a_fold_and_the_others_are_disjoint_and_complete(tmp_path):
  write_esc50(tmp_path)
  everything = set(open_split("esc50", tmp_path, "all").ids)
  seen = set()
  for fold in range(1, 6):
    test = open_split("esc50", tmp_path, f"fold{fold}")
    train = open_split("esc50", tmp_path, f"not_fold{fold}")
    assert all(name.startswith(f"{fold}-") for name in test.ids)
    assert set(test.ids) | set(train.ids) == everything
    assert not set(test.ids) & set(train.ids)
    assert not set(test.groups) & set(train.groups)
    assert test.class_names == train.class_names == ("dog", "rooster", "pig")
    seen |= set(test.ids)
  assert seen == everything


def test_the_archive_folder_itself_can_be_given(tmp_path):
  write_esc50(tmp_path)
  inner = open_split("esc50", tmp_path / "ESC-50-master", "fold1")
  assert inner.ids == open_split("esc50", tmp_path, "fold1").ids
  assert inner.groups == ["100010", "100010", "100011", "100012"]
  assert inner.labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
  "old, new, message",
  [
    ("filename,fold", "file,fold", r"line 1: the columns are file, .* begin"),
    ("1-100010-A-0.wav", "../../x.wav", r"line 2: '\.\./\.\./x.wav' is not"),
    ("1-100010-A-0.wav", "/etc/passwd", "line 2: '/etc/passwd' is not the"),
    ("1-100010-B-0.wav", "1-100010-A-0.wav", "line 3: .* already, in .* 2"),
    ("1-100010-A-0.wav,1", "1-100010-A-0.wav,6", "line 2: fold '6' is not 1"),
    ("1,1,rooster", "1,9,rooster", "line 4: target 9|targets are not 0 to"),
    ("1,1,rooster", "1,one,rooster", "line 4: target 'one' is not a number"),
    ("2,1,rooster", "2,1,hen", "line 8: target 1 is 'hen' here and 'rooster'"),
    (",100011,A", "", "line 4: 5 columns; there should be 6"),
  ],
)
def test_a_wrong_line_of_esc50_is_named(tmp_path, old, new, message):
  write_esc50(tmp_path)
  table = tmp_path / "ESC-50-master" / "meta" / "esc50.csv"
  text = table.read_text()
  assert old in text
  table.write_text(text.replace(old, new, 1))
  with pytest.raises(ValueError, match=message) as caught:
    open_split("esc50", tmp_path, "all", max_missing_fraction=0.5)
  assert "esc50.csv" in str(caught.value)


def test_fsd50k_has_the_splits_of_its_column(tmp_path):
  write_fsd50k(tmp_path)
  train, val, dev, test = (
    open_split("fsd50k", tmp_path, split)
    for split in ("train", "val", "dev", "eval")
  )
  assert train.ids + val.ids == dev.ids == [str(64760 + i) for i in range(6)]
  assert dev.class_names == test.class_names
  assert dev.class_names == ("Accordion", "Acoustic_guitar", "Music")
  assert val.label_sets == [(1, 2), (2,)]
  assert test.ids[0] == "37199" and test.path(0).endswith(
    "eval_audio/37199.wav"
  )


@pytest.mark.parametrize(
  "file, old, new, message",
  [
    ("dev", "64761,", "../../x,", r"line 3: '\.\./\.\./x.wav' is not the name"),
    ("dev", "64761,", "64760,", "line 3: '64760' is listed already, in .* 2"),
    ("dev", "Accordion,", "Banjo,", "line 2: label 'Banjo' is not in .*vocab"),
    ("dev", "/m/1,train", "/m/1,test", "line 3: split 'test' is not train or"),
    ("dev", "mids,split", "mids,part", "line 1: the columns are .*, part"),
    ("dev", "/m/1,train", "/m/1", "line 3: 3 columns; there should be 4"),
    ("vocabulary", "1,Acoustic", "5,Acoustic", "line 2: index '5' should be 1"),
  ],
)
def test_a_wrong_line_of_fsd50k_is_named(tmp_path, file, old, new, message):
  write_fsd50k(tmp_path)
  table = tmp_path / "FSD50K.ground_truth" / f"{file}.csv"
  text = table.read_text()
  assert old in text
  table.write_text(text.replace(old, new, 1))
  with pytest.raises(ValueError, match=message) as caught:
    open_split("fsd50k", tmp_path, "dev", max_missing_fraction=0.5)
  assert f"{file}.csv" in str(caught.value)


def test_the_evaluation_set_needs_no_development_audio(tmp_path):
  write_fsd50k(tmp_path)
  for path in (tmp_path / "FSD50K.dev_audio").iterdir():
    path.unlink()
  (tmp_path / "FSD50K.dev_audio").rmdir()
  assert len(open_split("fsd50k", tmp_path, "eval")) == 6
  with pytest.raises(FileNotFoundError, match=r"not hold FSD50K.dev_audio;"):
    open_split("fsd50k", tmp_path, "dev")
