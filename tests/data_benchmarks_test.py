"""What every published data set promises, on small copies of their layouts."""

import inspect
import pathlib
import re
import shutil

import fake_datasets
import numpy as np
import pytest
from fake_datasets import FAKES, LISTED, RATE_HZ

from audiomosaic_jax.data import datasets, layout, sources, wrappers


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
  """Returns a function: data set -> arguments of a copy to read only."""
  written = {}

  def write(name):
    if name not in written:
      root = tmp_path_factory.mktemp(name)
      written[name] = FAKES[name][0](root)
    return written[name]

  return write


def open_split(name, split, arguments, **changes):
  arguments = {**arguments, "sample_rate_hz": RATE_HZ, **changes}
  if name in LISTED:
    arguments.setdefault("max_missing_fraction", 0.0)
  return datasets.make_dataset(name, split, **arguments)


def check_source(source):
  """What every source promises."""
  assert len(source) == len(source.ids) == len(source.labels)
  assert len(set(source.ids)) == len(source)
  for i in range(len(source)):
    element = source[i]
    assert set(element) == {"waveform", "label", "id"}
    assert element["waveform"].dtype == np.float32
    assert element["waveform"].size > 0
    assert element["id"] == i and element["id"].dtype == np.int32
    np.testing.assert_array_equal(element["label"], source.labels[i])
    assert pathlib.Path(source.path(i)).is_file()
  assert source.labels.dtype == (np.float32 if source.multi_hot else np.int32)
  for labels, encoded in zip(source.label_sets, source.labels, strict=True):
    expected = np.flatnonzero(encoded) if source.multi_hot else [encoded]
    np.testing.assert_array_equal(labels, expected)
  if source.groups is not None:
    assert len(source.groups) == len(source)


def test_every_data_set_has_a_fake_copy():
  assert set(FAKES) == set(datasets.DATASETS) - {"demo", "tfds"}


@pytest.mark.parametrize("name", FAKES)
def test_every_split_opens_and_keeps_the_promises(copies, name):
  for split, size in FAKES[name][1].items():
    source = open_split(name, split, copies(name))
    check_source(source)
    assert len(source) == size, split
    assert list(source.missing) == []
    guarded = datasets.guard(
      source, cache_bytes=0, max_bad_fraction=0.0, report_path=None
    )
    assert guarded.groups == source.groups
    assert guarded.label_sets == source.label_sets
    subset = wrappers.SubsetSource(guarded, [len(source) - 1, 0])
    assert subset.label_sets == [source.label_sets[i] for i in (-1, 0)]
    assert subset.path(1) == source.path(0)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_an_unknown_split_is_answered_with_the_known_ones(copies, name):
  with pytest.raises(ValueError, match="no split 'night'; choose") as caught:
    open_split(name, "night", copies(name))
  for split in FAKES[name][1]:
    assert split in str(caught.value)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_a_folder_of_something_else_says_where_to_get_the_data(name, tmp_path):
  arguments = dict(FAKES[name][0](tmp_path / "right"))
  arguments["data_dir"] = tmp_path / "wrong"
  split = next(iter(FAKES[name][1]))
  with pytest.raises(layout.DatasetNotPreparedError, match="is not a folder"):
    open_split(name, split, arguments)
  (tmp_path / "wrong").mkdir()
  with pytest.raises(
    layout.DatasetNotPreparedError, match=r"does not hold .*; get the data set"
  ):
    open_split(name, split, arguments)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_the_documented_arguments_are_the_arguments(name):
  function = datasets.DATASETS[name]
  names = inspect.signature(function).parameters
  assert {"split", "data_dir", "max_missing_fraction"} <= set(names)
  assert re.findall(r"^    (\w+): ", function.__doc__, re.M)[: len(names)] == (
    list(names)
  )


@pytest.mark.parametrize(
  "file, command",
  [
    ("ESC-50-master.zip", "unzip .*ESC-50-master.zip -d "),
    ("data.tar.gz", "mkdir -p .*/data && tar -xf .*/data.tar.gz -C .*/data"),
  ],
)
def test_an_archive_is_answered_with_the_command_to_extract_it(
  tmp_path, file, command
):
  (tmp_path / file).write_bytes(b"not read")
  for data_dir in (tmp_path / file, tmp_path):
    with pytest.raises(layout.DatasetNotPreparedError, match=command):
      open_split("esc50", "fold1", {"data_dir": data_dir})


def test_an_archive_in_parts_is_joined_first(tmp_path):
  for file in ("FSD50K.dev_audio.z01", "FSD50K.dev_audio.zip"):
    (tmp_path / file).write_bytes(b"not read")
  with pytest.raises(layout.DatasetNotPreparedError, match=r"zip -s 0 .*--out"):
    open_split("fsd50k", "dev", {"data_dir": tmp_path})


def remove_clips(root, keep):
  """Removes the audio files for which `keep` is False."""
  removed = 0
  for path in sorted(root.rglob("*")):
    is_audio = path.name.lower().endswith(sources.AUDIO_SUFFIXES)
    if is_audio and "noise" not in str(path) and not keep(path):
      path.unlink()
      removed += 1
  return removed


@pytest.mark.parametrize(
  "name, split, pattern, missing",
  [
    ("audioset", "full", "Zebcdefghi_", ["Zebcdefghi_"]),
    ("esc50", "fold2", "2-100020-B", ["2-100020-B-0.wav"]),
    ("fsd50k", "val", "64765", ["64765"]),
    ("speech_commands_v1", "test", "bed/0a7c2a8d_nohash_2", None),
    ("speech_commands_v2", "valid", "four/1b4c9b89_nohash_1", None),
    ("vggsound", "test", "Y1abcdefghi", ["Y1abcdefghi_000001"]),
    ("envsdd", "test03", "000017", ["000017.wav"]),
  ],
)
def test_missing_clips_are_listed_up_to_a_share(
  tmp_path, name, split, pattern, missing
):
  arguments = FAKES[name][0](tmp_path)
  size = len(open_split(name, split, arguments))
  assert remove_clips(tmp_path, lambda path: pattern not in str(path)) == 1
  source = open_split(name, split, arguments, max_missing_fraction=0.5)
  check_source(source)
  assert len(source) == size - 1
  assert list(source.missing) == (missing or [f"{pattern}.wav"])
  with pytest.raises(
    ValueError, match=rf"1 of {size} clips of .*max_missing_fraction=0.1"
  ):
    open_split(name, split, arguments, max_missing_fraction=0.1)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_a_copy_without_any_clip_is_a_wrong_folder(tmp_path, name):
  arguments = FAKES[name][0](tmp_path)
  split = list(FAKES[name][1])[-1]
  remove_clips(tmp_path, lambda path: False)
  with pytest.raises(layout.DatasetNotPreparedError, match="right folder"):
    open_split(name, split, arguments, max_missing_fraction=1.0)


def test_clips_of_a_format_that_is_not_read_are_told_of(tmp_path):
  arguments = FAKES["audioset"][0](tmp_path)
  for path in sorted((tmp_path / "clips").glob("*/*")):
    path.rename(path.with_suffix(".m4a"))
  with pytest.raises(
    layout.DatasetNotPreparedError, match=r"holds 10 files of .*ffmpeg -i IN"
  ):
    open_split("audioset", "full", arguments)


def test_a_single_class_is_refused_unless_anything_goes(tmp_path):
  arguments = FAKES["esc50"][0](tmp_path)
  remove_clips(tmp_path, lambda path: path.stem.endswith("-1"))
  with pytest.raises(ValueError, match=r"all of one class \(rooster\) of 3"):
    open_split("esc50", "all", arguments, max_missing_fraction=0.9)
  source = open_split("esc50", "all", arguments, max_missing_fraction=1.0)
  assert len(source) == 5


def test_links_to_folders_are_followed_once(tmp_path):
  fake_datasets.write_clip(tmp_path / "disk" / "a.wav")
  (tmp_path / "disk" / "loop").symlink_to(tmp_path / "disk")
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "link").symlink_to(tmp_path / "disk")
  assert sources.list_audio(tmp_path / "data") == ["link/a.wav"]


@pytest.mark.parametrize(
  "path",
  [
    *("../../x.wav", "/etc/passwd", "a/../b.wav", "./a.wav", "a//b.wav"),
    *("", "..\\x.wav", "C:x.wav", "a\0.wav", "a\n.wav"),
  ],
)
def test_no_name_leads_out_of_the_folder(path):
  with pytest.raises(ValueError, match=r"t.csv, line 3: .* is not the name"):
    layout.check_relative(path, "t.csv, line 3")


def test_a_table_of_other_bytes_is_not_a_table(tmp_path):
  shutil.copy(fake_datasets.write_clip(tmp_path / "a.wav"), tmp_path / "t.csv")
  with pytest.raises(ValueError, match=r"t.csv is not a CSV file"):
    list(layout.read_rows(tmp_path / "t.csv", columns=1, header=None))
  (tmp_path / "t.csv").write_text("# nothing\n\n")
  with pytest.raises(ValueError, match=r"t.csv lists nothing"):
    list(layout.read_rows(tmp_path / "t.csv", columns=1, header=None))
