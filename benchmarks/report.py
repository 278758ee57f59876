"""What the benchmarks share: one table per run, and the same figures as JSON.

A file of figures says how they were made: date, command, machine, versions.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

from audiomosaic_jax import files, tables

# Those that are installed are named.
PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "grain",
  "numpy",
  "torch",
  "torchaudio",
  "audiomentations",
)


def table_text(
  caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
  """Returns a table for the terminal.

  Args:
    caption: what it shows.
    columns: headings.
    rows: texts of the cells, the name of the row first.
  """
  return tables.table_text(tables.Table(caption, columns, rows))


def circumstances(device: str) -> dict[str, Any]:
  """Returns what figures depend on besides the program.

  Args:
    device: what was timed, in words.
  """
  return {
    "date": datetime.date.today().isoformat(),
    "command": command(),
    "device": device,
    "processor": processor(),
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "versions": versions(),
  }


def write_json(path: str, figures: dict[str, Any], device: str) -> None:
  """Writes figures and their circumstances; an empty path writes nothing."""
  if path:
    content = circumstances(device) | figures
    files.write_text(pathlib.Path(path), json.dumps(content, indent=2) + "\n")


def command() -> str:
  """Returns how this program was called."""
  spec = sys.modules["__main__"].__spec__
  program = f"-m {spec.name}" if spec else sys.argv[0]
  return " ".join(["python", program, *sys.argv[1:]])


def processor() -> str:
  """Returns the name of this machine's processor."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(": ")[2] for line in lines if "model name" in line]
  return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
  """Returns package -> version of those of `PACKAGES` that are installed."""
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
