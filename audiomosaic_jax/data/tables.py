"""CSV files of clips and classes; an error names the file and the line."""

import csv
import os
from collections.abc import Sequence

import numpy as np

UNLABELLED = -1

Path = str | os.PathLike


def read_csv(csv_path: Path, columns: Sequence[str | None]) -> list:
  """Returns (line number, row) of each row; checks the named columns.

  Raises:
    ValueError: no CSV in UTF-8, no such column, no rows or an empty cell.
  """
  # Excel marks UTF-8 with a byte order mark, which is no part of a name.
  with open(csv_path, newline="", encoding="utf-8-sig") as file:
    reader = csv.DictReader(file)
    try:
      header = reader.fieldnames or []
      rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
      raise ValueError(
        f"{csv_path}, after line {reader.line_num}: {error}; save it as CSV in "
        "UTF-8"
      ) from error
  for column in columns:
    if column is not None and column not in header:
      raise ValueError(
        f"{csv_path}, line 1: no column {column!r}; it has {', '.join(header)}"
      )
  if not rows:
    raise ValueError(f"{csv_path} has a header but no rows")
  for line, row in rows:
    short = [c for c in columns if c is not None and not row[c]]
    if short:
      raise ValueError(f"{csv_path}, line {line}: column {short[0]!r} is empty")
  return rows


def read_label_csv(csv_path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
  """Returns the index of each machine identifier, and the display names."""
  rows = read_csv(csv_path, ["index", "mid", "display_name"])
  for expected, (line, row) in enumerate(rows):
    if row["index"] != str(expected):
      raise ValueError(
        f"{csv_path}, line {line}: index {row['index']} should be {expected}; "
        "sort the classes by index and leave none out"
      )
  class_index = {row["mid"]: i for i, (_, row) in enumerate(rows)}
  return class_index, tuple(row["display_name"] for _, row in rows)


def read_spans(csv_path: Path, rows: list) -> list[tuple[float, float]] | None:
  """Returns (start_s, end_s) of each row, if the file has these columns."""
  there = {"start_s", "end_s"} & set(rows[0][1])
  if not there:
    return None
  if len(there) == 1:
    raise ValueError(
      f"{csv_path}, line 1: there is a column {there.pop()!r} and not the "
      "other of start_s and end_s; add it, or leave both out"
    )
  spans = []
  for line, row in rows:
    try:
      start_s, end_s = float(row["start_s"]), float(row["end_s"])
    except (TypeError, ValueError):
      start_s = end_s = np.nan
    if not 0 <= start_s < end_s < np.inf:
      raise ValueError(
        f"{csv_path}, line {line}: start_s {row['start_s']!r} and end_s "
        f"{row['end_s']!r} are not seconds with 0 <= start_s < end_s"
      )
    spans.append((start_s, end_s))
  return spans


def read_labels(
  csv_path: Path, rows: list, column: str | None, class_names: Sequence[str]
) -> list[int]:
  """Returns the class index of each row; -1 without a column."""
  if column is None:
    return [UNLABELLED] * len(rows)
  index = {name: i for i, name in enumerate(class_names)}
  for line, row in rows:
    if row[column] not in index:
      raise ValueError(
        f"{csv_path}, line {line}: label {row[column]!r} is not one of the "
        f"classes {', '.join(class_names)}"
      )
  return [index[row[column]] for _, row in rows]
