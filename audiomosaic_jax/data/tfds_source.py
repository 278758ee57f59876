"""Prepared TFDS data sets, read without TensorFlow."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import soxr

from audiomosaic_jax.data import audio_io, sources


class TfdsSource(sources.Source):
  """A prepared TFDS data set of encoded audio; TensorFlow is not needed.

  Reads the schema that `data.prepare` writes: `audio` the bytes of a file or
  16-bit samples at `sample_rate`, `name` text, `label` a class or a sequence of
  classes. `ids` and `labels` read records as they are asked for.
  """

  def __init__(
    self, data_dir: sources.Path, *, split: str, sample_rate_hz: int
  ):
    """Opens the data set.

    Args:
      data_dir: folder with `dataset_info.json`, here or in a bucket.
      split: name, possibly with a slice, or several: "train[:10%]+valid".
      sample_rate_hz: rate the clips are resampled to.

    Raises:
      ValueError: a split or field that the data set does not have.
    """
    import tensorflow_datasets as tfds  # Slow to import; rarely needed.

    builder = tfds.builder_from_directory(data_dir)
    known = sorted(builder.info.splits)
    if not {part.split("[")[0] for part in split.split("+")} <= set(known):
      raise ValueError(
        f"{data_dir} has no split {split!r}; it has {', '.join(known)}"
      )
    missing = {"audio", "name", "label"} - set(builder.info.features)
    if missing:
      raise ValueError(
        f"{data_dir} lacks the features {', '.join(sorted(missing))}; write it "
        "with `python -m audiomosaic_jax.data.prepare`"
      )
    self._records = builder.as_data_source(split=split)
    feature = builder.info.features["label"]
    self.multi_hot = isinstance(feature, tfds.features.Sequence)
    classes = feature.feature if self.multi_hot else feature
    self.class_names = tuple(getattr(classes, "names", None) or ())
    self.sample_rate_hz = sample_rate_hz
    self.ids = _RecordNames(self._records)

  @functools.cached_property
  def labels(self) -> np.ndarray:
    labels = [self._label(record) for record in self._records]
    return sources.encode_labels(labels, len(self.class_names))

  def _label(self, record: Mapping) -> int | tuple[int, ...]:
    label = np.asarray(record["label"])
    return int(label) if label.ndim == 0 else tuple(label.tolist())

  def __getitem__(self, index: int) -> dict:
    record = self._records[int(index)]
    if isinstance(record["audio"], np.ndarray):
      waveform = self._from_samples(record)
    else:
      waveform = audio_io.load_audio(
        bytes(record["audio"]),
        sample_rate_hz=self.sample_rate_hz,
        name=_text(record["name"]),
      )
    label = sources.encode_label(self._label(record), len(self.class_names))
    return {"waveform": waveform, "label": label, "id": np.int32(index)}

  def _from_samples(self, record: Mapping) -> np.ndarray:
    """Returns samples that were stored as they are, at the wanted rate."""
    rate_hz = int(record["sample_rate"])
    if rate_hz == self.sample_rate_hz:
      return record["audio"]
    waveform = audio_io.pcm16_to_float(record["audio"])
    return soxr.resample(waveform, rate_hz, self.sample_rate_hz, quality="HQ")


class _RecordNames(Sequence):
  """The `name` field of the records, read when asked for."""

  def __init__(self, records: Sequence):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    return _text(self._records[int(index)]["name"])

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))


def _text(value: str | bytes) -> str:
  # Names of files need not be text.
  is_bytes = isinstance(value, bytes)
  return value.decode(errors="surrogateescape") if is_bytes else str(value)
