"""Tables of captions in their published forms, on small copies."""

import csv

import pytest

from audiomosaic_jax.data import caption_tables

VIDEO, OTHER = "a" * 11, "Y" + "b" * 10


def write_table(path, header, *rows):
  with path.open("w", newline="") as file:
    csv.writer(file).writerows([header, *rows])
  return str(path)


def test_clotho_has_a_clip_per_line(tmp_path):
  (tmp_path / "Rain on a roof.wav").touch()
  header = ["file_name", *(f"caption_{n}" for n in range(1, 6))]
  table = write_table(
    tmp_path / "clotho.csv",
    header,
    ["Rain on a roof.wav", "a", "b", "c", "d", "e"],
    ["gone.wav", "a", "b", "c", "d", "e"],
  )
  clips, missing = caption_tables.read(table, str(tmp_path))
  assert missing == 1
  assert clips == [
    caption_tables.Captioned(
      str(tmp_path / "Rain on a roof.wav"), ("a", "b", "c", "d", "e")
    )
  ]


def test_audiocaps_has_a_caption_per_line_and_names_by_video(tmp_path):
  (tmp_path / f"{VIDEO}_30.WAV").touch()
  (tmp_path / f"Y{OTHER}.flac").touch()
  table = write_table(
    tmp_path / "test.csv",
    ["audiocap_id", "youtube_id", "start_time", "caption"],
    [1, VIDEO, 30, "a dog, barking"],
    [2, OTHER, 10, "a cat"],
    [3, VIDEO, 30, "dogs"],
    [4, "c" * 11, 0, "gone"],
  )
  clips, missing = caption_tables.read(table, str(tmp_path))
  assert missing == 1
  assert {tuple(clip.captions) for clip in clips} == {
    ("a dog, barking", "dogs"),
    ("a cat",),
  }


def test_a_table_of_ones_own_groups_the_captions_of_a_path(tmp_path):
  (tmp_path / "a.wav").touch()
  rows = (["a.wav", "one"], ["a.wav", "two"])
  table = write_table(tmp_path / "own.csv", ["path", "caption"], *rows)
  clips, missing = caption_tables.read(table, str(tmp_path))
  assert (missing, len(clips), clips[0].captions) == (0, 1, ("one", "two"))


def test_only_a_table_of_paths_needs_no_folder(tmp_path):
  (tmp_path / "a.wav").touch()
  own = write_table(
    tmp_path / "own.csv", ["path", "caption"], [str(tmp_path / "a.wav"), "x"]
  )
  assert caption_tables.read(own, "")[1] == 0
  clotho = write_table(
    tmp_path / "clotho.csv", ["file_name", "caption_1"], ["a.wav", "x"]
  )
  message = r"clotho\.csv names clips, not paths, and the folder is ''"
  with pytest.raises(ValueError, match=message):
    caption_tables.read(clotho, "")


@pytest.mark.parametrize("path", ["../a.wav", "/etc/a.wav"])
def test_no_path_leads_out_of_the_folder(tmp_path, path):
  rows = (["a.wav", "x"], [path, "x"])
  table = write_table(tmp_path / "own.csv", ["path", "caption"], *rows)
  with pytest.raises(ValueError, match=r"own\.csv.*3"):
    caption_tables.read(table, str(tmp_path))


def test_other_columns_and_absent_clips_are_named(tmp_path):
  table = write_table(tmp_path / "x.csv", ["file", "text"], ["a.wav", "x"])
  with pytest.raises(ValueError, match=r"x\.csv has the columns file, text"):
    caption_tables.read(table, str(tmp_path))
  table = write_table(tmp_path / "y.csv", ["path", "caption"], ["a.wav", "x"])
  with pytest.raises(FileNotFoundError, match=r"none of 1 clips .* are in"):
    caption_tables.read(table, str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"z\.csv does not exist"):
    caption_tables.read(str(tmp_path / "z.csv"), str(tmp_path))
