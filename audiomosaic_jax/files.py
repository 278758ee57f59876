"""Files that are there whole or not at all."""

import pathlib
from collections.abc import Mapping

import numpy as np

from audiomosaic_jax.data.storage import temporary_path


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text under a temporary name, then renames it."""
  write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes bytes under a temporary name, then renames it."""
  temporary = temporary_path(path)
  temporary.write_bytes(content)
  temporary.replace(path)


def write_arrays(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], *, compress: bool
) -> None:
  """Writes an .npz file under a temporary name, then renames it."""
  temporary = temporary_path(path)
  with temporary.open("wb") as file:
    (np.savez_compressed if compress else np.savez)(file, **arrays)
  temporary.replace(path)
