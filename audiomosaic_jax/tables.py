"""Tables of results: methods by metrics, mean and spread over repetitions."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Number = int | float


class Table(NamedTuple):
  """A table of the report.

  Attributes:
    caption: what it shows.
    columns: headings.
    rows: one sequence of cell texts per row; the first cell names the row.
  """

  caption: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]


def comparison_table(
  caption: str, results: Mapping[str, Mapping[str, Sequence[Number]]]
) -> Table:
  """Returns a table of methods by metrics, mean ± standard deviation.

  Args:
    caption: what is compared, and over what the spread is.
    results: method -> metric -> one value per repetition.
  """
  metrics = list(dict.fromkeys(m for row in results.values() for m in row))
  rows = [
    [method, *(mean_and_std(row[m]) if m in row else "-" for m in metrics)]
    for method, row in results.items()
  ]
  return Table(caption, ["method", *metrics], rows)


def table_text(table: Table) -> str:
  """Returns a table for the terminal, columns aligned."""
  rows = [table.columns, *table.rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    )
    for row in rows
  ]
  rule = "  ".join("-" * width for width in widths)
  return "\n".join([table.caption, lines[0], rule, *lines[1:]])


def markdown(table: Table) -> str:
  """Returns a table as Markdown, its caption above."""
  lines = [table.columns, ["---"] * len(table.columns), *table.rows]
  body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
  return f"{table.caption}\n\n{body}"


def mean_and_std(values: Sequence[Number]) -> str:
  """Returns "0.531 ± 0.012"; a single value has no spread to show."""
  mean = f"{statistics.fmean(values):.3f}"
  if len(values) == 1:
    return mean
  return f"{mean} ± {statistics.stdev(values):.3f}"
