"""Files that are there whole or not at all."""

import pathlib


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text under a temporary name, then renames it."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)
