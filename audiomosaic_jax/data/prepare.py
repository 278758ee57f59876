r"""Packs audio into a TFDS data set that trains without TensorFlow.

A folder, one sub-folder per class if there are classes; archives of it, which
are not extracted, are given the same way:

  python -m audiomosaic_jax.data.prepare \
    --input=recordings --output=~/tensorflow_datasets/recordings
  python -m audiomosaic_jax.data.prepare \
    --input='train=shards/*.tar' --output=~/tensorflow_datasets/recordings

AudioSet, from the official lists and a folder of clips; what is missing is
listed. Other data sets that configs know are named in the same way:

  python -m audiomosaic_jax.data.prepare --dataset=audioset --data_dir=DIR \
    --set=audio_dir=clips --split=train=full --split=eval \
    --output=~/tensorflow_datasets/audioset

From manifests in the format of the published code, or from a CSV file (here
that of ESC-50; every value of the column is a split):

  python -m audiomosaic_jax.data.prepare --input=train=train.json \
    --input=eval=eval.json --label_csv=class_labels_indices.csv \
    --output=~/tensorflow_datasets/audioset
  python -m audiomosaic_jax.data.prepare --input=meta/esc50.csv --root=audio \
    --path_column=filename --label_column=category --split_column=fold \
    --output=esc50

Train on the result with --config.data.source.data_dir=OUTPUT, or read it with
tfds.builder_from_directory(OUTPUT).as_data_source(SPLIT). In OUTPUT are also

  ledger.csv       every clip that is missing, unreadable or silent, and why
  statistics.json  of each split, what `audiomosaic_jax.data.audit` reports

The same command again goes on where it was stopped; what was lost are at most
the shards that were being written. To try the bad clips again, delete the
reports of their shards in OUTPUT/_prepare.

With --runner=DirectRunner, DataflowRunner, FlinkRunner or SparkRunner the
shards are an Apache Beam pipeline instead, whose own options follow "--" (pip
install 'audiomosaic-jax[beam]'). --output may be a bucket, gs://bucket/folder,
and so may a folder in --input or --root (pip install gcsfs).
"""

import functools
import os

from absl import app, flags, logging
from etils import epath

from audiomosaic_jax.data import (
  beam,
  prepare_clips,
  prepare_inputs,
  prepare_job,
)

FLAGS = flags.FLAGS

OF_DATASET = ("data_dir", "split", "set")
OF_INPUT = ("root", "label_csv", "path_column", "label_column", "split_column")


def open_inputs() -> prepare_clips.Inputs:
  """Opens what the flags name."""
  if bool(FLAGS.input) == bool(FLAGS.dataset):
    raise app.UsageError("give --input=PATH or --dataset=NAME, and not both")
  for name in OF_INPUT if FLAGS.dataset else OF_DATASET:
    if FLAGS[name].present:
      needs = "input" if FLAGS.dataset else "dataset"
      raise app.UsageError(f"--{name} does nothing without --{needs}")
  if FLAGS.dataset:
    return prepare_inputs.open_dataset(
      FLAGS.dataset,
      FLAGS.data_dir,
      FLAGS.split,
      FLAGS.set,
      sample_rate_hz=FLAGS.sample_rate_hz,
    )
  return prepare_inputs.open_paths(
    FLAGS.input,
    root=FLAGS.root,
    label_csv=FLAGS.label_csv,
    path_column=FLAGS.path_column,
    label_column=FLAGS.label_column,
    split_column=FLAGS.split_column,
    sample_rate_hz=FLAGS.sample_rate_hz,
  )


def run(runner_options: list[str]) -> dict:
  """Does the job of the flags; returns the statistics."""
  if runner_options and not FLAGS.runner:
    raise app.UsageError(f"unexpected arguments: {' '.join(runner_options)}")
  settings = prepare_job.Settings(
    format=FLAGS.format,
    sample_rate_hz=FLAGS.sample_rate_hz,
    num_frames=FLAGS.num_frames,
    shard_mb=FLAGS.shard_mb,
    num_shards=FLAGS.num_shards,
    seed=FLAGS.seed,
  )
  inputs = open_inputs()
  folder = epath.Path(FLAGS.output).expanduser()
  job = prepare_job.open_job(folder, inputs, settings)
  for split, clips in inputs.clips.items():
    count = sum(shard.split == split for shard in job.shards)
    print(f"{split}: {len(clips):,} clips, {count} shards", flush=True)
  # TFDS takes seconds to import; a wrong flag is told of before.
  from audiomosaic_jax.data import prepare_output, prepare_shards

  if FLAGS.runner:
    write = functools.partial(prepare_shards.write_shard, os.fspath(job.folder))
    beam.run_shards(job.missing(), write, FLAGS.runner, runner_options)
  else:
    prepare_shards.write_here(job, FLAGS.num_workers)
  statistics = prepare_output.finish(job, inputs.missing)
  tell(folder, statistics, settings.num_frames)
  return statistics


def tell(folder: epath.Path, statistics: dict, num_frames: int) -> None:
  """Prints what was written, and what to set for it.

  Args:
    folder: of the data set.
    statistics: split -> what `prepare_output.finish` says of it.
    num_frames: of the windows that mean and standard deviation are of.
  """
  for split, summary in statistics.items():
    fbank, spread = summary["fbank"], summary["seconds"]
    print(
      f"{split}: {summary['usable']:,} of {summary['listed']:,} clips are "
      f"written, {spread['total_hours']:.2f} hours; {summary['missing']} "
      f"missing, {summary['unreadable']} unreadable, {summary['silent']} silent"
    )
    if fbank:
      print(f"  {num_frames} frames a clip, zeros after short ones:")
      print(
        f"  --config.spectrogram.mean={fbank['padded_mean']:.4f} "
        f"--config.spectrogram.std={fbank['padded_std']:.4f}"
      )
  print(f"wrote {folder}; left out: {folder / 'ledger.csv'}", flush=True)


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  try:
    statistics = run(argv[1:])
  except (OSError, ValueError, ImportError, RuntimeError) as error:
    raise SystemExit(f"error: {error}") from None
  for split, summary in statistics.items():
    bad = summary["unreadable"] + summary["silent"]
    if bad > FLAGS.max_bad_fraction * summary["found"]:
      raise SystemExit(
        f"error: {bad} of {summary['found']} clips of split {split} are bad, "
        f"more than --max_bad_fraction={FLAGS.max_bad_fraction:g}; the others "
        "are written"
      )


if __name__ == "__main__":
  flags.DEFINE_multi_string(
    "input",
    [],
    "Folder, .csv, .json manifest or .tar; [split=]path. May be repeated.",
  )
  flags.DEFINE_string("output", None, "Folder to write to.", required=True)
  flags.DEFINE_string("root", None, "Folder of relative paths in --input.")
  flags.DEFINE_string("label_csv", None, "Classes: index,mid,display_name.")
  flags.DEFINE_string("path_column", "path", "Column of a .csv.")
  flags.DEFINE_string("label_column", None, "Column of a .csv.")
  flags.DEFINE_string("split_column", None, "Column of a .csv.")
  flags.DEFINE_string(
    "dataset",
    None,
    "Name of a data set, instead of --input; a wrong name is answered with the "
    "right ones.",
  )
  flags.DEFINE_string("data_dir", None, "Where --dataset is.")
  flags.DEFINE_multi_string(
    "split", [], "[name=]split of --dataset; without, all of it."
  )
  flags.DEFINE_multi_string(
    "set",
    [],
    "NAME=VALUE, an argument of --dataset, such as audio_dir=clips; a wrong "
    "name is answered with the right ones.",
  )
  flags.DEFINE_enum("format", "flac", prepare_job.FORMATS, "Of the audio.")
  flags.DEFINE_integer("sample_rate_hz", 16_000, "Rate of the stored audio.")
  flags.DEFINE_float("shard_mb", 256.0, "Size of a file, about.")
  flags.DEFINE_integer("num_shards", None, "Files of a split; for --shard_mb.")
  flags.DEFINE_integer("seed", 0, "Of the order of the clips.")
  flags.DEFINE_integer("num_frames", 1024, "Frames that the encoder sees.")
  flags.DEFINE_float("max_bad_fraction", 0.05, "Share of bad clips to allow.")
  flags.DEFINE_integer("num_workers", os.cpu_count(), "Processes.")
  flags.DEFINE_string(
    "runner", "", "A runner of Apache Beam; default: this machine."
  )
  app.run(main)
