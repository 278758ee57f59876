"""Data sets by name: `make_dataset(**config.data)` gives a source of clips."""

import os
import pathlib
from collections.abc import Sequence

from etils import epath

from audiomosaic_jax.data import (
  layout,
  partition,
  sources,
  task,
  tfds_source,
  wrappers,
)
from audiomosaic_jax.data.benchmarks import (
  audioset,
  envsdd,
  esc50,
  fsd50k,
  speech_commands,
  vggsound,
)

DEMO_DIR = pathlib.Path(__file__).parent / "demo_audio"
DEMO_SPLITS = (
  "pretrain",
  "instruments_train",
  "instruments_valid",
  "instruments_test",
)

NOT_PREPARED = """\
no prepared data set in data_dir={data_dir}: {problem}.
Either prepare AudioSet, or any audio you have, once:
  python -m audiomosaic_jax.data.prepare --input=AUDIO_DIR --output=PACKED_DIR
or, if that is a folder of audio files, read them as they are with the switch
folder: --config=configs/pretrain.py:folder
or train on the audio that comes with the package:
  python -m audiomosaic_jax.main --config=configs/pretrain.py:demo \
--workdir=runs/demo"""


DatasetNotPreparedError = layout.DatasetNotPreparedError


def demo(split: str, *, sample_rate_hz: int) -> sources.Source:
  """The packaged audio: 40 minutes to pretrain on, 779 instrument notes.

  The notes of instruments_test come from other sample libraries than those
  of instruments_train; none of valid and test is in "pretrain".

  Args:
    split: one of `DEMO_SPLITS`.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    ValueError: unknown split.
  """
  if split not in DEMO_SPLITS:
    raise ValueError(f"no split {split!r}; choose {', '.join(DEMO_SPLITS)}")
  if split != "pretrain":
    return _demo_notes(
      split.removeprefix("instruments_"), "label", sample_rate_hz
    )
  clips = sources.CsvSource(
    DEMO_DIR / "pretrain" / "clips.csv",
    root=None,
    path_column="path",
    label_column=None,
    split_column=None,
    split=None,
    class_names=None,
    sample_rate_hz=sample_rate_hz,
  )
  return wrappers.ConcatSource(
    [clips, _demo_notes("train", None, sample_rate_hz)]
  )


def _demo_notes(split: str, label_column: str | None, sample_rate_hz: int):
  return sources.CsvSource(
    DEMO_DIR / "instruments" / "labels.csv",
    root=None,
    path_column="path",
    label_column=label_column,
    split_column="split",
    split=split,
    class_names=None,
    sample_rate_hz=sample_rate_hz,
  )


def folder(
  split: str | None,
  *,
  data_dir: str | os.PathLike,
  class_names: Sequence[str] | None,
  sample_rate_hz: int,
) -> sources.Source:
  """A folder of audio, one sub-folder per class if there are classes.

  Args:
    split: sub-folder that holds the split; None is `data_dir` itself.
    data_dir: the folder.
    class_names: see `sources.FolderSource`; None takes the sub-folders of the
      split, so name them if a split may lack one.
    sample_rate_hz: rate the clips are resampled to.
  """
  return sources.FolderSource(
    pathlib.Path(data_dir, split or ""),
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
  )


def tfds(
  split: str, *, data_dir: str | os.PathLike, sample_rate_hz: int
) -> sources.Source:
  """A TFDS data set that `data.prepare` wrote.

  Args:
    split: name, possibly with a slice, or several: "train[:10%]+valid".
    data_dir: the folder with `dataset_info.json`, or a folder with one such
      folder at most two levels down, which is how TFDS nests them; here or in
      a bucket, gs://bucket/folder.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: nothing there; says how to go on.
    ValueError: several data sets there.
  """
  directory = epath.Path(data_dir).expanduser()
  found = [
    path.parent
    for pattern in ("", "*/", "*/*/")
    for path in sorted(directory.glob(f"{pattern}dataset_info.json"))
  ]
  if not found:
    problem = "no dataset_info.json there"
    if not directory.is_dir():
      problem = "no such folder"
    raise DatasetNotPreparedError(
      NOT_PREPARED.format(data_dir=data_dir, problem=problem)
    )
  if len(found) > 1:
    raise ValueError(
      f"data_dir={data_dir} holds several data sets; choose one of "
      f"{', '.join(map(str, found))}"
    )
  return tfds_source.TfdsSource(
    found[0], split=split, sample_rate_hz=sample_rate_hz
  )


def csv(split: str | None, *, data_dir: str | os.PathLike, **columns):
  """The rows of a CSV file; `columns` as in `sources.CsvSource`.

  Args:
    split: value of the split column; None is all rows.
    data_dir: path of the CSV file.
    **columns: the other arguments of `sources.CsvSource`.
  """
  return sources.CsvSource(data_dir, split=split, **columns)


def manifest(
  split: str,
  *,
  data_dir: str | os.PathLike,
  label_csv: str | os.PathLike,
  root: str | os.PathLike | None,
  sample_rate_hz: int,
) -> sources.Source:
  """A manifest in the published code's format.

  Args:
    split: name of the file in `data_dir`, without ".json".
    data_dir: folder of the manifests.
    label_csv: list of the classes.
    root: see `sources.ManifestSource`.
    sample_rate_hz: rate the clips are resampled to.
  """
  return sources.ManifestSource(
    pathlib.Path(data_dir, f"{split}.json"),
    label_csv=label_csv,
    root=root,
    sample_rate_hz=sample_rate_hz,
  )


def make_dataset(
  name: str, split: str | None, *, group_pattern: str = "", **arguments
) -> sources.Source:
  """Builds a data set by name.

  Args:
    name: a key of `DATASETS`.
    split: which part of it.
    group_pattern: tells which clips belong together by their names, see
      `partition.group_names`; "" leaves that to the data set.
    **arguments: the keyword arguments of that entry.

  Raises:
    ValueError: unknown name, no folder, or a pattern that fits nothing.
  """
  if name not in DATASETS:
    raise ValueError(
      f"no data set {name!r}; choose {', '.join(sorted(DATASETS))}"
    )
  if arguments.get("data_dir") == "":  # It would be the working directory.
    raise ValueError(
      f"data set {name!r} has no data_dir; give its folder, for example with "
      "--config.data.source.data_dir=FOLDER"
    )
  source = DATASETS[name](split, **arguments)
  if group_pattern:
    source.groups = partition.group_names(
      source.ids, source.groups, group_pattern
    )
  return source


def guard(
  source: sources.Source,
  *,
  cache_bytes: int,
  max_bad_fraction: float,
  report_path: str | os.PathLike | None,
) -> wrappers.TolerantSource:
  """What training reads: cached in memory, and tolerant of a few bad clips.

  Args:
    source: clips.
    cache_bytes: memory for decoded clips; 0 caches nothing.
    max_bad_fraction: share of bad clips that is put up with.
    report_path: where bad clips are listed; None is nowhere.
  """
  return wrappers.TolerantSource(
    wrappers.CachedSource(source, limit_bytes=cache_bytes),
    max_bad_fraction=max_bad_fraction,
    report_path=report_path,
  )


def labelled(
  split: str | None, *, data_dir: str | os.PathLike, sample_rate_hz: int
) -> sources.Source:
  """A folder with a labels.csv, or "demo" for the packaged notes.

  Args:
    split: value of the column split; None is all rows, with or without it.
    data_dir: the folder, or "demo".
    sample_rate_hz: rate the clips are resampled to.
  """
  folder = DEMO_DIR / "instruments" if data_dir == "demo" else data_dir
  return task.TaskSource(folder, split=split, sample_rate_hz=sample_rate_hz)


DATASETS = {
  "audioset": audioset.audioset,
  "csv": csv,
  "demo": demo,
  "envsdd": envsdd.envsdd,
  "esc50": esc50.esc50,
  "folder": folder,
  "fsd50k": fsd50k.fsd50k,
  "manifest": manifest,
  "speech_commands_v1": speech_commands.speech_commands_v1,
  "speech_commands_v2": speech_commands.speech_commands_v2,
  "task": labelled,
  "tfds": tfds,
  "vggsound": vggsound.vggsound,
}
