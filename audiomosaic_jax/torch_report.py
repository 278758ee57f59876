"""What became of every tensor of an imported checkpoint, for people."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

HALF = ("float16", "bfloat16")


def row(
  name: str,
  stored_as: str,
  source: np.ndarray,
  tensor: np.ndarray,
  places: Mapping[str, str],
) -> dict[str, Any]:
  """Returns what became of one tensor.

  Args:
    name: without prefixes.
    stored_as: its name in the file.
    source: as stored.
    tensor: as it was given to the model.
    places: name -> path of the leaf that it went to.
  """
  to, action = places.get(name), "loaded"
  if to is None:
    action, to = "ignored", "the model has no such part"
    if name.endswith("num_batches_tracked"):
      to = "a counter that nothing reads"
  elif source.shape != tensor.shape:
    action, to = "resized", f"{to} {list(tensor.shape)}"
  return {
    "name": name,
    "stored_as": stored_as,
    "shape": list(source.shape),
    "dtype": source.dtype.name,
    "action": action,
    "to": to,
  }


def describe(file: pathlib.Path) -> dict[str, Any]:
  """Returns what tells a file from others."""
  with file.open("rb") as content:
    digest = hashlib.file_digest(content, "sha256").hexdigest()
  return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}


def text(report: Mapping[str, Any]) -> str:
  """Returns the report of `import_torch.read` as Markdown."""
  rows = report["tensors"]
  counts = {
    action: sum(row["action"] == action for row in rows)
    for action in ("loaded", "resized", "ignored")
  }
  lines = [
    f"# Import of {report['input']}",
    "",
    f"{report['num_parameters']:,} parameters, head {report['head']!r}. "
    f"{len(rows)} tensors: "
    + ", ".join(f"{count} {action}" for action, count in counts.items())
    + ".",
    "",
    *(
      f"- {f['name']}: {f['bytes']:,} bytes, {f['sha256']}"
      for f in report["files"]
    ),
    "",
    "## What the tensors do not tell",
    "",
    *(f"- {note}" for note in report["notes"]),
    "",
    "## Normalisation",
    "",
    report["normalization"],
    "",
    "## Tensors",
    "",
    "| tensor | shape | dtype | |",
    "| --- | --- | --- | --- |",
  ]
  for row in rows:
    what = f"{row['action']}: {row['to']}"
    if row["dtype"] in HALF and row["action"] != "ignored":
      what += ", as float32"
    lines.append(
      f"| {row['name']} | {row['shape']} | {row['dtype']} | {what} |"
    )
  return "\n".join(lines) + "\n"
