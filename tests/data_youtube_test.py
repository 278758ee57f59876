"""AudioSet and VGGSound: any naming of files, official lists, hostile ids."""

import pytest
from fake_datasets import (
  MIDS,
  RATE_HZ,
  SEGMENTS_HEAD,
  VIDEOS,
  write_audioset,
  write_clip,
  write_vggsound,
)

from audiomosaic_jax.data import datasets, youtube


def open_audioset(root, split="balanced", **changes):
  arguments = dict(
    data_dir=root,
    audio_dir="clips",
    max_missing_fraction=0.0,
    sample_rate_hz=RATE_HZ,
  )
  return datasets.make_dataset("audioset", split, **{**arguments, **changes})


def open_vggsound(root, split="train", **changes):
  arguments = dict(
    data_dir=root,
    audio_dir=None,
    max_missing_fraction=0.0,
    sample_rate_hz=RATE_HZ,
  )
  return datasets.make_dataset("vggsound", split, **{**arguments, **changes})


def test_audioset_is_multi_hot_and_named_by_video(tmp_path):
  write_audioset(tmp_path)
  source = open_audioset(tmp_path)
  assert source.class_names == ("Speech", "Gush", "Music, all")
  assert source.ids == list(VIDEOS[:3])
  assert source.labels.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
  full = open_audioset(tmp_path, "full")
  assert full.ids == [*VIDEOS[3:7], *VIDEOS[:3]]


def test_clips_may_lie_outside_the_folder_of_the_lists(tmp_path):
  write_audioset(tmp_path / "lists")
  (tmp_path / "lists" / "clips").rename(tmp_path / "disk")
  source = open_audioset(tmp_path / "lists", audio_dir=str(tmp_path / "disk"))
  assert len(source) == 3 and source[0]["waveform"].any()


@pytest.mark.parametrize(
  "name",
  [
    *("{id}", "Y{id}", "{id}_30_40", "{id}_30", "{id}_30000", "Y{id}_30.0"),
    *("{id}_30.000_40.000", "{id}_30000_40000", "{id}_000030", "Y{id}_30_40"),
  ],
)
@pytest.mark.parametrize(
  "video", ["abcdefghijk", "Yabcdefghij", "a_30_40_bcd", "-abc_efghi_"]
)
def test_every_usual_file_name_is_understood(name, video):
  path = f"some/folder/{name.format(id=video)}.flac"
  files = youtube.Files([path])
  assert files.find(video, 30.0, alone=True) == path
  assert files.find("another_one", 30.0, alone=True) is None


@pytest.mark.parametrize(
  "name", ["{id}_31", "{id}_30.5", "{id}_30001", "{id}x", "{id}_a", "Z{id}"]
)
def test_another_part_of_the_video_is_not_the_clip(name):
  video = "abcdefghijk"
  files = youtube.Files([f"{name.format(id=video)}.wav"])
  assert files.find(video, 30.0, alone=True) is None


def test_the_file_that_names_the_start_goes_first():
  video = "abcdefghijk"
  names = ["a/abcdefghijk.wav", "b/abcdefghijk_30.wav", "b/abcdefghijk_60.wav"]
  files = youtube.Files(names)
  assert [
    files.find(video, start_s, alone=True) for start_s in (60.0, 30.0, 90.0)
  ] == [
    names[2],
    names[1],
    names[0],
  ]
  assert (
    youtube.Files(["abcdefghijk_0.wav"]).find(video, 0.0, alone=True)
    is not None
  )
  assert (
    youtube.Files(["abcdefghijk_30.wav"]).find(video, 0.0, alone=True) is None
  )


@pytest.mark.parametrize(
  "line, message",
  [
    ('../../x, 0.000, 10.000, "/m/09x0r"', r"line 4: '\.\./\.\./x' is not a Y"),
    ('/etc/passwd, 0.0, 10.0, "/m/09x0r"', "line 4: .* is not a YouTube id"),
    ('aaaaaaaaaaa, x, 10.000, "/m/09x0r"', "line 4: 'x' is not a time"),
    ('aaaaaaaaaaa, -1, 10.000, "/m/09x0r"', "line 4: '-1' is not a time"),
    ('aaaaaaaaaaa, 0, 10, "/m/09x0r,/m/99"', "line 4: label '/m/99' is not in"),
    ("aaaaaaaaaaa, 0, 10", "line 4: 3 columns; there should be 4"),
  ],
)
def test_a_wrong_segment_names_file_and_line(tmp_path, line, message):
  write_audioset(tmp_path)
  table = tmp_path / "balanced_train_segments.csv"
  table.write_text(f"{SEGMENTS_HEAD}{line}\n")
  with pytest.raises(ValueError, match=message) as caught:
    open_audioset(tmp_path, max_missing_fraction=1.0)
  assert "balanced_train_segments.csv" in str(caught.value)


def test_a_video_listed_twice_names_both_lines(tmp_path):
  write_audioset(tmp_path)
  table = tmp_path / "eval_segments.csv"
  with open(table, "a") as file:
    file.write(f'{VIDEOS[7]}, 0.000, 10.000, "{MIDS[0]}"\n')
  with pytest.raises(ValueError, match=r"csv, line 7: .*, in .*csv, line 4"):
    open_audioset(tmp_path, "eval")


def test_a_list_of_classes_of_another_data_set_is_noticed(tmp_path):
  write_audioset(tmp_path)
  classes = tmp_path / "class_labels_indices.csv"
  classes.write_text("index,mid,display_name\n0,/m/1,a\n1,/m/2,b\n")
  with pytest.raises(ValueError, match=r"line 4: label '/m/09x0r' is not in"):
    open_audioset(tmp_path)
  classes.write_text("index,name\n0,a\n")
  with pytest.raises(ValueError, match="line 1: no column 'mid'"):
    open_audioset(tmp_path)


def test_audioset_of_one_class_is_refused(tmp_path):
  write_audioset(tmp_path)
  table = tmp_path / "balanced_train_segments.csv"
  table.write_text(f'{SEGMENTS_HEAD}{VIDEOS[0]}, 30.000, 40.0, "{MIDS[0]}"\n')
  with pytest.raises(ValueError, match=r"one class \(Speech\) of 3"):
    open_audioset(tmp_path)


def test_vggsound_numbers_classes_over_both_splits(tmp_path):
  write_vggsound(tmp_path)
  train, test = open_vggsound(tmp_path), open_vggsound(tmp_path, "test")
  assert train.class_names == test.class_names
  assert train.class_names == (
    "people whispering, softly",
    "waterfall burbling",
  )
  assert train.ids == [f"{VIDEOS[i]}_{i:06d}" for i in range(0, 10, 2)]
  assert train.labels.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
  "line, message",
  [
    ("../../../x,1,waterfall,train", "line 11: .* is not a YouTube id"),
    ("aaaaaaaaaaa,1,waterfall,validation", "line 11: split 'validation' is"),
    ("aaaaaaaaaaa,nan,waterfall,train", "line 11: 'nan' is not a time"),
    ("aaaaaaaaaaa,1,waterfall", "line 11: 3 columns"),
    (f"{VIDEOS[0]},0,waterfall,train", "line 11: .* is listed already, in"),
  ],
)
def test_a_wrong_line_of_vggsound_is_named(tmp_path, line, message):
  write_vggsound(tmp_path)
  with open(tmp_path / "vggsound.csv", "a") as file:
    file.write(f"{line}\n")
  with pytest.raises(ValueError, match=message):
    open_vggsound(tmp_path, max_missing_fraction=1.0)


def test_two_clips_of_one_video_need_their_starts(tmp_path):
  write_vggsound(tmp_path)
  with open(tmp_path / "vggsound.csv", "a") as file:
    file.write(f"{VIDEOS[0]},60,waterfall burbling,train\n")
  write_clip(tmp_path / "video" / f"{VIDEOS[0]}_000060.wav")
  source = open_vggsound(tmp_path, max_missing_fraction=0.5)
  assert source.ids[-1] == f"{VIDEOS[0]}_000060"
  assert source.path(4).endswith("_000060.wav")
  # The file without a start may be either, so it is neither.
  assert source.missing == [f"{VIDEOS[0]}_000000"]
