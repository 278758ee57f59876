"""Speech Commands: one second, one spoken word.

The archives have no list of the training clips: what is in neither
validation_list.txt nor testing_list.txt is trained on. Complete copies have

  version 1: 51,088 training, 6,798 validation and 6,835 testing clips;
  version 2: 84,843 training, 9,981 validation and 11,005 testing clips.
"""

import pathlib
from collections.abc import Mapping

import numpy as np
import soundfile

from audiomosaic_jax.data import layout, sources, wrappers

SOURCE = "download.tensorflow.org/data/speech_commands_v0.0{version}.tar.gz"
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
SPLITS = ("train", *LISTS)
NOISE, SILENCE, UNKNOWN = "_background_noise_", "_silence_", "_unknown_"

# In the order of the published label lists, so that published heads fit.
COMMANDS = (
  *("yes", "no", "up", "down", "left"),
  *("right", "on", "off", "stop", "go"),
)
WORDS_1 = (
  *COMMANDS,
  *("zero", "one", "two", "three", "four"),
  *("five", "six", "seven", "eight", "nine"),
  *("bed", "bird", "cat", "dog", "happy"),
  *("house", "marvin", "sheila", "tree", "wow"),
)
WORDS_2 = (
  *("backward", "follow", "five", "bed", "zero", "on", "learn"),
  *("two", "house", "tree", "dog", "stop", "seven", "eight"),
  *("down", "six", "forward", "cat", "right", "visual", "four"),
  *("wow", "no", "nine", "off", "three", "left", "marvin"),
  *("yes", "up", "sheila", "happy", "bird", "go", "one"),
)

# The noise that is not trained on: TFDS's choice for validation, and ours for
# testing without the separate test set.
HELD_OUT_NOISE = {"valid": "running_tap.wav", "test": "exercise_bike.wav"}


def speech_commands_v1(
  split: str,
  *,
  data_dir: layout.Path,
  test_dir: layout.Path | None,
  silence: bool,
  max_missing_fraction: float,
  sample_rate_hz: int,
) -> sources.Source:
  """Version 1: the ten commands, _unknown_ for the other twenty words.

  Two conventions are in use, and their accuracies are not comparable:
    * silence=False, test_dir=None: 11 classes, tested on testing_list.txt.
      This is what the published AudioMosaic head and manifest have.
    * silence=True, test_dir=...: 12 classes, tested on the separate
      speech_commands_test_set_v0.01, as TFDS has it; there, _unknown_ is as
      rare as any command.
  The clips of _silence_ are the seconds that start every half second of the
  files in _background_noise_, as in TFDS: running_tap.wav for validation, the
  others for training. With silence=True and no test_dir, exercise_bike.wav is
  left out of training and tested on; that is no published convention.

  Args:
    split: "train", "valid" or "test".
    data_dir: the folder that the archive was extracted into.
    test_dir: folder of the separate test set; None tests on testing_list.txt.
      Give the same to all splits.
    silence: whether there is a class _silence_.
    max_missing_fraction: share of listed clips that may be missing.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: lists or clips are not there.
    ValueError: unknown split or word, a wrong line, missing clips.
  """
  root = _find_root(data_dir, split, version=1)
  class_names = (*COMMANDS, UNKNOWN, *([SILENCE] if silence else []))
  index = {word: COMMANDS.index(word) for word in COMMANDS}
  index |= {w: len(COMMANDS) for w in (*WORDS_1, UNKNOWN) if w not in COMMANDS}
  options = {
    "class_names": class_names,
    "sample_rate_hz": sample_rate_hz,
  }
  separate = split == "test" and test_dir is not None
  if separate:
    root = layout.find_root(
      test_dir,
      holds=[COMMANDS[0], UNKNOWN],
      inside=["speech_commands_test_set_v0.01"],
      source=SOURCE.format(version=1).replace("commands", "commands_test_set"),
    )
    clips = _separate_test_set(root, index, silence)
  else:
    clips = _clips(root, split, index, version=1)
  words = layout.make_source(
    clips,
    root=root,
    max_missing_fraction=max_missing_fraction,
    name=f"Speech Commands 1 {split}",
    **options,
  )
  if not silence or separate:
    return words
  noise = _noise(root, split, own_test=test_dir is None, **options)
  return wrappers.ConcatSource([words, noise])


def speech_commands_v2(
  split: str,
  *,
  data_dir: layout.Path,
  max_missing_fraction: float,
  sample_rate_hz: int,
) -> sources.Source:
  """Version 2: 35 words, all of them classes; groups are the speakers.

  Tested on testing_list.txt, which is the published convention; the separate
  test set of version 2 has ten of the words only.

  Args:
    split: "train", "valid" or "test".
    data_dir: the folder that the archive was extracted into.
    max_missing_fraction: share of listed clips that may be missing.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: lists or clips are not there.
    ValueError: unknown split or word, a wrong line, missing clips.
  """
  root = _find_root(data_dir, split, version=2)
  index = {word: i for i, word in enumerate(WORDS_2)}
  return layout.make_source(
    _clips(root, split, index, version=2),
    root=root,
    class_names=WORDS_2,
    sample_rate_hz=sample_rate_hz,
    max_missing_fraction=max_missing_fraction,
    name=f"Speech Commands 2 {split}",
  )


def _find_root(
  data_dir: layout.Path, split: str, *, version: int
) -> pathlib.Path:
  if split not in SPLITS:
    raise ValueError(f"no split {split!r}; choose {', '.join(SPLITS)}")
  name = f"speech_commands_v0.0{version}"
  return layout.find_root(
    data_dir,
    holds=list(LISTS.values()),
    inside=[name, f"SpeechCommands/{name}"],
    source=SOURCE.format(version=version),
  )


def _clips(
  root: pathlib.Path, split: str, index: Mapping[str, int], *, version: int
) -> list[layout.Clip]:
  """Lists the clips of a split: those of its list, or of none."""
  files = {
    path
    for path in sources.list_audio(root)
    if path.count("/") == 1 and not path.startswith("_")
  }
  listed = {
    name: list(layout.read_rows(root / text, columns=1, header=None))
    for name, text in LISTS.items()
  }
  for rows in listed.values():
    for where, (path, *_) in rows:
      layout.check_relative(path, where)
  if split == "train":
    held_out = {row.cells[0] for rows in listed.values() for row in rows}
    wanted = [(str(root / path), path) for path in sorted(files - held_out)]
  else:
    wanted = [(where, path) for where, (path, *_) in listed[split]]
  clips = []
  for where, path in wanted:
    word, _, name = path.partition("/")
    label = layout.class_index(
      word, index, where, f"the words of version {version}"
    )
    clips.append(
      layout.Clip(
        id=path,
        path=path if path in files else None,
        label=label,
        group=_speaker(name),
        where=where,
      )
    )
  return clips


def _speaker(name: str) -> str:
  """Returns who speaks: 0a7c2a8d_nohash_0.wav is by 0a7c2a8d."""
  return name.rpartition(".")[0].partition("_nohash_")[0]


def _separate_test_set(
  root: pathlib.Path, index: Mapping[str, int], silence: bool
) -> list[layout.Clip]:
  """Lists the clips of the separate test set, one folder per class."""
  index = dict(index)
  if silence:
    index[SILENCE] = len(COMMANDS) + 1
  clips = []
  for path in sources.list_audio(root):
    word, _, name = path.partition("/")
    where = str(root / path)
    if word != SILENCE or silence:
      label = layout.class_index(word, index, where, "the classes of version 1")
      clips.append(layout.Clip(path, path, label, _speaker(name), where))
  return clips


def _noise(
  root: pathlib.Path,
  split: str,
  *,
  own_test: bool,
  class_names: tuple[str, ...],
  sample_rate_hz: int,
) -> sources.FileSource:
  """Cuts seconds of _silence_ out of the files of background noise."""
  held_out = dict(HELD_OUT_NOISE)
  if not own_test:
    del held_out["test"]
  files = [path for path in sources.list_audio(root) if path.startswith(NOISE)]
  if split in held_out:
    files = [path for path in files if path == f"{NOISE}/{held_out[split]}"]
  else:
    left = {f"{NOISE}/{name}" for name in held_out.values()}
    files = [path for path in files if path not in left]
  if not files:
    name = held_out.get(split, "*.wav")
    raise layout.DatasetNotPreparedError(
      f"{root} has no {NOISE}/{name} to cut {SILENCE} out of; set "
      "silence=False to do without"
    )
  spans = []
  for path in files:
    try:
      info = soundfile.info(root / path)
    except soundfile.LibsndfileError as error:
      raise ValueError(f"{root / path}: {error.error_string}") from None
    starts = np.arange(0, info.frames - info.samplerate, info.samplerate // 2)
    spans += [(path, start / info.samplerate) for start in starts]
  if not spans:
    raise ValueError(f"{root}: no second to cut out of {', '.join(files)}")
  return sources.FileSource(
    [path for path, _ in spans],
    root=root,
    spans=[(start_s, start_s + 1.0) for _, start_s in spans],
    labels=[class_names.index(SILENCE)] * len(spans),
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
    groups=[path for path, _ in spans],
  )
