"""Folders, CSV files, manifests; bad clips; caches."""

import json
import pickle
import threading
from concurrent import futures

import numpy as np
import pytest
import soundfile

from audiomosaic_jax.data import audio_io, datasets, sources, wrappers

RATE_HZ = 8_000


def write_clip(path, value=0.25, seconds=0.1):
  path.parent.mkdir(parents=True, exist_ok=True)
  samples = np.full(int(seconds * RATE_HZ), value, np.float32)
  soundfile.write(path, samples, RATE_HZ, subtype="PCM_16")


@pytest.fixture
def folder(tmp_path):
  for i, name in enumerate(["cat/a", "cat/b", "dog/deep/c", "dog/d"]):
    write_clip(tmp_path / f"{name}.wav", (i + 1) / 8)
  (tmp_path / "cat" / "notes.txt").write_text("not audio")
  return tmp_path


def open_folder(path, class_names=None):
  return sources.FolderSource(
    path, class_names=class_names, sample_rate_hz=RATE_HZ
  )


def open_csv(path, **changes):
  arguments = dict(
    root=None,
    path_column="path",
    label_column=None,
    split_column=None,
    split=None,
    class_names=None,
    sample_rate_hz=RATE_HZ,
  )
  return sources.CsvSource(path, **{**arguments, **changes})


def values_of(source):
  """The constant each test clip was filled with, in eighths."""
  return [
    round(8 * float(source[i]["waveform"][0])) for i in range(len(source))
  ]


def check_source(source, dtype=np.float32):
  """What every source promises."""
  assert len(source) == len(source.ids) == len(source.labels)
  assert str(len(source)) in repr(source)
  for i in (0, len(source) - 1):
    element = source[i]
    assert set(element) == {"waveform", "label", "id"}
    assert element["waveform"].dtype == dtype
    assert element["id"] == i and element["id"].dtype == np.int32
    np.testing.assert_array_equal(element["label"], source.labels[i])
    assert isinstance(source.ids[i], str)
  assert source.labels.dtype == (np.float32 if source.multi_hot else np.int32)


def test_a_folder_has_a_class_per_sub_folder(folder):
  source = open_folder(folder)
  check_source(source)
  assert source.class_names == ("cat", "dog")
  assert source.ids == [
    "cat/a.wav",
    "cat/b.wav",
    "dog/d.wav",
    "dog/deep/c.wav",
  ]
  assert source.labels.tolist() == [0, 0, 1, 1]


def test_a_flat_folder_is_unlabelled(tmp_path):
  write_clip(tmp_path / "a.wav")
  source = open_folder(tmp_path)
  check_source(source)
  assert source.class_names == () and source.labels.tolist() == [-1]


def test_a_folder_can_follow_the_classes_of_another(folder):
  source = open_folder(folder, ("ant", "dog", "cat"))
  assert source.labels.tolist() == [2, 2, 1, 1]
  with pytest.raises(ValueError, match="cat is not one of the classes dog"):
    open_folder(folder, ("dog",))


def test_a_folder_without_audio_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"holds no audio file"):
    open_folder(tmp_path)
  with pytest.raises(FileNotFoundError, match="is not a folder"):
    open_folder(tmp_path / "nowhere")


def test_a_csv_cuts_clips_out_of_files(tmp_path):
  ramp = np.arange(RATE_HZ, dtype=np.float32) / RATE_HZ
  soundfile.write(tmp_path / "long.wav", ramp, RATE_HZ)
  table = tmp_path / "clips.csv"
  table.write_text("path,start_s,end_s\nlong.wav,0.25,0.5\nlong.wav,0.5,1\n")
  source = open_csv(table)
  check_source(source)
  assert source.ids[0] == "long.wav#0.250-0.500"
  assert [len(source[i]["waveform"]) for i in range(2)] == [2000, 4000]
  assert abs(source[1]["waveform"][0] - 0.5) < 1e-3


def test_a_csv_takes_a_split_and_numbers_classes_over_all_of_them(folder):
  table = folder / "labels.csv"
  table.write_text(
    "file,kind,fold\ncat/a.wav,cat,1\ndog/d.wav,dog,2\ncat/b.wav,cat,2\n"
  )
  columns = dict(path_column="file", label_column="kind", split_column="fold")
  source = open_csv(table, split="2", **columns)
  check_source(source)
  assert source.class_names == ("cat", "dog")
  assert source.labels.tolist() == [1, 0]
  with pytest.raises(ValueError, match="no row has fold='3'; there are 1, 2"):
    open_csv(table, split="3", **columns)
  with pytest.raises(ValueError, match=r"labels.csv, line 2: label 'cat'"):
    open_csv(table, class_names=["dog"], **columns)


@pytest.mark.parametrize(
  "text, message",
  [
    ("name\nx.wav\n", r"line 1: no column 'path'; it has name"),
    ("path\n", "no rows"),
    ("path,n\ncat/a.wav,1\n,2\n", "line 3: column 'path' is empty"),
    ("path\ncat/z.wav\n", r"line 2: .*cat/z.wav does not exist"),
    (
      "path,start_s,end_s\ncat/a.wav,0,x\n",
      "line 2: start_s '0' and end_s 'x'",
    ),
    ("path,start_s,end_s\ncat/a.wav,2,1\n", "line 2: .* 0 <= start_s < end_s"),
  ],
)
def test_a_wrong_csv_names_file_and_line(folder, text, message):
  (folder / "t.csv").write_text(text)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
    open_csv(folder / "t.csv")
  assert "t.csv" in str(caught.value)


@pytest.fixture
def manifest(folder):
  (folder / "classes.csv").write_text(
    'index,mid,display_name\n0,/m/1,Cat\n1,/m/2,"Dog, barking"\n2,/m/3,Rain\n'
  )
  entries = [
    {"wav": str(folder / "cat/a.wav"), "labels": "/m/1"},
    {"wav": "dog/d.wav", "labels": "/m/2,/m/3"},
  ]
  (folder / "train.json").write_text(json.dumps({"data": entries}))
  return folder / "train.json"


def open_manifest(path):
  return sources.ManifestSource(
    path,
    label_csv=path.parent / "classes.csv",
    root=None,
    sample_rate_hz=RATE_HZ,
  )


def test_a_manifest_is_multi_hot(manifest):
  source = open_manifest(manifest)
  check_source(source)
  assert source.class_names == ("Cat", "Dog, barking", "Rain")
  assert source.labels.tolist() == [[1, 0, 0], [0, 1, 1]]
  assert values_of(source) == [1, 4]


@pytest.mark.parametrize(
  "text, message",
  [
    ("[]", "is not .*data"),
    ("{", "is not .*data"),
    ('{"data": []}', "at least one entry"),
    ('{"data": [{"wav": "cat/a.wav", "labels": "/m/9"}]}', "entry 0: label"),
    ('{"data": [{"wav": "z.wav", "labels": "/m/1"}]}', "entry 0: .* not exist"),
  ],
)
def test_a_wrong_manifest_names_file_and_entry(manifest, text, message):
  manifest.write_text(text)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
    open_manifest(manifest)
  assert "train.json" in str(caught.value)


def test_a_list_of_classes_with_a_gap_names_the_line(manifest):
  classes = manifest.parent / "classes.csv"
  classes.write_text("index,mid,display_name\n0,/m/1,Cat\n2,/m/2,Dog\n")
  with pytest.raises(ValueError, match=r"line 3: index 2 should be 1"):
    open_manifest(manifest)


def test_joined_and_cut_sources_number_their_own_clips(folder):
  source = open_folder(folder)
  joined = wrappers.ConcatSource([source, source])
  check_source(joined)
  assert values_of(joined) == [1, 2, 4, 3, 1, 2, 4, 3]
  subset = wrappers.SubsetSource(joined, [5, 0])
  check_source(subset)
  assert values_of(subset) == [2, 1] and subset.ids[0] == "cat/b.wav"


def test_sources_of_other_classes_cannot_be_joined(folder):
  pair = [open_folder(folder), open_folder(folder / "cat")]
  with pytest.raises(ValueError, match="same class_names"):
    wrappers.ConcatSource(pair)


class Counting(sources.Source):
  """Counts how often each clip is decoded; listed clips are bad."""

  def __init__(self, size, bad=()):
    self.ids = [f"{i}.wav" for i in range(size)]
    self.class_names = ()
    self.multi_hot = False
    self.bad = set(bad)
    self.reads = [0] * size

  @property
  def labels(self):
    return np.full(len(self), -1, np.int32)

  def __getitem__(self, index):
    self.reads[index] += 1
    if index in self.bad:
      raise audio_io.BadClipError(self.ids[index], "silent")
    return {
      "waveform": np.full(100, (index + 1) / 256, np.float32),
      "label": np.int32(-1),
      "id": np.int32(index),
    }


def test_a_cache_decodes_once_and_changes_nothing():
  plain = Counting(8)
  cached = wrappers.CachedSource(plain, limit_bytes=8 * 200)
  check_source(cached, np.int16)
  for _ in range(3):
    for i in range(8):
      np.testing.assert_array_equal(
        audio_io.as_float(cached[i]["waveform"]),
        np.full(100, (i + 1) / 256, np.float32),
      )
  assert plain.reads == [1] * 8 and cached.used_bytes == 1600


def test_a_cache_stays_within_its_limit():
  plain = Counting(8)
  cached = wrappers.CachedSource(plain, limit_bytes=5 * 200 + 50)
  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(cached.__getitem__, list(range(8)) * 50))
  assert cached.used_bytes == 1000
  sizes = [e["waveform"].nbytes for e in cached._clips.values()]
  assert sum(sizes) == 1000


def tolerant(source, path=None, max_bad_fraction=0.5):
  return wrappers.TolerantSource(
    source, max_bad_fraction=max_bad_fraction, report_path=path
  )


def test_a_bad_clip_is_replaced_by_the_next_good_one():
  source = tolerant(Counting(8, bad=[2, 3, 7]))
  ids = [int(source[i]["id"]) for i in range(8)]
  assert ids == [0, 1, 4, 4, 4, 5, 6, 0]
  assert source.num_bad == 3
  # Whatever was read first, the replacement is the same.
  assert [int(source[i]["id"]) for i in range(7, -1, -1)] == ids[::-1]
  assert source.source.reads[2] == 1


def test_cuts_of_a_file_are_a_group_though_a_split_has_but_one(folder):
  table = folder / "cuts.csv"
  table.write_text("path,start_s,end_s\ncat/a.wav,0,0.05\ndog/d.wav,0,0.05\n")
  source = open_csv(table)
  assert source.groups == ["cat/a.wav", "dog/d.wav"]


def test_a_table_of_excel_is_read_and_one_that_is_no_utf8_is_named(folder):
  table = folder / "labels.csv"
  text = "path,label\ncat/a.wav,caf\u00e9\n"
  table.write_text(text, encoding="utf-8-sig")
  assert open_csv(table, label_column="label").class_names == ("caf\u00e9",)
  table.write_text(text, encoding="latin-1")
  with pytest.raises(ValueError, match=r"labels.csv, after line .*in UTF-8"):
    open_csv(table, label_column="label")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("path,start_s\ncat/a.wav,0.1\n", "column 'start_s' and not the other"),
    ("path,start_s,end_s\ncat/a.wav,0,inf\n", "line 2: .*end_s 'inf'"),
  ],
)
def test_a_table_of_parts_needs_both_ends(folder, text, message):
  table = folder / "cuts.csv"
  table.write_text(text)
  with pytest.raises(ValueError, match=message):
    open_csv(table)


def test_bad_clips_are_listed_once_over_threads_and_runs(tmp_path):
  path = tmp_path / "run" / "bad_clips.jsonl"
  for _ in range(2):
    source = tolerant(Counting(64, bad=range(0, 64, 4)), path)
    gate = threading.Barrier(8)

    def read(_, source=source, gate=gate):
      gate.wait()
      return [int(source[i]["id"]) for i in range(64)]

    with futures.ThreadPoolExecutor(8) as pool:
      assert len({tuple(ids) for ids in pool.map(read, range(8))}) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == list(range(0, 64, 4))
    assert lines[0]["path"].endswith(".wav") and lines[0]["reason"] == "silent"


def test_a_line_that_a_full_disk_cut_off_is_no_trap_for_the_next(tmp_path):
  path = tmp_path / "bad_clips.jsonl"
  first = {"id": 0, "path": "a.wav", "reason": "silent"}
  path.write_text(json.dumps(first) + '\n{"id": 1, "pa')
  for _ in range(2):
    source = tolerant(Counting(64, bad=[4]), path)
    assert int(source[4]["id"]) == 5
    before, added = map(json.loads, path.read_text().splitlines())
    assert before == first and added["id"] == 4


def test_a_data_set_without_a_folder_is_not_the_working_directory():
  for name in ("folder", "tfds", "esc50"):
    with pytest.raises(ValueError, match=f"'{name}' has no data_dir"):
      datasets.make_dataset(name, None, data_dir="", sample_rate_hz=16_000)


def test_too_many_bad_clips_end_the_run_with_both_numbers(tmp_path):
  path = tmp_path / "bad.jsonl"
  source = tolerant(Counting(20, bad=[3, 5, 9]), path, max_bad_fraction=0.1)
  assert int(source[3]["id"]) == 4 and int(source[5]["id"]) == 6
  with pytest.raises(
    wrappers.TooManyBadClipsError,
    match=r"3 of 20 clips are bad.*=0.1 allows \(2\).*bad.jsonl.*9.wav: silent",
  ):
    source[9]


def test_a_source_of_bad_clips_only_does_not_search_forever():
  source = tolerant(Counting(3, bad=range(3)), max_bad_fraction=1.0)
  with pytest.raises(wrappers.TooManyBadClipsError, match="none of 3"):
    source[1]


def test_broken_files_on_disk_are_replaced_counted_and_listed(folder):
  contents = (folder / "cat/a.wav").read_bytes()
  (folder / "cat/b.wav").write_bytes(b"garbage")
  (folder / "dog/d.wav").write_bytes(contents[:20])
  soundfile.write(folder / "dog/deep/c.wav", np.zeros(100), RATE_HZ)
  report = folder / "bad_clips.jsonl"
  source = tolerant(open_folder(folder), report, max_bad_fraction=0.75)
  assert values_of(source) == [1, 1, 1, 1] and source.num_bad == 3
  lines = [json.loads(line) for line in report.read_text().splitlines()]
  assert [line["id"] for line in lines] == [1, 2, 3]
  assert "silent" in lines[2]["reason"]


def test_sources_travel_to_worker_processes(folder):
  source = datasets.guard(
    open_folder(folder),
    cache_bytes=10_000,
    max_bad_fraction=0.0,
    report_path=None,
  )
  expected = values_of(source)
  assert values_of(pickle.loads(pickle.dumps(source))) == expected


def test_names_of_data_sets_are_listed():
  with pytest.raises(ValueError, match="audioset, csv, demo, envsdd, esc50"):
    datasets.make_dataset("imagenet", "train")
  with pytest.raises(ValueError, match="pretrain, instruments_train"):
    datasets.make_dataset("demo", "train", sample_rate_hz=RATE_HZ)


def test_an_unprepared_data_set_names_both_ways_out(tmp_path):
  with pytest.raises(datasets.DatasetNotPreparedError) as caught:
    datasets.make_dataset(
      "tfds", "train", data_dir=tmp_path / "as", sample_rate_hz=RATE_HZ
    )
  message = str(caught.value)
  assert f"{tmp_path / 'as'}: no such folder" in message
  assert "-m audiomosaic_jax.data.prepare --input=" in message
  assert (
    "python -m audiomosaic_jax.main --config=configs/pretrain.py:demo "
    "--workdir=runs/demo" in message
  )
