r"""Packs any audio into a TFDS data set that trains without TensorFlow.

A folder, one sub-folder per class if there are classes:

  python -m audiomosaic_jax.data.builders.audio_folder \
    --input=~/recordings --output=~/tensorflow_datasets/recordings

AudioSet, from manifests in the format of the published code:

  python -m audiomosaic_jax.data.builders.audio_folder \
    --input=train=train.json --input=eval=eval.json \
    --label_csv=class_labels_indices.csv \
    --output=~/tensorflow_datasets/audioset

A CSV file (here that of ESC-50; every value of the column is a split):

  python -m audiomosaic_jax.data.builders.audio_folder \
    --input=meta/esc50.csv --root=audio --path_column=filename \
    --label_column=category --split_column=fold --output=esc50

Train on the result with --config.data.source.data_dir=OUTPUT.
"""

import os
import pathlib
import re
from collections.abc import Sequence

import tensorflow_datasets as tfds
from absl import app, flags

from audiomosaic_jax.data import sources, tables
from audiomosaic_jax.data.builders import packing

FLAGS = flags.FLAGS


class AudioFolder(packing.PackedAudio):
  """Audio packed by audiomosaic_jax.data.builders.audio_folder."""

  VERSION = tfds.core.Version("1.0.0")


def parse_inputs(
  inputs: Sequence[str], split_column: str | None
) -> dict[str, pathlib.Path]:
  """Returns split -> path of every "[split=]path".

  Args:
    inputs: without a name, the split is "train".
    split_column: if given, the values of this column of a .csv name its
      splits instead.

  Raises:
    ValueError: a split is named twice.
  """
  wanted = []
  for text in inputs:
    split, path = re.fullmatch(r"(?:(\w+)=)?(.+)", text).groups()
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".csv" and split_column:
      rows = tables.read_csv(path, [split_column])
      values = sorted({row[split_column] for _, row in rows})
      wanted.extend((value, path) for value in values)
    else:
      wanted.append((split or "train", path))
  names = [split for split, _ in wanted]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"split {name!r} is named twice; use --input=NAME=PATH")
  return dict(wanted)


def open_input(
  split: str,
  path: pathlib.Path,
  class_names: Sequence[str] | None,
  *,
  root: str | None,
  label_csv: str | None,
  path_column: str,
  label_column: str | None,
  split_column: str | None,
  sample_rate_hz: int,
) -> sources.Source:
  """Opens one split.

  Args:
    split: its name.
    path: folder, .csv file or .json manifest.
    class_names: classes of a folder or .csv; None takes those it has.
    root: folder of relative paths in a .csv or .json; None is that of the
      file.
    label_csv: classes of a manifest.
    path_column: column of a .csv.
    label_column: column of a .csv; None is unlabelled.
    split_column: column of a .csv; None takes all rows.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    ValueError: a manifest without label_csv.
  """
  if path.suffix == ".json":
    if label_csv is None:
      raise ValueError(f"{path} is a manifest; name its classes: --label_csv")
    return sources.ManifestSource(
      path, label_csv=label_csv, root=root, sample_rate_hz=sample_rate_hz
    )
  if path.suffix != ".csv":
    return sources.FolderSource(
      path, class_names=class_names, sample_rate_hz=sample_rate_hz
    )
  return sources.CsvSource(
    path,
    root=root,
    path_column=path_column,
    label_column=label_column,
    split_column=split_column,
    split=split if split_column else None,
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
  )


def make_splits(
  inputs: Sequence[str], *, split_column: str | None, **options
) -> dict[str, sources.Source]:
  """Opens every input, with the union of their classes in all splits.

  Args:
    inputs: see `parse_inputs`.
    split_column: see `parse_inputs`.
    **options: the other arguments of `open_input`.

  Returns:
    Split -> source.
  """
  options["split_column"] = split_column
  paths = parse_inputs(inputs, split_column)
  result = {s: open_input(s, p, None, **options) for s, p in paths.items()}
  if len({source.class_names for source in result.values()}) > 1:
    names = sorted({n for s in result.values() for n in s.class_names})
    result = {s: open_input(s, p, names, **options) for s, p in paths.items()}
  return result


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  splits = make_splits(
    FLAGS.input,
    root=FLAGS.root,
    label_csv=FLAGS.label_csv,
    path_column=FLAGS.path_column,
    label_column=FLAGS.label_column,
    split_column=FLAGS.split_column,
    sample_rate_hz=FLAGS.sample_rate_hz,
  )
  for name, source in splits.items():
    print(f"{name}: {source!r}")
  builder = AudioFolder(
    splits=splits,
    data_dir=pathlib.Path(FLAGS.output).expanduser(),
    sample_rate_hz=FLAGS.sample_rate_hz,
    max_bad_fraction=FLAGS.max_bad_fraction,
    num_threads=FLAGS.num_threads,
  )
  print(f"wrote {packing.write(builder)}")


if __name__ == "__main__":
  flags.DEFINE_multi_string(
    "input",
    None,
    "Folder, .csv or .json manifest; [split=]path. May be repeated.",
    required=True,
  )
  flags.DEFINE_string("output", None, "Folder to write to.", required=True)
  flags.DEFINE_string("root", None, "Folder of relative paths in --input.")
  flags.DEFINE_string("label_csv", None, "Classes: index,mid,display_name.")
  flags.DEFINE_string("path_column", "path", "Column of a .csv.")
  flags.DEFINE_string("label_column", None, "Column of a .csv.")
  flags.DEFINE_string("split_column", None, "Column of a .csv.")
  flags.DEFINE_integer("sample_rate_hz", 16_000, "Rate of the stored audio.")
  flags.DEFINE_float("max_bad_fraction", 0.05, "Share of clips to leave out.")
  flags.DEFINE_integer("num_threads", os.cpu_count(), "Clips at once.")
  app.run(main)
