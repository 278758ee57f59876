"""Shards of embeddings joined to the file that was asked for."""

import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import pyarrow
import pyarrow.parquet

from audiomosaic_jax import embed_shards, files


def check_format(output: pathlib.Path) -> None:
  """Raises an error if an output of that name cannot be written.

  Raises:
    ValueError: another ending than those of `FORMATS`.
    ImportError: its library is not installed.
  """
  if output.suffix not in FORMATS:
    raise ValueError(
      f"--output={output} ends in {output.suffix!r}; use one of "
      f"{', '.join(FORMATS)}"
    )
  if output.suffix == ".zarr":
    try:
      import zarr  # noqa: F401
    except ImportError:
      raise ImportError(
        ".zarr needs a library: pip install 'audiomosaic-jax[zarr]'"
      ) from None


def check_absent(output: pathlib.Path) -> None:
  """Raises ValueError if there is an output that shards would replace."""
  if output.exists() and parts_folder(output) != output:
    raise ValueError(f"{output} exists; remove it, or give another --output")


def is_joined(job: embed_shards.Job, output: pathlib.Path) -> bool:
  """Whether the output is there, so that shards need not be."""
  return job.folder != output and output.exists()


def parts_folder(output: pathlib.Path) -> pathlib.Path:
  """Returns where the shards go: into the output if it is a folder of them."""
  if output.suffix == ".parquet":
    return output
  return output.with_name(output.name + ".parts")


def join(job: embed_shards.Job, output: pathlib.Path) -> int:
  """Makes the output of complete shards; returns its rows.

  The shards are removed when it is there, unless it is made of them.
  """
  paths = [job.part(shard) for shard in range(len(job.shards))]
  rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
  FORMATS[output.suffix](paths, rows, output)
  if job.folder != output:
    shutil.rmtree(job.folder)
  return rows


def _write_npz(
  paths: list[pathlib.Path], rows: int, output: pathlib.Path
) -> None:
  del rows
  columns: dict[str, list[np.ndarray]] = {}
  for part in map(_arrays, paths):
    for name, array in part.items():
      columns.setdefault(name, []).append(array)
  joined = {name: np.concatenate(parts) for name, parts in columns.items()}
  files.write_arrays(output, joined, compress=False)


def _write_zarr(
  paths: list[pathlib.Path], rows: int, output: pathlib.Path
) -> None:
  import zarr

  temporary = files.temporary_path(output)
  group = zarr.open_group(temporary, mode="w")
  start = 0
  for part in map(_arrays, paths):
    for name, array in part.items():
      if name not in group:
        group.create_array(
          name,
          shape=(rows, *array.shape[1:]),
          chunks=(max(1, min(rows, 4_096)), *array.shape[1:]),
          dtype=str if name == "id" else array.dtype,
        )
      group[name][start : start + len(array)] = array
    start += len(part["id"])
  if output.exists():
    shutil.rmtree(output)
  temporary.replace(output)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the columns of a shard."""
  table = pyarrow.parquet.read_table(path)
  return dict(_columns(table))


def _columns(table: pyarrow.Table) -> Iterator[tuple[str, np.ndarray]]:
  for name, column in zip(table.column_names, table.columns, strict=True):
    kind = column.type
    if pyarrow.types.is_fixed_size_list(kind):
      flat = column.combine_chunks().flatten().to_numpy()
      yield name, flat.reshape(len(column), kind.list_size)
    elif name == "id":
      yield name, np.array(column.to_pylist(), dtype=np.str_)
    else:
      yield name, column.to_numpy()


# Ending -> (shards, rows, output) -> None.
FORMATS = {
  ".parquet": lambda paths, rows, output: None,
  ".npz": _write_npz,
  ".zarr": _write_zarr,
}
