"""The audit counts what is wrong with a copy and says what is in it."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys

import fake_datasets
import numpy as np
import pytest
import soundfile
from fake_datasets import RATE_HZ, write_audioset, write_clip, write_esc50

from audiomosaic_jax import features
from audiomosaic_jax.data import (
  audit,
  audit_report,
  datasets,
  host_fbank,
  sampling,
  scan,
)
from configs import common


def run(dataset, data_dir, output, splits=None, changes=(), **options):
  arguments = audit.parse_arguments(dataset, data_dir, RATE_HZ, changes)
  settings = dict(
    sample_rate_hz=RATE_HZ, min_seconds=0.05, num_frames=32, num_threads=2
  )
  return audit.audit(
    dataset,
    splits or audit.SPLITS[dataset],
    arguments,
    output,
    **{**settings, **options},
  )


@pytest.fixture
def broken(tmp_path):
  """A copy of ESC-50 with one clip of everything that can be wrong."""
  write_esc50(tmp_path / "data")
  audio = tmp_path / "data" / "ESC-50-master" / "audio"
  (audio / "1-100010-A-0.wav").unlink()
  (audio / "1-100011-A-1.wav").write_bytes(b"not audio")
  soundfile.write(audio / "2-100020-A-0.wav", np.zeros(800), RATE_HZ)
  write_clip(audio / "2-100021-A-1.wav", seconds=0.03)
  write_clip(audio / "3-100030-A-0.wav", rate_hz=2 * RATE_HZ)
  shutil.copy(audio / "4-100040-A-0.wav", audio / "4-100040-B-0.wav")
  samples, _ = soundfile.read(audio / "4-100041-A-1.wav", dtype="int16")
  # The same samples in another file format.
  soundfile.write(audio / "5-100051-A-1.wav", samples, RATE_HZ, format="FLAC")
  return tmp_path / "data"


def test_everything_that_can_be_wrong_is_counted_and_listed(broken, tmp_path):
  report = run("esc50", broken, tmp_path / "out")
  whole = report["splits"]["all"]
  expected = {
    **{"listed": 20, "found": 19, "usable": 17, "missing": 1, "unreadable": 1},
    **{"silent": 1, "too_short": 1, "wrong_rate": 1, "duplicate": 2},
  }
  assert {name: whole[name] for name in expected} == expected
  assert whole["examples"] == {
    "missing": ["1-100010-A-0.wav"],
    "unreadable": ["1-100011-A-1.wav"],
    "silent": ["2-100020-A-0.wav"],
    "too_short": ["2-100021-A-1.wav"],
    "wrong_rate": ["3-100030-A-0.wav"],
    "duplicate": ["4-100040-B-0.wav", "5-100051-A-1.wav"],
  }
  assert whole["file_rates_hz"] == {"8000": 17, "16000": 1}
  assert whole["class_counts"] == {"dog": 8, "rooster": 4, "pig": 5}
  assert report["shared"] == [
    {
      "splits": ["fold4", "fold5"],
      "clips": 1,
      "examples": [["4-100041-A-1.wav", "5-100051-A-1.wav"]],
    }
  ]
  on_disk = json.loads((tmp_path / "out" / "report.json").read_text())
  assert on_disk == report
  page = (tmp_path / "out" / "report.md").read_text()
  assert "| all | 20 | 19 | 17 | 1 | 1 | 1 | 1 | 1 | 2 |" in page
  assert "1 clips of fold4 have the samples of clips of fold5" in page
  assert whole["usable_ids_sha256"] in page
  with open(tmp_path / "out" / "clips.csv", newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["split"] == "all"]
  assert len(rows) == 20
  reasons = {row["id"]: row["reason"] for row in rows if row["status"] != "ok"}
  assert set(reasons) == {
    *("1-100010-A-0.wav", "1-100011-A-1.wav", "2-100020-A-0.wav")
  }
  assert "cannot decode" in reasons["1-100011-A-1.wav"]
  assert not list((tmp_path / "out").glob(".*"))


def test_the_list_of_clips_has_the_hash_of_the_report(broken, tmp_path):
  report = run("esc50", broken, tmp_path / "out", ["fold1"])
  text = (tmp_path / "out" / "ids.fold1.txt").read_bytes()
  assert text.decode() == "1-100010-B-0.wav\n1-100012-A-2.wav\n"
  digest = report["splits"]["fold1"]["usable_ids_sha256"]
  assert digest == hashlib.sha256(text).hexdigest()
  assert digest == scan.ids_sha256(["1-100012-A-2.wav", "1-100010-B-0.wav"])


def test_two_copies_agree_however_their_files_are_named(tmp_path):
  write_audioset(tmp_path / "one")
  shutil.copytree(tmp_path / "one", tmp_path / "two")
  clips = tmp_path / "two" / "clips"
  for path in {*clips.glob("*/*_3*"), *clips.glob("*/Y*")}:
    video = [v for v in fake_datasets.VIDEOS if v in path.name]
    path.rename(path.with_name(video[-1] + path.suffix))
  changes = ["audio_dir=clips"]
  reports = [
    run("audioset", tmp_path / name, tmp_path / f"out_{name}", None, changes)
    for name in ("one", "two")
  ]
  assert reports[0] == reports[1]
  # Another sound under the same name is another copy, if of the same clips.
  video = next(
    (tmp_path / "two" / "clips").rglob(f"{fake_datasets.VIDEOS[0]}*")
  )
  write_clip(video)
  other = run("audioset", tmp_path / "two", tmp_path / "out", None, changes)
  one, two = reports[0]["splits"]["full"], other["splits"]["full"]
  assert one["usable_ids_sha256"] == two["usable_ids_sha256"]
  assert one["usable_samples_sha256"] != two["usable_samples_sha256"]
  assert reports[0]["splits"]["full"]["usable"] == 7
  assert reports[0]["shared"] == []


def test_the_weights_are_for_training_and_leave_bad_clips_out(broken, tmp_path):
  run("esc50", broken, tmp_path / "out", ["all"])
  arguments = audit.parse_arguments("esc50", broken, RATE_HZ, [])
  source = datasets.make_dataset("esc50", "all", **arguments)
  weights = sampling.read_weights(
    tmp_path / "out" / "weights.all.csv", source.ids
  )
  by_name = dict(zip(source.ids, weights, strict=True))
  assert len(by_name) == 19  # The missing clip is no part of the source.
  assert by_name["1-100011-A-1.wav"] == by_name["2-100020-A-0.wav"] == 0.0
  assert by_name["1-100010-B-0.wav"] == pytest.approx(1000 / 8.01)
  assert by_name["1-100012-A-2.wav"] == pytest.approx(1000 / 5.01)


def test_the_filter_bank_is_that_of_training():
  settings = common.fbank().to_dict()
  assert settings == {"sample_rate_hz": 16_000, **host_fbank.FBANK}
  rng = np.random.default_rng(0)
  time_s = np.arange(16_000) / 16_000
  waveforms = {
    "noise": 0.1 * rng.standard_normal(16_000),
    "chirp": 0.3 * np.sin(2 * np.pi * (200 + 3000 * time_s) * time_s) + 0.1,
    "one frame": 0.1 * rng.standard_normal(400),
  }
  for name, waveform in waveforms.items():
    waveform = waveform.astype(np.float32)
    expected = np.asarray(features.log_mel_fbank(waveform, **settings))
    ours = host_fbank.log_mel_fbank(waveform, **settings)
    assert ours.shape == expected.shape
    # A chirp leaks down to rounding errors, which differ between FFTs.
    limit = 1e-3 if name == "chirp" else 1e-5
    assert np.abs(ours - expected).mean() < limit, name


def test_mean_and_deviation_are_those_of_all_frames(tmp_path):
  rng = np.random.default_rng(0)
  fbanks = []
  for i, seconds in enumerate((0.1, 0.25, 0.5)):
    samples = (0.1 * rng.standard_normal(int(16_000 * seconds))).astype("f4")
    path = tmp_path / "in" / f"{i}.wav"
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    settings = dict(host_fbank.FBANK, sample_rate_hz=16_000)
    fbanks.append(host_fbank.log_mel_fbank(samples, **settings))
  source = datasets.folder(
    None, data_dir=tmp_path / "in", class_names=None, sample_rate_hz=16_000
  )
  result = scan.scan_source(
    source, sample_rate_hz=16_000, num_frames=32, num_threads=2, title="test"
  )
  statistics = audit_report.statistics(result, 32)
  everything = np.concatenate(fbanks).astype(np.float64)
  assert statistics["mean"] == pytest.approx(everything.mean())
  assert statistics["std"] == pytest.approx(everything.std())
  padded = np.stack(
    [np.pad(f[:32], [(0, max(32 - len(f), 0)), (0, 0)]) for f in fbanks]
  ).astype(np.float64)
  assert statistics["padded_mean"] == pytest.approx(padded.mean())
  assert statistics["padded_std"] == pytest.approx(padded.std())


def test_a_split_that_is_not_there_does_not_stop_the_others(tmp_path):
  write_audioset(tmp_path / "data")
  (tmp_path / "data" / "unbalanced_train_segments.csv").unlink()
  report = run("audioset", tmp_path / "data", tmp_path / "out")
  assert set(report["splits"]) == {"balanced", "eval"}
  assert "unbalanced_train_segments.csv" in report["not_opened"]["full"]
  assert "**full was not audited:**" in audit_report.markdown(report)
  with pytest.raises(FileNotFoundError, match="unbalanced_train"):
    run("audioset", tmp_path / "data", tmp_path / "out", ["full"])


def test_a_name_that_is_no_text_does_not_lose_the_report(tmp_path):
  odd = os.fsdecode(b"caf\xe9 | 1.wav")
  plain = write_clip(tmp_path / "in" / "cat" / "a.wav")
  plain.rename(plain.with_name(odd))
  write_clip(tmp_path / "in" / "dog" / "b.wav")
  report = run("folder", tmp_path / "in", tmp_path / "out")
  names = (tmp_path / "out" / "ids.all.txt").read_bytes()
  assert names == b"cat/caf\xe9 | 1.wav\ndog/b.wav\n"
  digest = report["splits"]["all"]["usable_ids_sha256"]
  assert digest == hashlib.sha256(names).hexdigest()
  assert (tmp_path / "out" / "weights.all.csv").exists()


def test_an_unlabelled_folder_has_no_weights(tmp_path):
  write_clip(tmp_path / "in" / "a.wav")
  report = run("folder", tmp_path / "in", tmp_path / "out")
  assert report["splits"]["all"]["usable"] == 1
  assert report["splits"]["all"]["class_counts"] == {}
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    *("clips.csv", "ids.all.txt", "report.json", "report.md")
  ]


@pytest.mark.parametrize(
  "dataset", sorted(set(fake_datasets.FAKES) - {"manifest", "csv", "folder"})
)
def test_every_data_set_can_be_audited(tmp_path, dataset):
  fake_datasets.FAKES[dataset][0](tmp_path / "data")
  report = run(dataset, tmp_path / "data", tmp_path / "out")
  assert report["not_opened"] == {}
  assert set(report["splits"]) == set(audit.SPLITS[dataset])
  for split, summary in report["splits"].items():
    assert summary["usable"] == summary["listed"], split
    assert sum(summary["class_counts"].values()) >= summary["usable"]


@pytest.mark.parametrize(
  "dataset, changes, message",
  [
    ("imagenet", [], "no data set 'imagenet'; choose audioset"),
    ("demo", [], "no data set 'demo'"),
    ("esc50", ["fold=1"], "esc50 takes none"),
    ("audioset", ["audio=x"], "audioset takes audio_dir=VALUE"),
    ("audioset", ["audio_dir"], "audioset takes audio_dir=VALUE"),
    ("manifest", [], "manifest needs --set=label_csv=VALUE"),
  ],
)
def test_a_wrong_argument_is_answered_with_the_right_ones(
  dataset, changes, message
):
  with pytest.raises(ValueError, match=message):
    audit.parse_arguments(dataset, "data", RATE_HZ, changes)


def test_arguments_are_read_as_json_where_they_can_be():
  read = audit.parse_arguments(
    "speech_commands_v1", "data", RATE_HZ, ["silence=true", "test_dir=x/y"]
  )
  assert read["silence"] is True and read["test_dir"] == "x/y"
  assert read["max_missing_fraction"] == 1.0


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "audiomosaic_jax.data.audit", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_shows_progress_and_the_report(tmp_path):
  write_esc50(tmp_path / "data")
  result = command(
    "--dataset=esc50",
    f"--data_dir={tmp_path / 'data'}",
    f"--output={tmp_path / 'out'}",
  )
  assert result.returncode == 0, result.stderr
  assert "20/20" in result.stderr and "# Audit of esc50" in result.stdout
  assert (tmp_path / "out" / "report.json").exists()


def test_the_command_explains_itself_and_its_errors(tmp_path):
  text = command("--help").stdout
  assert "1000 / (n_c + 0.01)" in text and "--data_dir" in text
  result = command(
    "--dataset=esc50", f"--data_dir={tmp_path}/no", f"--output={tmp_path}/out"
  )
  assert result.returncode and "error: data_dir=" in result.stderr
  assert "Traceback" not in result.stderr
