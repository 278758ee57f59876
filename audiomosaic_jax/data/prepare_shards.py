"""Writes the shards of a job, here in as many processes as there are cores.

A shard is decoded clip by clip into a file of records under a temporary name.
Its report, which comes last, has what an audit would say of each clip, and the
sums that statistics are made of.
"""

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from concurrent import futures

import numpy as np
import soundfile
import tensorflow_datasets as tfds
import threadpoolctl
import tqdm
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from audiomosaic_jax.data import prepare_job, scan, sources, storage
from audiomosaic_jax.data.audio_io import as_pcm16
from audiomosaic_jax.data.prepare_clips import Clip
from audiomosaic_jax.data.prepare_job import Job, Shard

# Grain wants records that can be read one by one. FLAC does not shrink again,
# and integers by little; without trying, reading and writing take half as long.
WRITER_OPTIONS = "group_size:1,uncompressed"


class ClipSource(sources.Source):
  """One clip of a job as a source, which keeps the samples that it decoded."""

  class_names = ()
  multi_hot = False

  def __init__(self, clip: Clip, sample_rate_hz: int):
    self.ids = [clip.name]
    self.waveform = None
    self._clip = clip
    self._sample_rate_hz = sample_rate_hz

  @property
  def labels(self) -> np.ndarray:
    return np.asarray([sources.UNLABELLED], np.int32)

  def path(self, index: int) -> str | None:
    del index
    alone = self._clip.offset is None and "://" not in self._clip.path
    return self._clip.path if alone else None

  def __getitem__(self, index: int) -> dict:
    self.waveform = self._clip.load(self._sample_rate_hz)
    return {"waveform": self.waveform, "label": self.labels[0], "id": index}


def features(job: Job) -> tfds.features.FeaturesDict:
  """Returns what a record holds.

  `tfds.features.Audio` is not in it: it needs TensorFlow even to be read.
  """
  label = tfds.features.Scalar(np.int64)
  if job.class_names:
    label = tfds.features.ClassLabel(names=job.class_names)
  if job.multi_hot:
    label = tfds.features.Sequence(label)
  if job.settings.format == "int16":
    # As bytes, or every sample becomes an integer of up to ten bytes.
    audio = tfds.features.Tensor(
      shape=(None,), dtype=np.int16, encoding="bytes"
    )
  else:
    audio = tfds.features.Tensor(shape=(), dtype=np.object_)
  return tfds.features.FeaturesDict(
    {
      "audio": audio,
      "id": tfds.features.Scalar(np.int64),
      "label": label,
      "name": tfds.features.Text(),
      "sample_rate": tfds.features.Scalar(np.int64),
    }
  )


def encode(clip: Clip, waveform: np.ndarray, job: Job) -> dict:
  """Returns the record of a clip."""
  rate_hz = job.settings.sample_rate_hz
  audio = as_pcm16(waveform)
  if job.settings.format == "flac":
    audio = encode_flac(audio, rate_hz)
  return {
    "audio": audio,
    "id": clip.index,
    "label": clip.label,
    # Names of files need not be text.
    "name": clip.name.encode(errors="surrogateescape"),
    "sample_rate": rate_hz,
  }


def encode_flac(pcm: np.ndarray, sample_rate_hz: int) -> bytes:
  """Returns 16-bit mono samples as the bytes of a FLAC file."""
  file = io.BytesIO()
  soundfile.write(file, pcm, sample_rate_hz, format="FLAC", subtype="PCM_16")
  return file.getvalue()


def write_shard(folder: str | os.PathLike, index: int) -> int:
  """Writes one shard of an opened job, on whichever machine.

  Args:
    folder: of the job.
    index: of the shard, in `Job.shards`.

  Returns:
    How many clips it has, good or bad.
  """
  job = prepare_job.read_job(epath.Path(folder))
  shard = job.shards[index]
  path = job.records(shard)
  with tempfile.TemporaryDirectory() as scratch:
    temporary = storage.temporary_path(path)
    if storage.is_remote(path):
      temporary = epath.Path(scratch) / path.name
    # The processes are as many as the cores already.
    with threadpoolctl.threadpool_limits(1):
      report = _write_records(job, shard, temporary)
    report["bytes"] = temporary.stat().length
    if storage.is_remote(path):
      with temporary.open("rb") as file, path.open("wb") as target:
        shutil.copyfileobj(file, target, 1 << 24)
    else:
      temporary.replace(path)
  storage.write_text(job.report(shard), json.dumps(report) + "\n")
  return shard.num_clips


def _write_records(job: Job, shard: Shard, path: epath.Path) -> dict:
  """Writes the clips of a shard that decode; returns what of all of them."""
  settings, records = job.settings, features(job)
  serializer = ExampleSerializer(records.get_serialized_info())
  scans, real, padded = [], scan.Moments(), scan.Moments()
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(path), WRITER_OPTIONS
  )
  for clip in job.clips(shard):
    source = ClipSource(clip, settings.sample_rate_hz)
    found, own_real, own_padded = scan.scan_clip(
      source,
      0,
      sample_rate_hz=settings.sample_rate_hz,
      num_frames=settings.num_frames,
    )
    scans.append(found)
    real.add(own_real)
    padded.add(own_padded)
    if found.status == scan.OK:
      example = records.encode_example(encode(clip, source.waveform, job))
      # Or the order of the fields, and with it the bytes, would be by chance.
      message = serializer.get_tf_example(example)
      writer.write(message.SerializeToString(deterministic=True))
  writer.close()
  return {
    "records": sum(found.status == scan.OK for found in scans),
    "clips": scans,
    "real": dataclasses.asdict(real),
    "padded": dataclasses.asdict(padded),
  }


def write_here(job: Job, num_workers: int) -> None:
  """Writes the shards that are missing, in processes of this machine.

  Args:
    job: what to write.
    num_workers: processes; each works on a shard of its own.

  Raises:
    RuntimeError: a process was killed.
  """
  missing = job.missing()
  total = sum(shard.num_clips for shard in job.shards)
  left = sum(job.shards[i].num_clips for i in missing)
  bar = tqdm.tqdm(total=total, initial=total - left, unit=" clips", smoothing=0)
  # Clients of buckets do not survive a fork; the server forks without them.
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([__name__])
  with (
    bar,
    futures.ProcessPoolExecutor(
      max(1, min(num_workers, len(missing))), context, _leave_with_parent
    ) as pool,
  ):
    waiting = [
      pool.submit(write_shard, os.fspath(job.folder), i) for i in missing
    ]
    try:
      for done in futures.as_completed(waiting):
        bar.update(done.result())
    except futures.process.BrokenProcessPool:
      raise RuntimeError(
        "a process was killed, maybe for want of memory; what is complete is "
        "kept: run the command again, with fewer --num_workers"
      ) from None
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _leave_with_parent() -> None:
  """Ends a worker when the process that started it is gone, however it went."""

  def wait() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
