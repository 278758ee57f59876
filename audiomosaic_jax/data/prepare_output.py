"""What makes complete shards a data set: metadata, statistics, a ledger."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, naming

from audiomosaic_jax.data import (
  audit_report,
  prepare_job,
  prepare_shards,
  scan,
  storage,
)
from audiomosaic_jax.data.prepare_job import Job, Shard

# Shorter clips are counted as too short, as in an audit.
MIN_SECONDS = 0.1


def finish(job: Job, missing: Mapping[str, Sequence[str]]) -> dict:
  """Writes ledger.csv, statistics.json and the metadata of TFDS.

  Args:
    job: of which all shards are complete.
    missing: names of each split that are listed, but in no file.

  Returns:
    The content of statistics.json: split -> what an audit would report.

  Raises:
    ValueError: a split has no usable clip.
  """
  splits = {}
  for shard in job.shards:
    splits.setdefault(shard.split, []).append(shard)
  ledger, statistics, infos = [], {}, []
  for split, shards in splits.items():
    reports = [json.loads(job.report(shard).read_text()) for shard in shards]
    scans = [scan.ClipScan(*fields) for r in reports for fields in r["clips"]]
    scans += [
      scan.ClipScan(name, scan.MISSING, "listed, but in no file")
      for name in missing[split]
    ]
    ledger += [
      (found.id, split, found.status, found.reason)
      for found in scans
      if found.status != scan.OK
    ]
    statistics[split] = _summarize(job, shards, reports, scans)
    infos.append(_split_info(job, split, reports))
  write_ledger(job, ledger)
  text = json.dumps(statistics, indent=2) + "\n"
  storage.write_text(job.folder / "statistics.json", text)
  for split, summary in statistics.items():
    if not summary["usable"]:
      raise ValueError(
        f"none of the {summary['listed']} clips of split {split} can be used; "
        f"see {job.folder / 'ledger.csv'}"
      )
  _write_metadata(job, infos)
  _remove_leftovers(job)
  return statistics


def _summarize(
  job: Job,
  shards: Sequence[Shard],
  reports: Sequence[dict],
  scans: Sequence[scan.ClipScan],
) -> dict:
  """Returns what an audit reports of a split."""
  summary = audit_report.summarize(
    scans,
    list(_label_sets(job, shards, reports)),
    class_names=job.class_names,
    sample_rate_hz=job.settings.sample_rate_hz,
    min_seconds=MIN_SECONDS,
  )
  total = scan.SourceScan([], scan.Moments(), scan.Moments())
  for report in reports:
    total.real.add(scan.Moments(**report["real"]))
    total.padded.add(scan.Moments(**report["padded"]))
  summary["fbank"] = audit_report.statistics(total, job.settings.num_frames)
  return summary


def _label_sets(
  job: Job, shards: Sequence[Shard], reports: Sequence[dict]
) -> Iterator[Sequence[int]]:
  """Yields the classes of every usable clip."""
  for shard, report in zip(shards, reports, strict=True):
    for clip, found in zip(job.clips(shard), report["clips"], strict=True):
      if scan.ClipScan(*found).status == scan.OK:
        label = clip.label if job.multi_hot else [clip.label]
        yield [i for i in label if i >= 0]


def write_ledger(job: Job, rows: Sequence[Sequence[str]]) -> None:
  """Writes a line for every clip that is not in the data set."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["clip", "split", "status", "reason"])
  writer.writerows(sorted(rows, key=lambda row: (row[1], row[0])))
  storage.write_text(job.folder / "ledger.csv", file.getvalue())


def _split_info(
  job: Job, split: str, reports: Sequence[dict]
) -> tfds.core.SplitInfo:
  return tfds.core.SplitInfo(
    name=split,
    shard_lengths=[report["records"] for report in reports],
    num_bytes=sum(report["bytes"] for report in reports),
    filename_template=naming.ShardedFileTemplate(
      data_dir=job.folder,
      dataset_name=job.name,
      split=split,
      filetype_suffix=prepare_job.FILE_FORMAT,
    ),
  )


def _write_metadata(job: Job, infos: Sequence[tfds.core.SplitInfo]) -> None:
  """Writes what `tfds.builder_from_directory` reads."""
  identity = dataset_info.DatasetIdentity(
    name=job.name,
    version=tfds.core.Version(job.version),
    data_dir=str(job.folder),
    module_name="",
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=(
      "Prepared by audiomosaic_jax.data.prepare: mono "
      f"{job.settings.format} at {job.settings.sample_rate_hz} Hz."
    ),
    features=prepare_shards.features(job),
    split_dict=tfds.core.splits.SplitDict(infos),
  )
  info.set_file_format(prepare_job.FILE_FORMAT)
  info.write_to_directory(job.folder)


def _remove_leftovers(job: Job) -> None:
  """Removes what was being written when an earlier run was killed."""
  if not storage.is_remote(job.folder):
    for folder in (job.folder, prepare_job.notes(job.folder)):
      for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
