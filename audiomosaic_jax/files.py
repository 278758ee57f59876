"""Files that are there whole or not at all."""

import pathlib
import uuid


def temporary_path(path: pathlib.Path) -> pathlib.Path:
  """Returns a name beside a file that no other process writes to.

  Programs that read a whole folder pass over names that begin with a dot.
  """
  return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text under a temporary name, then renames it."""
  temporary = temporary_path(path)
  temporary.write_text(text)
  temporary.replace(path)
