"""Recordings are found in a lasting order and read whatever their length."""

import numpy as np
import pytest
import soundfile

from audiomosaic_jax.data import audio_io, recordings

RATE_HZ = 16_000


def write(path, seconds=0.2, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  samples = 0.1 * np.random.default_rng(seed).normal(
    size=int(seconds * RATE_HZ)
  )
  soundfile.write(path, samples, RATE_HZ)
  return path


def test_a_folder_is_searched_with_its_folders(tmp_path):
  for name in ("b/2.wav", "a.flac", "b/1.wav", "b/c/3.WAV"):
    write(tmp_path / name)
  (tmp_path / "notes.txt").write_text("not audio")
  found = recordings.find(str(tmp_path))
  assert [r.id for r in found] == ["a.flac", "b/1.wav", "b/2.wav", "b/c/3.WAV"]
  assert found[1].path == str(tmp_path / "b/1.wav")


def test_a_pattern_and_a_single_file_are_found(tmp_path):
  for name in ("x/1.wav", "y/2.wav", "y/3.flac"):
    write(tmp_path / name)
  found = recordings.find(f"{tmp_path}/*/*.wav")
  assert [r.path for r in found] == [
    str(tmp_path / "x/1.wav"),
    str(tmp_path / "y/2.wav"),
  ]
  assert len(recordings.find(f"{tmp_path}/**/*.flac")) == 1
  [single] = recordings.find(str(tmp_path / "x/1.wav"))
  assert single.id == "1.wav"


def test_a_table_lists_files_and_parts_of_them(tmp_path):
  write(tmp_path / "sub/a.wav", seconds=2.0)
  table = tmp_path / "list.csv"
  table.write_text("path,start_s,end_s\nsub/a.wav,0,0.5\nsub/a.wav,0.5,2\n")
  found = recordings.find(str(table))
  assert [r.id for r in found] == [
    "sub/a.wav#0.000-0.500",
    "sub/a.wav#0.500-2.000",
  ]
  streams = recordings.read(found, sample_rate_hz=RATE_HZ, num_threads=2)
  parts = [np.concatenate(list(blocks)) for blocks in streams]
  whole = audio_io.load_audio(tmp_path / "sub/a.wav", sample_rate_hz=RATE_HZ)
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_what_lists_nothing_usable_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no audio there.*\.flac"):
    recordings.find(str(tmp_path))
  table = tmp_path / "list.csv"
  table.write_text("file\na.wav\n")
  with pytest.raises(ValueError, match=r"list\.csv, line 1: no column 'path'"):
    recordings.find(str(table))
  table.write_text("path\na.wav\na.wav\n")
  with pytest.raises(ValueError, match=r"line 3: a\.wav is also in line 2"):
    recordings.find(str(table))


def test_long_and_short_recordings_are_read_in_order(tmp_path, monkeypatch):
  monkeypatch.setattr(recordings, "SHORT_S", 0.5)
  paths = [
    write(tmp_path / f"{i}.wav", seconds, i)
    for i, seconds in enumerate([0.2, 2.0, 0.3, 1.0])
  ]
  found = recordings.find(str(tmp_path))
  streams = recordings.read(found, sample_rate_hz=RATE_HZ, num_threads=3)
  for path, blocks in zip(paths, streams, strict=True):
    blocks = list(blocks)
    whole = audio_io.load_audio(path, sample_rate_hz=RATE_HZ)
    assert len(blocks) == -(-len(whole) // (RATE_HZ // 2))
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_a_bad_recording_raises_when_it_is_its_turn(tmp_path):
  write(tmp_path / "a.wav")
  (tmp_path / "b.wav").write_bytes(b"no audio at all")
  write(tmp_path / "c.wav")
  found = recordings.find(str(tmp_path))
  streams = recordings.read(found, sample_rate_hz=RATE_HZ, num_threads=2)
  assert len(list(next(streams))) == 1
  with pytest.raises(audio_io.BadClipError, match=r"b\.wav: cannot decode"):
    list(next(streams))
  assert len(list(next(streams))) == 1


@pytest.mark.parametrize("hop", [10, 7])
def test_segments_cover_a_recording_and_the_last_is_not_too_short(hop):
  rng = np.random.default_rng(0)
  for length in range(1, 60):
    samples = rng.normal(size=length)
    blocks = np.array_split(samples, 4)
    found = list(recordings.segments(blocks, 10, hop, 3))
    covered = np.zeros(length, bool)
    for start, part in found:
      np.testing.assert_array_equal(part, samples[start : start + 10])
      covered[start : start + len(part)] = True
    assert [start for start, _ in found] == [hop * i for i in range(len(found))]
    # Less than `min_size` may be left out at the end.
    assert covered[: max(1, length - 2)].all()
    assert len(found) == 1 or len(found[-1][1]) >= 3
