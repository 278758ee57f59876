r"""Packs the audio that comes with the package into a TFDS data set.

python -m audiomosaic_jax.data.builders.audiomosaic_demo --output=DIR
"""

import os

import tensorflow_datasets as tfds
from absl import app, flags

from audiomosaic_jax.data import datasets, sources
from audiomosaic_jax.data.builders import packing

FLAGS = flags.FLAGS


class AudiomosaicDemo(packing.PackedAudio):
  """40 minutes of freely licensed audio and 779 instrument notes."""

  VERSION = tfds.core.Version("1.0.0")


def splits(
  sample_rate_hz: int, make=datasets.demo
) -> dict[str, sources.Source]:
  """Returns the splits of the packaged audio, all with the note classes.

  Args:
    sample_rate_hz: rate the clips are resampled to.
    make: (split, sample_rate_hz=) -> source.
  """
  result = {
    name: make(name, sample_rate_hz=sample_rate_hz)
    for name in datasets.DEMO_SPLITS
  }
  # The clips to pretrain on are unlabelled: -1 in every set of classes.
  result["pretrain"].class_names = result["instruments_train"].class_names
  return result


def make_builder(
  data_dir: str | os.PathLike, *, sample_rate_hz: int, num_threads: int
) -> AudiomosaicDemo:
  """Returns a builder that `packing.write` can run.

  Args:
    data_dir: where to; audiomosaic_demo/1.0.0 is made in it.
    sample_rate_hz: rate of the stored audio.
    num_threads: clips decoded and encoded at once.
  """
  return AudiomosaicDemo(
    splits=splits(sample_rate_hz),
    data_dir=data_dir,
    sample_rate_hz=sample_rate_hz,
    max_bad_fraction=0.0,
    num_threads=num_threads,
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  builder = make_builder(
    FLAGS.output,
    sample_rate_hz=FLAGS.sample_rate_hz,
    num_threads=FLAGS.num_threads,
  )
  print(f"wrote {packing.write(builder)}")


if __name__ == "__main__":
  flags.DEFINE_string("output", None, "Folder to write to.", required=True)
  flags.DEFINE_integer("sample_rate_hz", 16_000, "Rate of the stored audio.")
  flags.DEFINE_integer("num_threads", os.cpu_count(), "Clips at once.")
  app.run(main)
