"""EnvSDD: the four tests, both tracks, both formats of manifests."""

import json

import pytest
from fake_datasets import RATE_HZ, write_envsdd

from audiomosaic_jax.data import datasets, layout


def open_envsdd(root, split, **changes):
  arguments = dict(
    data_dir=root,
    track="tta",
    manifest_dir=None,
    max_missing_fraction=0.0,
    sample_rate_hz=RATE_HZ,
  )
  return datasets.make_dataset("envsdd", split, **{**arguments, **changes})


def rows_of(root, source):
  """The lines of test_metadata.csv of a source's clips."""
  lines = (root / "test_metadata.csv").read_text().splitlines()[1:]
  rows = {line.split(",")[0]: line.split(",")[2:] for line in lines}
  return [tuple(rows[name]) for name in source.ids]


def test_a_real_sound_and_its_fakes_are_one_group(tmp_path):
  write_envsdd(tmp_path)
  for track, fakes in (("tta", 3), ("ata", 1)):
    source = open_envsdd(tmp_path, "train", track=track)
    assert source.class_names == ("fake", "real")
    assert source.labels.tolist() == [1, *[0] * fakes] * 2
    assert source.groups == [
      *["UrbanSound8K/35800-6-0-0.wav"] * (1 + fakes),
      *["TUTSED2016Dev/a033_33.wav"] * (1 + fakes),
    ]
  assert source.ids[:2] == [
    "real_audio/UrbanSound8K/35800-6-0-0.wav",
    "fake_audio/ATA/audioldm1/UrbanSound8K/35800-6-0-0.wav",
  ]
  assert not set(open_envsdd(tmp_path, "valid").groups) & set(source.groups)


@pytest.mark.parametrize(
  "track, seen, unseen",
  [
    ("ata", {"audioldm1"}, {"audioldm2"}),
    (
      "tta",
      {"audiogen", "audioldm1", "audioldm2"},
      {"audiolcm", "tangoflux"},
    ),
  ],
)
def test_the_four_tests_cross_new_sounds_with_new_generators(
  tmp_path, track, seen, unseen
):
  write_envsdd(tmp_path)
  known, new = {"UrbanSound8K", "TUTSED2017Dev"}, {"Clotho", "DCASE2023Task7"}
  expected = {
    "test01": (known, seen),
    "test02": (known, unseen),
    "test03": (new, seen),
    "test04": (new, unseen),
  }
  for split, (sounds, generators) in expected.items():
    source = open_envsdd(tmp_path, split, track=track)
    rows = rows_of(tmp_path, source)
    assert {data_set for data_set, _, _ in rows} == sounds
    assert {kind for _, kind, _ in rows} == {"real", track}
    assert {g for _, _, g in rows} == generators | {"real"}
    assert source.labels.tolist() == [kind == "real" for _, kind, _ in rows]


def test_the_columns_are_read_by_position(tmp_path):
  write_envsdd(tmp_path)
  expected = open_envsdd(tmp_path, "test01").ids
  table = tmp_path / "test_metadata.csv"
  lines = table.read_text().splitlines()
  table.write_text("\n".join(["a,b,c,d,e", *lines[1:]]))
  assert open_envsdd(tmp_path, "test01").ids == expected


def test_the_authors_manifests_give_the_same_clips(tmp_path):
  write_envsdd(tmp_path)
  expected = open_envsdd(tmp_path, "train")
  entries = [
    {
      "file_path": expected.path(i),
      "label": ("fake", "real")[label],
      "attack_type": "tta",
      "generative_model": "audiogen",
    }
    for i, label in enumerate(expected.labels)
  ]
  write_manifest(tmp_path / "jsons", entries)
  source = open_envsdd(tmp_path, "train", manifest_dir=tmp_path / "jsons")
  assert source.ids == expected.ids  # However absolute the paths are.
  assert source.labels.tolist() == expected.labels.tolist()
  assert [source.path(i) for i in range(8)] == [
    expected.path(i) for i in range(8)
  ]


def write_manifest(folder, entries, name="tta/dev/train.json"):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(entries))
  return path


def test_the_manifests_of_the_published_code_are_read(tmp_path):
  write_envsdd(tmp_path)
  names = ["test/audio/000000.wav", "test/audio/000001.wav"]
  entries = [
    {"wav": names[0], "labels": "/m/env1"},
    {"wav": names[1], "labels": "/m/env0"},
  ]
  folder = tmp_path / "envsdd_util"
  write_manifest(folder, {"data": entries}, "ata/test/test02.json")
  # Whichever way round the list has them, fake is 0 and real is 1.
  for order in (("/m/env0,Fake", "/m/env1,Real"), None):
    lines = order or ("/m/env1,real", "/m/env0,fake")
    (folder / "class_labels_indices.csv").write_text(
      f"index,mid,display_name\n0,{lines[0]}\n1,{lines[1]}\n"
    )
    source = open_envsdd(tmp_path, "test02", track="ata", manifest_dir=folder)
    assert source.ids == ["000000.wav", "000001.wav"]
    assert source.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
  "entries, message",
  [
    ({"data": [{"wav": "a.wav"}]}, "class_labels_indices|is neither"),
    ([{"file_path": "a.wav"}], "is neither the authors' list"),
    ([{"file_path": 3, "label": "real"}], "is neither the authors' list"),
    ([], "no clip is listed"),
    (
      [{"file_path": "../../a.wav", "label": "real"}],
      r"entry 0: '\.\./\.\./a.wav' is not the name",
    ),
    (
      [{"file_path": "a.wav", "label": "bonafide"}],
      "entry 0: label 'bonafide' is not in fake, real",
    ),
    (
      [{"file_path": "a.wav", "label": "real"}] * 2,
      "entry 1: 'a.wav' is listed already, in .*entry 0",
    ),
  ],
)
def test_a_wrong_manifest_names_file_and_entry(tmp_path, entries, message):
  write_envsdd(tmp_path)
  write_manifest(tmp_path / "jsons", entries)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    open_envsdd(
      tmp_path,
      "train",
      manifest_dir=tmp_path / "jsons",
      max_missing_fraction=1.0,
    )


def test_a_manifest_that_is_not_there_is_named(tmp_path):
  write_envsdd(tmp_path)
  with pytest.raises(layout.DatasetNotPreparedError, match=r"tta/dev/valid.js"):
    open_envsdd(tmp_path, "valid", manifest_dir=tmp_path / "jsons")


@pytest.mark.parametrize(
  "file, old, new, message",
  [
    ("datasplit_dev.csv", "a033_33.wav", "../../a.wav", "line 3: .* not the"),
    ("datasplit_dev.csv", ",train", ",training", "line 2: usage 'training'"),
    (
      "test_metadata.csv",
      "Clotho",
      "AudioCaps",
      "unknown data set 'AudioCaps'",
    ),
    ("test_metadata.csv", ",ata,", ",vc,", "line 8: 'vc' is not real, ata or"),
    ("test_metadata.csv", "tangoflux", "sora", "unknown tta generator 'sora'"),
    ("test_metadata.csv", "000000.wav", "/etc/x", "line 2: '/etc/x' is not th"),
  ],
)
def test_a_wrong_line_of_a_table_is_named(tmp_path, file, old, new, message):
  write_envsdd(tmp_path)
  text = (tmp_path / file).read_text()
  assert old in text
  (tmp_path / file).write_text(text.replace(old, new, 1))
  split = "train" if file.startswith("data") else "test01"
  with pytest.raises(ValueError, match=message) as caught:
    open_envsdd(tmp_path, split, max_missing_fraction=1.0)
  assert file in str(caught.value)


def test_an_unknown_track_is_answered_with_the_known_ones(tmp_path):
  write_envsdd(tmp_path)
  with pytest.raises(ValueError, match="track='vc'; choose ata or tta"):
    open_envsdd(tmp_path, "train", track="vc")
