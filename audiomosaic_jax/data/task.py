"""A user's own task: a folder of clips and a labels.csv."""

import os
import pathlib

from audiomosaic_jax.data import sources, tables

TABLE = "labels.csv"


class TaskSource(sources.CsvSource):
  """The clips that `labels.csv` of a folder lists.

  Columns: path (relative to the folder), label, split (train, valid, test),
  and if wanted group, start_s and end_s. Clips of one group, such as cuts of
  one recording, are kept together when splits or folds are made, and are
  resampled together for intervals. Without the column, clips of one file are a
  group. The column split may be missing if all rows are read.

  Attributes:
    lines: line of each clip in the table.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    split: str | None,
    sample_rate_hz: int,
  ):
    """Reads the table.

    Args:
      folder: holds the table.
      split: which rows to take; None is all.
      sample_rate_hz: rate the clips are resampled to.

    Raises:
      FileNotFoundError: no table, or its first clip does not exist.
      ValueError: a wrong line, or no row of the split; names file and line.
    """
    table = pathlib.Path(folder).expanduser() / TABLE
    if not table.is_file():
      raise FileNotFoundError(
        f"{table} does not exist; a task is 'demo' or a folder with {TABLE} "
        "(columns path, label, split and, if clips belong together, group)"
      )
    super().__init__(
      table,
      root=None,
      path_column="path",
      label_column="label",
      split_column=None if split is None else "split",
      split=split,
      class_names=None,
      sample_rate_hz=sample_rate_hz,
    )
    rows = [
      (line, row)
      for line, row in tables.read_csv(table, ["path", "label"])
      if split is None or row["split"] == split
    ]
    self.table = table
    self.lines = [line for line, _ in rows]
    if "group" in rows[0][1]:
      self.groups = [row["group"] or row["path"] for _, row in rows]

  def where(self, index: int) -> str:
    """Returns the file and line that list a clip."""
    return f"{self.table}, line {self.lines[index]}"
