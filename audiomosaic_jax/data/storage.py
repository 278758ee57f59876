"""Files that are there whole or not at all, on a disk or in a bucket."""

import os
import pathlib
import uuid

from etils import epath

Path = pathlib.Path | epath.Path

# Names of files need not be text; they are written as the bytes they are.
NAME_ERRORS = "surrogateescape"


def temporary_path(path: Path) -> Path:
  """Returns a name beside a file that no other process writes to.

  Programs that read a whole folder pass over names that begin with a dot.
  """
  return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_text(path: Path, text: str) -> None:
  """Writes a file that is complete whenever it is there, in any storage."""
  content = text.encode(errors=NAME_ERRORS)
  if is_remote(path):
    path.write_bytes(content)  # An object appears when it is complete.
    return
  temporary = temporary_path(path)
  temporary.write_bytes(content)
  temporary.replace(path)


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path is of a bucket, such as gs://bucket/folder."""
  return "://" in os.fspath(path)
