r"""Says what is in your copy of a data set, so that results can be compared.

  python -m audiomosaic_jax.data.audit \
    --dataset=esc50 --data_dir=DIR --output=report/

Every clip is decoded once. In --output are then

  report.md, report.json  what is found, missing, unreadable, silent, too short,
                          of another rate, or there twice; clips per class; mean
                          and standard deviation of the log-mel filter bank;
                          sha256 of the list of usable clips
  ids.SPLIT.txt           the usable clips, sorted: its sha256sum is the one in
                          the report; if two copies agree in it, results on them
                          are results on the same clips
  weights.SPLIT.csv       id and weight of every clip found, for balanced
                          sampling: the sum over its classes c of
                          1000 / (n_c + 0.01), n_c counting usable clips; 0 for
                          a clip that cannot be used
  clips.csv               one line per clip that is listed: what it is, why it
                          cannot be used, and the hash of its samples

Nothing is changed in --data_dir. Clips that cannot be used are skipped, counted
and listed; training puts others in their place. Arguments of the data set other
than data_dir are given with --set, which may be repeated:

  python -m audiomosaic_jax.data.audit --dataset=audioset --data_dir=DIR \
    --set=audio_dir=clips --split=full --split=eval --output=report/
"""

import csv
import inspect
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from absl import app, flags, logging

from audiomosaic_jax.data import audit_report, datasets, sampling, scan, storage
from audiomosaic_jax.data.sources import Source

FLAGS = flags.FLAGS


# What is audited without --split: what is trained on and tested with, so that
# clips that two of them share are noticed.
SPLITS = {
  "audioset": ("balanced", "full", "eval"),
  "csv": (None,),
  "envsdd": ("train", "valid", "test01", "test02", "test03", "test04"),
  "esc50": ("all", "fold1", "fold2", "fold3", "fold4", "fold5"),
  "folder": (None,),
  "fsd50k": ("train", "val", "eval"),
  "speech_commands_v1": ("train", "valid", "test"),
  "speech_commands_v2": ("train", "valid", "test"),
  "task": ("train", "valid", "test"),
  "tfds": ("train",),
  "vggsound": ("train", "test"),
}

# Arguments of the data sets that --set can change.
ARGUMENTS = {
  "audioset": {"audio_dir": None},
  "csv": {
    "root": None,
    "path_column": "path",
    "label_column": None,
    "split_column": None,
    "class_names": None,
  },
  "envsdd": {"track": "tta", "manifest_dir": None},
  "folder": {"class_names": None},
  "manifest": {"root": None},
  "speech_commands_v1": {"test_dir": None, "silence": False},
  "vggsound": {"audio_dir": None},
}


def parse_arguments(
  dataset: str,
  data_dir: str | os.PathLike,
  sample_rate_hz: int,
  changes: Sequence[str],
) -> dict:
  """Returns the keyword arguments of a data set.

  Args:
    dataset: a key of `datasets.DATASETS`.
    data_dir: where it is.
    sample_rate_hz: rate to decode at.
    changes: "name=value", the value as in JSON if it can be read so.

  Raises:
    ValueError: an unknown data set, or an argument that it does not take or
      that it lacks.
  """
  if dataset not in datasets.DATASETS or dataset == "demo":
    known = sorted(set(datasets.DATASETS) - {"demo"})
    raise ValueError(f"no data set {dataset!r}; choose {', '.join(known)}")
  function = datasets.DATASETS[dataset]
  accepted = inspect.signature(function).parameters
  given = ARGUMENTS.get(dataset, {})
  ours = {"split", "data_dir", "sample_rate_hz", "max_missing_fraction"}
  can_change = set(given) | {
    name
    for name, parameter in accepted.items()
    if parameter.kind == parameter.KEYWORD_ONLY and name not in ours
  }
  arguments = {
    **given,
    "data_dir": data_dir,
    "sample_rate_hz": sample_rate_hz,
  }
  if "max_missing_fraction" in accepted:
    arguments["max_missing_fraction"] = 1.0
  for change in changes:
    name, equals, text = change.partition("=")
    if not equals or name not in can_change:
      known = ", ".join(f"{name}=VALUE" for name in sorted(can_change))
      raise ValueError(f"--set={change}: {dataset} takes {known or 'none'}")
    try:
      arguments[name] = json.loads(text)
    except json.JSONDecodeError:
      arguments[name] = text
  if lacking := sorted(can_change - set(arguments)):
    raise ValueError(f"{dataset} needs --set={lacking[0]}=VALUE")
  return arguments


def audit_split(
  source: Source,
  *,
  split: str,
  sample_rate_hz: int,
  min_seconds: float,
  num_frames: int,
  num_threads: int,
) -> tuple[dict, list[scan.ClipScan], list[float] | None]:
  """Decodes a source and sums up what was found.

  Args:
    source: clips.
    split: what to call it.
    sample_rate_hz: rate that the source decodes at.
    min_seconds: shorter clips are reported as too short.
    num_frames: length of the filter bank that an encoder sees.
    num_threads: clips decoded at once.

  Returns:
    The summary for the report, what is known of every clip that is listed,
    and the weight of every clip of the source, None if it has no classes.
  """
  result = scan.scan_source(
    source,
    sample_rate_hz=sample_rate_hz,
    num_frames=num_frames,
    num_threads=num_threads,
    title=split,
  )
  usable = [clip.status == scan.OK for clip in result.clips]
  labels = [
    classes if ok else ()
    for classes, ok in zip(source.label_sets, usable, strict=True)
  ]
  clips = result.clips + [
    scan.ClipScan(name, scan.MISSING, "listed, but in no file")
    for name in source.missing
  ]
  weights = None
  if source.class_names:
    weights = sampling.clip_weights(labels, len(source.class_names)).tolist()
  summary = audit_report.summarize(
    clips,
    labels,
    class_names=source.class_names,
    sample_rate_hz=sample_rate_hz,
    min_seconds=min_seconds,
  )
  summary["fbank"] = audit_report.statistics(result, num_frames)
  return summary, clips, weights


def audit(
  dataset: str,
  splits: Sequence[str | None],
  arguments: Mapping,
  output: pathlib.Path,
  **options,
) -> dict:
  """Audits splits and writes the report.

  Args:
    dataset: a key of `datasets.DATASETS`.
    splits: which of its splits; one that is not there is noted.
    arguments: its keyword arguments.
    output: folder to write to.
    **options: the other arguments of `audit_split`.

  Returns:
    The content of report.json.

  Raises:
    FileNotFoundError, ValueError: no split could be opened; as the first was.
  """
  output.mkdir(parents=True, exist_ok=True)
  report = {"dataset": dataset, "splits": {}, "not_opened": {}}
  scans, failures = {}, []
  for split in splits:
    name = split or "all"
    try:
      source = datasets.make_dataset(dataset, split, **arguments)
    except (FileNotFoundError, ValueError) as error:
      logging.error("%s: %s", name, error)
      report["not_opened"][name] = str(error)
      failures.append(error)
      continue
    summary, scans[name], weights = audit_split(source, split=name, **options)
    report["splits"][name] = summary
    file_name = name.replace("/", "_")
    ids = [clip.id for clip in scans[name] if clip.status == scan.OK]
    storage.write_text(output / f"ids.{file_name}.txt", scan.ids_text(ids))
    if weights is not None:
      path = output / f"weights.{file_name}.csv"
      temporary = storage.temporary_path(path)
      sampling.write_weights(temporary, source.ids, weights)
      temporary.replace(path)
  if not scans:
    raise failures[0]
  report["shared"] = audit_report.shared_clips(scans)
  write_clips(output / "clips.csv", scans)
  storage.write_text(output / "report.md", audit_report.markdown(report))
  text = json.dumps(report, indent=2) + "\n"
  storage.write_text(output / "report.json", text)
  return report


def write_clips(
  path: pathlib.Path, scans: Mapping[str, Sequence[scan.ClipScan]]
) -> None:
  """Writes a line for every clip of every split."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["split", *scan.ClipScan._fields])
  for split, clips in scans.items():
    writer.writerows([split, *clip] for clip in clips)
  storage.write_text(path, file.getvalue())


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  try:
    arguments = parse_arguments(
      FLAGS.dataset, FLAGS.data_dir, FLAGS.sample_rate_hz, FLAGS.set
    )
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  splits = FLAGS.split or SPLITS.get(FLAGS.dataset)
  if not splits:
    raise app.UsageError(f"{FLAGS.dataset} needs --split=NAME")
  output = pathlib.Path(FLAGS.output).expanduser()
  try:
    report = audit(
      FLAGS.dataset,
      splits,
      arguments,
      output,
      sample_rate_hz=FLAGS.sample_rate_hz,
      min_seconds=FLAGS.min_seconds,
      num_frames=FLAGS.num_frames,
      num_threads=FLAGS.num_threads,
    )
  except (FileNotFoundError, ValueError) as error:
    raise SystemExit(f"error: {error}") from None
  page = audit_report.markdown(report)
  print(page.encode(errors="replace").decode())
  print(f"wrote {output}")


if __name__ == "__main__":
  known = ", ".join(sorted(set(datasets.DATASETS) - {"demo"}))
  flags.DEFINE_string("dataset", None, f"One of {known}.", required=True)
  flags.DEFINE_string("data_dir", None, "Where it is.", required=True)
  flags.DEFINE_string("output", None, "Folder to write to.", required=True)
  flags.DEFINE_multi_string(
    "split", [], "Split to audit; without, all that are used in evaluations."
  )
  flags.DEFINE_multi_string(
    "set",
    [],
    "NAME=VALUE, an argument of the data set, such as audio_dir=clips "
    "(audioset, vggsound), track=ata (envsdd) or silence=true "
    "(speech_commands_v1); a wrong name is answered with the right ones.",
  )
  flags.DEFINE_integer("sample_rate_hz", 16_000, "Rate to decode at.")
  flags.DEFINE_float("min_seconds", 0.1, "Shorter clips are too short.")
  flags.DEFINE_integer("num_frames", 1024, "Frames that the encoder sees.")
  flags.DEFINE_integer("num_threads", os.cpu_count(), "Clips at once.")
  app.run(main)
