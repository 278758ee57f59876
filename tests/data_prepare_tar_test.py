"""Archives are read where they lie, and can name no file outside of them."""

import io
import tarfile

import numpy as np
import pytest
import soundfile
from prepared import (
  RATE_HZ,
  by_name,
  open_paths,
  prepare,
  read,
  read_ledger,
)

from audiomosaic_jax.data import audio_io, tar_source


def sound(pitch_hz=440.0):
  time_s = np.arange(RATE_HZ // 4) / RATE_HZ
  file = io.BytesIO()
  tone = 0.5 * np.sin(2 * np.pi * pitch_hz * time_s)
  soundfile.write(file, tone, RATE_HZ, format="WAV")
  return file.getvalue()


def write_tar(path, members):
  """Writes (name, bytes) of files, or (name, type, target) of others."""
  with tarfile.open(path, "w") as file:
    for name, *rest in members:
      info = tarfile.TarInfo(name)
      if len(rest) == 1:
        info.size = len(rest[0])
        file.addfile(info, io.BytesIO(rest[0]))
      else:
        info.type, info.linkname = rest
        file.addfile(info)
  return path


def everything_below(folder):
  return {p for p in folder.rglob("*") if "out" not in p.parts}


def test_evil_names_are_names_and_nothing_else(tmp_path):
  secret = tmp_path / "secret.wav"
  secret.write_bytes(sound(880))
  names = [
    *("../secret.wav", "/etc/evil.wav", "a/../../b.wav", "ok/fine.wav"),
    "-rf.wav",
  ]
  archive = write_tar(
    tmp_path / "evil.tar",
    [
      *((name, sound(200 + 10 * i)) for i, name in enumerate(names)),
      ("link.wav", tarfile.SYMTYPE, str(secret)),
      ("hard.wav", tarfile.LNKTYPE, "../secret.wav"),
      ("device.wav", tarfile.CHRTYPE, ""),
      ("folder.wav", tarfile.DIRTYPE, ""),
      ("ok/._fine.wav", b"an attribute"),
      ("ok/notes.txt", b"no audio"),
    ],
  )
  before = everything_below(tmp_path)
  inputs = open_paths(archive)
  prepare(tmp_path / "out", inputs)
  assert everything_below(tmp_path) == before
  found = by_name(read(tmp_path / "out"))
  assert set(found) == set(names)
  expected = audio_io.load_audio(sound(200), sample_rate_hz=RATE_HZ)
  np.testing.assert_allclose(
    found["../secret.wav"]["waveform"], expected, atol=0.51 / 32768
  )


def test_classes_are_folders_below_the_one_that_all_share(tmp_path):
  write_tar(
    tmp_path / "t.tar", [("x/cat/1.wav", sound()), ("x/2.wav", sound())]
  )
  write_tar(tmp_path / "v.tar", [("./x/dog/a/3.wav", sound())])
  inputs = open_paths(f"train={tmp_path}/t.tar", f"valid={tmp_path}/v.tar")
  assert inputs.class_names == ("cat", "dog")
  labels = {
    clip.name: clip.label for clips in inputs.clips.values() for clip in clips
  }
  assert labels == {"x/cat/1.wav": 0, "x/2.wav": -1, "x/dog/a/3.wav": 1}


def test_the_last_of_a_name_counts_as_when_extracting(tmp_path):
  archive = write_tar(
    tmp_path / "t.tar", [("a.wav", sound(300)), ("a.wav", sound(600))]
  )
  (member,) = tar_source.list_audio(archive)
  content = tar_source.read(
    member.archive, member.offset, member.size, name="a.wav"
  )
  assert content == sound(600)
  write_tar(tmp_path / "u.tar", [("a.wav", sound())])
  with pytest.raises(ValueError, match=r"'a.wav' is in .*t.tar and in .*u.tar"):
    open_paths(archive, tmp_path / "u.tar")


def test_archives_that_cannot_be_read_are_named(tmp_path):
  archive = write_tar(
    tmp_path / "t.tar", [("a.wav", sound()), ("b.wav", sound())]
  )
  content = archive.read_bytes()
  inputs = open_paths(archive)
  archive.write_bytes(content[:600])
  with pytest.raises(
    ValueError, match=r"t.tar is not a .tar file .* cut short"
  ):
    open_paths(archive)
  with pytest.raises(ValueError, match="none of the 2 clips"):
    # Cut after it was listed: every clip says so.
    prepare(tmp_path / "out", inputs)
  assert "truncated" in read_ledger(tmp_path / "out")[0]["reason"]
  archive.unlink()
  with tarfile.open(archive, "w:gz") as file:
    file.add(tmp_path, "x")
  with pytest.raises(ValueError, match="gunzip"):
    open_paths(archive)
  empty = write_tar(tmp_path / "e.tar", [("notes.txt", b"no audio")])
  with pytest.raises(FileNotFoundError, match="no audio file"):
    open_paths(empty)
