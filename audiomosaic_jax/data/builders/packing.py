"""What the builders share: any source of clips to a TFDS data set.

Clips are stored as mono FLAC at the training rate, so that reading them back
costs no resampling and loses nothing but what 16 bits lose. The audio is a
plain bytes feature: `tfds.features.Audio` needs TensorFlow even to be read.
"""

import io
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import soundfile
import tensorflow_datasets as tfds
import tqdm
from etils import epath

from audiomosaic_jax.data import parallel, wrappers
from audiomosaic_jax.data.audio_io import BadClipError, float_to_pcm16
from audiomosaic_jax.data.sources import Source


class PackedAudio(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes the splits it is given; subclasses say what they are."""

  # TFDS 4.9.10 finds these itself, but not for a module run as __main__, and
  # for others only if importlib_resources happens to be installed.
  code_path = epath.Path(__file__)
  pkg_dir_path = code_path.parent

  def __init__(
    self,
    *,
    splits: Mapping[str, Source],
    data_dir: str | os.PathLike,
    sample_rate_hz: int,
    max_bad_fraction: float,
    num_threads: int,
  ):
    """Prepares to write; `download_and_prepare` does it.

    Args:
      splits: name -> clips decoded at `sample_rate_hz`; the same classes in
        all of them.
      data_dir: TFDS writes below it, in name/version.
      sample_rate_hz: rate of the stored audio.
      max_bad_fraction: share of undecodable clips to leave out silently.
      num_threads: clips decoded and encoded at once.

    Raises:
      ValueError: the splits do not have the same classes.
    """
    classes = {source.class_names for source in splits.values()}
    if len(classes) != 1:
      raise ValueError(f"the splits have different classes: {classes}")
    self._sources = splits
    self._sample_rate_hz = sample_rate_hz
    self._max_bad_fraction = max_bad_fraction
    self._num_threads = num_threads
    super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    source = next(iter(self._sources.values()))
    label = tfds.features.Scalar(np.int64)
    if source.class_names:
      label = tfds.features.ClassLabel(names=source.class_names)
    if source.multi_hot:
      label = tfds.features.Sequence(label)
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          "audio": tfds.features.Tensor(shape=(), dtype=np.object_),
          "id": tfds.features.Scalar(np.int64),
          "label": label,
          "name": tfds.features.Text(),
          "sample_rate": tfds.features.Scalar(np.int64),
        }
      ),
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # The audio is here already.
    return {
      name: self._generate_examples(name, source)
      for name, source in self._sources.items()
    }

  def _generate_examples(self, split: str, source: Source) -> Iterator:
    """Yields (key, example) of each clip that decodes; counts the others."""

    def pack(index: int) -> dict | BadClipError:
      try:
        element = source[index]
      except BadClipError as error:
        return error
      label = element["label"]
      return {
        "audio": encode_flac(element["waveform"], self._sample_rate_hz),
        "id": index,
        "label": np.flatnonzero(label) if np.ndim(label) else int(label),
        "name": source.ids[index],
        "sample_rate": self._sample_rate_hz,
      }

    bad = []
    packed = parallel.parallel_map(pack, range(len(source)), self._num_threads)
    bar = tqdm.tqdm(packed, desc=split, total=len(source), unit=" clips")
    for index, example in enumerate(bar):
      if not isinstance(example, BadClipError):
        yield index, example
        continue
      bad.append(example)
      bar.write(f"left out: {example}")
      if len(bad) > self._max_bad_fraction * len(source):
        raise wrappers.TooManyBadClipsError(
          f"{len(bad)} of {len(source)} clips of split {split} are bad, more "
          f"than max_bad_fraction={self._max_bad_fraction:g} allows; repair "
          "or remove them, or raise max_bad_fraction"
        )


def encode_flac(waveform: np.ndarray, sample_rate_hz: int) -> bytes:
  """Returns a mono waveform as the bytes of a 16-bit FLAC file."""
  file = io.BytesIO()
  soundfile.write(
    file,
    float_to_pcm16(waveform),
    sample_rate_hz,
    format="FLAC",
    subtype="PCM_16",
  )
  return file.getvalue()


def write(builder: PackedAudio) -> pathlib.Path:
  """Writes the data set and returns its folder.

  Raises:
    FileExistsError: it is there already.
  """
  directory = pathlib.Path(builder.data_dir)
  if directory.exists():
    raise FileExistsError(
      f"{directory} exists already; delete it or choose another --output"
    )
  tfds.disable_progress_bar()  # Ours knows how many clips there are.
  builder.download_and_prepare(file_format="array_record")
  return directory
