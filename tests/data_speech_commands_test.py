"""Speech Commands: both versions, both test conventions, silence."""

import pytest
from fake_datasets import (
  NOISE_SECONDS,
  RATE_HZ,
  write_clip,
  write_speech_commands,
  write_speech_commands_v1,
  write_speech_commands_v2,
)

from audiomosaic_jax.data import datasets, layout
from audiomosaic_jax.data.benchmarks import speech_commands

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off")
COMMANDS += ("stop", "go")


def open_v1(root, split, **changes):
  arguments = dict(
    data_dir=root,
    test_dir=None,
    silence=False,
    max_missing_fraction=0.0,
    sample_rate_hz=RATE_HZ,
  )
  return datasets.make_dataset(
    "speech_commands_v1", split, **{**arguments, **changes}
  )


def open_v2(root, split, **changes):
  arguments = dict(
    data_dir=root, max_missing_fraction=0.0, sample_rate_hz=RATE_HZ
  )
  return datasets.make_dataset(
    "speech_commands_v2", split, **{**arguments, **changes}
  )


def write_test_set(root):
  """The separate test set: a folder per class, silence included."""
  for word in (*COMMANDS, "_unknown_", "_silence_"):
    write_clip(root / word / "0a7c2a8d_nohash_0.wav", 1.0)
  return root


def test_the_published_convention_has_eleven_classes(tmp_path):
  write_speech_commands_v1(tmp_path)
  splits = {s: open_v1(tmp_path, s) for s in ("train", "valid", "test")}
  for source in splits.values():
    assert source.class_names == (*COMMANDS, "_unknown_")
  # Listed alphabetically by file where there is no list: bed, no, yes, zero.
  assert splits["train"].labels.tolist() == [10, 10, 1, 1, 0, 0, 10, 10]
  ids = [set(source.ids) for source in splits.values()]
  assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
  assert set(splits["test"].groups) == {"0a7c2a8d", "1b4c9b89"}


def test_silence_is_cut_every_half_second_and_held_out_by_file(tmp_path):
  write_speech_commands_v1(tmp_path)
  counts = {
    "train": ("doing_the_dishes", 2),
    "valid": ("running_tap", 3),
    "test": ("exercise_bike", 2),
  }
  for split, (noise, count) in counts.items():
    source = open_v1(tmp_path, split, silence=True)
    assert source.class_names == (*COMMANDS, "_unknown_", "_silence_")
    cut = [i for i, label in enumerate(source.labels) if label == 11]
    assert [source.ids[i] for i in cut] == [
      f"_background_noise_/{noise}.wav#{i / 2:.3f}-{1 + i / 2:.3f}"
      for i in range(count)
    ]
    assert {source.groups[i] for i in cut} == {
      f"_background_noise_/{noise}.wav"
    }
    assert {len(source[i]["waveform"]) for i in cut} == {RATE_HZ}
    again = open_v1(tmp_path, split, silence=True)
    assert again.ids == source.ids
  assert set(NOISE_SECONDS) == {noise for noise, _ in counts.values()}


def test_the_separate_test_set_brings_its_own_silence(tmp_path):
  write_speech_commands_v1(tmp_path / "main")
  test_dir = write_test_set(tmp_path / "separate")
  options = dict(test_dir=test_dir, silence=True)
  test = open_v1(tmp_path / "main", "test", **options)
  assert len(test) == 12 and sorted(test.labels.tolist()) == list(range(12))
  train = open_v1(tmp_path / "main", "train", **options)
  # Nothing has to be held out for testing.
  noise = {name.partition("#")[0] for name in train.ids if name[0] == "_"}
  assert noise == {
    "_background_noise_/doing_the_dishes.wav",
    "_background_noise_/exercise_bike.wav",
  }
  without = open_v1(tmp_path / "main", "test", test_dir=test_dir)
  assert len(without) == 11 and max(without.labels) == 10


def test_the_separate_test_set_that_is_not_there_says_where_to_get_it(tmp_path):
  write_speech_commands_v1(tmp_path)
  with pytest.raises(layout.DatasetNotPreparedError, match=r"test_set_v0\.01"):
    open_v1(tmp_path, "test", test_dir=tmp_path / "nowhere")


def test_silence_without_noise_says_so(tmp_path):
  write_speech_commands_v1(tmp_path)
  (tmp_path / "_background_noise_" / "running_tap.wav").unlink()
  with pytest.raises(FileNotFoundError, match=r"running_tap.wav .*silence=Fa"):
    open_v1(tmp_path, "valid", silence=True)


@pytest.mark.parametrize("seconds", [None, 0.5])
def test_noise_that_gives_no_second_is_named(tmp_path, seconds):
  write_speech_commands_v1(tmp_path)
  noise = tmp_path / "_background_noise_" / "running_tap.wav"
  noise.write_bytes(b"not audio")
  if seconds:
    write_clip(noise, seconds)
  with pytest.raises(ValueError, match=r"running_tap\.wav"):
    open_v1(tmp_path, "valid", silence=True)


def test_version_2_has_the_published_order_of_35_words(tmp_path):
  write_speech_commands_v2(tmp_path)
  assert len(set(speech_commands.WORDS_2)) == 35
  assert len(set(speech_commands.WORDS_1)) == 30
  assert set(speech_commands.WORDS_1) < set(speech_commands.WORDS_2)
  source = open_v2(tmp_path, "valid")
  assert source.class_names == speech_commands.WORDS_2
  words = {name.partition("/")[0] for name in source.ids}
  assert words == {"yes", "backward", "four"}
  assert set(source.labels.tolist()) == {28, 0, 20}
  inner = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
  assert open_v2(inner, "valid").ids == source.ids


def test_the_other_version_is_noticed(tmp_path):
  write_speech_commands(tmp_path, ("yes", "backward"))
  with pytest.raises(
    ValueError, match="label 'backward' is not in the words of version 1"
  ):
    open_v1(tmp_path, "train")


@pytest.mark.parametrize(
  "line, message",
  [
    ("../../x.wav", r"testing_list.txt, line 9: .* is not the name"),
    ("/etc/passwd", r"testing_list.txt, line 9: .* is not the name"),
    ("car/0a7c2a8d_nohash_0.wav", r"testing_list.txt, line 9: label 'car' is"),
    ("yes/0a7c2a8d_nohash_2.wav", r"line 9: .* is listed already, in .*line 1"),
  ],
)
def test_a_wrong_line_of_a_list_is_named(tmp_path, line, message):
  write_speech_commands_v1(tmp_path)
  with open(tmp_path / "testing_list.txt", "a") as file:
    file.write(f"{line}\n")
  with pytest.raises(ValueError, match=message):
    open_v1(tmp_path, "test", max_missing_fraction=0.5)


def test_a_single_word_is_refused(tmp_path):
  write_speech_commands(tmp_path, ("bed", "cat"))
  with pytest.raises(ValueError, match=r"one class \(_unknown_\) of 11"):
    open_v1(tmp_path, "train")
