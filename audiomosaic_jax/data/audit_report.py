"""The numbers of an audit, and how they are told."""

import collections
import itertools
import statistics as stats
from collections.abc import Mapping, Sequence

from audiomosaic_jax.data import scan

# clips.csv has all of them; the report names the first few.
NUM_EXAMPLES = 20


def summarize(
  clips: Sequence[scan.ClipScan],
  label_sets: Sequence[Sequence[int]],
  *,
  class_names: Sequence[str],
  sample_rate_hz: int,
  min_seconds: float,
) -> dict:
  """Counts what there is of each kind.

  Args:
    clips: every clip that is listed.
    label_sets: classes of each usable clip.
    class_names: name of each class.
    sample_rate_hz: files of another rate are counted, as they are resampled.
    min_seconds: shorter clips are too short.
  """
  by_status = collections.defaultdict(list)
  for clip in clips:
    by_status[clip.status].append(clip)
  usable = by_status[scan.OK]
  copies = duplicates(usable)
  rates = collections.Counter(c.file_rate_hz for c in clips if c.file_rate_hz)
  counts = collections.Counter(i for labels in label_sets for i in labels)
  findings = {
    "missing": by_status[scan.MISSING],
    "unreadable": by_status[scan.UNREADABLE],
    "silent": by_status[scan.SILENT],
    "too_short": [clip for clip in usable if clip.seconds < min_seconds],
    "wrong_rate": [
      clip for clip in usable if clip.file_rate_hz not in (0, sample_rate_hz)
    ],
    "duplicate": [clip for same in copies for clip in same[1:]],
  }
  return {
    "listed": len(clips),
    "found": len(clips) - len(by_status[scan.MISSING]),
    "usable": len(usable),
    "usable_ids_sha256": scan.ids_sha256([clip.id for clip in usable]),
    # Stricter: also that they sound the same. Copies made by other encoders
    # or resamplers differ in it.
    "usable_samples_sha256": scan.ids_sha256(
      [f"{clip.id} {clip.digest}" for clip in usable]
    ),
    **{name: len(found) for name, found in findings.items()},
    "seconds": _spread([clip.seconds for clip in usable]),
    "file_rates_hz": {str(rate): n for rate, n in sorted(rates.items())},
    "sample_rate_hz": sample_rate_hz,
    "min_seconds": min_seconds,
    "class_counts": {name: counts[i] for i, name in enumerate(class_names)},
    "examples": {
      name: [clip.id for clip in found[:NUM_EXAMPLES]]
      for name, found in findings.items()
      if found and (name != "wrong_rate" or 2 * len(found) < len(usable))
    },
    "duplicate_groups": [
      [clip.id for clip in same] for same in copies[:NUM_EXAMPLES]
    ],
  }


def duplicates(clips: Sequence[scan.ClipScan]) -> list[list[scan.ClipScan]]:
  """Returns the clips that have the same samples, together."""
  by_digest = collections.defaultdict(list)
  for clip in clips:
    by_digest[clip.digest].append(clip)
  return [same for same in by_digest.values() if len(same) > 1]


def shared_clips(
  scans: Mapping[str, Sequence[scan.ClipScan]],
) -> list[dict]:
  """Finds samples that two splits have under different names.

  A clip that both list, as AudioSet's balanced part is in the full set, is
  theirs by design.
  """
  ids = {}
  for split, clips in scans.items():
    ids[split] = collections.defaultdict(set)
    for clip in clips:
      if clip.status == scan.OK:
        ids[split][clip.digest].add(clip.id)
  shared = []
  for one, other in itertools.combinations(ids, 2):
    pairs = []
    for digest in ids[one].keys() & ids[other].keys():
      ours, theirs = ids[one][digest], ids[other][digest]
      if ours - theirs and theirs - ours:
        pairs.append([min(ours - theirs), min(theirs - ours)])
    if pairs:
      examples = sorted(pairs)[:NUM_EXAMPLES]
      shared.append(
        {"splits": [one, other], "clips": len(pairs), "examples": examples}
      )
  return shared


def statistics(result: scan.SourceScan, num_frames: int) -> dict | None:
  """Returns mean and standard deviation of the filter bank, both ways."""
  real, padded = result.real.mean_and_std(), result.padded.mean_and_std()
  if real is None:
    return None
  return {
    "mean": real[0],
    "std": real[1],
    "num_frames": num_frames,
    "padded_mean": padded[0],
    "padded_std": padded[1],
  }


def _spread(values: Sequence[float]) -> dict | None:
  if not values:
    return None
  return {
    "min": min(values),
    "median": stats.median(values),
    "max": max(values),
    "total_hours": sum(values) / 3600,
  }


def markdown(report: Mapping) -> str:
  """Returns the report for people."""
  lines = [f"# Audit of {report['dataset']}", ""]
  for split, reason in report["not_opened"].items():
    lines += [f"**{split} was not audited:** {reason}", ""]
  columns = ["listed", "found", "usable", "missing", "unreadable", "silent"]
  columns += ["too_short", "wrong_rate", "duplicate"]
  lines += _table(
    ["split", *(name.replace("_", " ") for name in columns)],
    [
      [split, *(str(summary[name]) for name in columns)]
      for split, summary in report["splits"].items()
    ],
  )
  lines += [
    "Found clips that are unreadable or silent cannot be used. Too short clips,"
    " clips of another rate (they are resampled) and duplicates can be.",
    "clips.csv lists every clip.",
    "",
  ]
  for shared in report["shared"]:
    one, other = shared["splits"]
    pairs = "; ".join(" = ".join(pair) for pair in shared["examples"][:5])
    lines += [
      f"**{shared['clips']} clips of {one} have the samples of clips of "
      f"{other}**, for example {pairs}",
      "",
    ]
  for split, summary in report["splits"].items():
    lines += _split_section(split, summary)
  return "\n".join(lines).rstrip() + "\n"


def _split_section(split: str, summary: Mapping) -> list[str]:
  """Returns the part of the report about one split."""
  lines = [f"## {split}", "", f"usable clips: {summary['usable']}"]
  lines += [
    "",
    f"sha256 of their ids: `{summary['usable_ids_sha256']}`",
    "",
    f"sha256 of their samples: `{summary['usable_samples_sha256']}`",
    "",
  ]
  if summary["seconds"]:
    spread = summary["seconds"]
    rates = ", ".join(
      f"{count} at {rate} Hz"
      for rate, count in summary["file_rates_hz"].items()
    )
    lines += [
      f"{spread['total_hours']:.2f} hours; {spread['min']:.2f} to "
      f"{spread['max']:.2f} s, median {spread['median']:.2f} s"
      + (f"; files: {rates}" if rates else ""),
      "",
    ]
  if summary["fbank"]:
    fbank = summary["fbank"]
    lines += [
      "log-mel filter bank: mean "
      f"{fbank['mean']:.4f}, standard deviation {fbank['std']:.4f}; cut or "
      f"zero-padded to {fbank['num_frames']} frames: "
      f"{fbank['padded_mean']:.4f}, {fbank['padded_std']:.4f}",
      "",
    ]
  if summary["class_counts"]:
    counts = sorted(summary["class_counts"].items(), key=lambda item: -item[1])
    empty = [name for name, count in counts if not count]
    lines += [
      f"{len(counts)} classes"
      + (f", {len(empty)} without a clip" if empty else ""),
      "",
      *_table(["class", "clips"], [[n, str(c)] for n, c in counts]),
    ]
  for name, examples in summary["examples"].items():
    more = ", ..." if summary[name] > len(examples) else ""
    lines += [
      f"{name.replace('_', ' ')} ({summary[name]}): "
      f"{', '.join(examples)}{more}",
      "",
    ]
  return lines


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Returns a Markdown table and an empty line."""
  cells = [columns, ["---"] * len(columns), *rows]
  return [
    *(
      "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
      for row in cells
    ),
    "",
  ]
