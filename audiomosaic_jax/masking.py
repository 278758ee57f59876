"""Which tokens to keep: whole time columns, whole bands, scattered, or 2-D.

A spectrogram of T x F patches becomes L = T * F tokens, token n = t * F + f.
Masking *removes* tokens, it does not blank them, so a mask is stated as the
ids of the tokens that stay. Noise decides: along every masked axis the
positions with the smallest noise are kept,

  kept = argsort(noise)[:int(length * (1 - ratio))].

Ids are left in that order, not sorted: the encoder carries positions in its
embeddings, so order changes nothing but the row in which a token is found.

Reference: AudioMosaic (arXiv 2605.14231), structured masking; ids and their
order equal those of the published code for the same noise.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

MODES = ("none", "time", "freq", "random", "time_freq")
LAYOUTS = ("paper", "released")

Ratio = float | tuple[float, float]


def grid_shape(
  num_frames: int, num_mel_bins: int, patch_size: int
) -> tuple[int, int]:
  """Returns how many patches a spectrogram has along time and frequency.

  Args:
    num_frames: spectrogram frames.
    num_mel_bins: mel bands.
    patch_size: side of a square patch, in frames and in bands.

  Returns:
    (time, freq) patches, (64, 8) for 1024 frames of 128 bands and patch 16.

  Raises:
    ValueError: if a side is not a multiple of the patch size.
  """
  for name, size in (
    ("num_frames", num_frames),
    ("num_mel_bins", num_mel_bins),
  ):
    if size < patch_size or size % patch_size:
      below = max(size // patch_size, 1) * patch_size
      raise ValueError(
        f"{name} {size} is not a multiple of patch_size {patch_size}; "
        f"use {below} or {below + patch_size}"
      )
  return num_frames // patch_size, num_mel_bins // patch_size


def num_kept(length: int, ratio: float) -> int:
  """Returns int(length * (1 - ratio)), in double precision.

  The rounding is part of the contract: int(160 * (1 - 0.9)) is 15, not 16.

  Args:
    length: positions along the masked axis.
    ratio: share to remove, 0 <= ratio < 1.

  Returns:
    The number of positions kept, at least one.

  Raises:
    ValueError: if the ratio is out of range or would remove everything.
  """
  if not 0 <= ratio < 1:
    raise ValueError(f"mask ratio {ratio} is outside [0, 1)")
  kept = int(length * (1 - ratio))
  if kept < 1:
    raise ValueError(
      f"mask ratio {ratio} keeps none of {length} positions; "
      f"use at most {math.floor(1000 - 1000 / length) / 1000}"
    )
  return kept


def noise_shapes(
  batch_size: int, *, mode: str, grid: tuple[int, int], layout: str
) -> tuple[tuple[int, int], ...]:
  """Returns the shape of the noise of every masked axis.

  Args:
    batch_size: examples.
    mode: one of MODES.
    grid: (time, freq) patches.
    layout: "paper" or "released", see `keep_ids_from_noise`.

  Returns:
    No shape for "none", one for "time", "freq" and "random", two (time, then
    frequency) for "time_freq".
  """
  rows, cols = _rows_and_cols(mode, grid, layout)
  lengths = {
    "none": (),
    "time": (rows,),
    "freq": (cols,),
    "random": (rows * cols,),
    "time_freq": (rows, cols),
  }[mode]
  return tuple((batch_size, length) for length in lengths)


def keep_ids_from_noise(
  noise: tuple[Float[Array, "B _"], ...],
  batch_size: int,
  *,
  mode: str,
  ratio: Ratio,
  grid: tuple[int, int],
  layout: str,
) -> Int[Array, "B K"]:
  """Returns the ids of the tokens to keep, decided by the given noise.

  "time" keeps rows of the token grid and all their columns; "freq" keeps
  columns in all rows; "random" keeps scattered tokens; "time_freq" keeps the
  crossing of kept rows and kept columns; "none" keeps all.

  Args:
    noise: one array per masked axis, shaped as `noise_shapes` tells.
    batch_size: examples.
    mode: one of MODES.
    ratio: share of rows, columns or tokens to remove; for "time_freq" a pair
      (time, freq); not used by "none".
    grid: (time, freq) patches.
    layout: "paper" masks the (time, freq) grid that the tokens are laid out
      in; "released" masks the grid of the published code.

  Returns:
    Token ids in row-major order of the kept rows and columns, each in the
    order of its noise.
  """
  rows, cols = _rows_and_cols(mode, grid, layout)
  expected = noise_shapes(batch_size, mode=mode, grid=grid, layout=layout)
  if (shapes := tuple(n.shape for n in noise)) != expected:
    raise ValueError(
      f"masking mode {mode!r} on a {grid} grid needs noise of shapes "
      f"{expected}, got {shapes}"
    )
  if mode == "random":
    return _smallest(noise[0], ratio)
  # An axis without masking keeps its natural order.
  row_ids = jnp.arange(rows, dtype=jnp.int32)[None]
  col_ids = jnp.arange(cols, dtype=jnp.int32)[None]
  if mode == "time":
    row_ids = _smallest(noise[0], ratio)
  elif mode == "freq":
    col_ids = _smallest(noise[0], ratio)
  elif mode == "time_freq":
    row_ids = _smallest(noise[0], ratio[0])
    col_ids = _smallest(noise[1], ratio[1])
  ids = row_ids[:, :, None] * cols + col_ids[:, None, :]
  ids = ids.reshape(ids.shape[0], -1)
  return jnp.broadcast_to(ids, (batch_size, ids.shape[1]))


def keep_ids(
  key: Key[Array, ""],
  batch_size: int,
  *,
  mode: str,
  ratio: Ratio,
  grid: tuple[int, int],
  layout: str,
) -> Int[Array, "B K"]:
  """Returns the ids of the tokens to keep, drawn anew for every example.

  Args:
    key: random key.
    batch_size: examples.
    mode: one of MODES.
    ratio: see `keep_ids_from_noise`.
    grid: (time, freq) patches.
    layout: "paper" or "released".

  Returns:
    Token ids, see `keep_ids_from_noise`.
  """
  shapes = noise_shapes(batch_size, mode=mode, grid=grid, layout=layout)
  keys = jax.random.split(key, max(len(shapes), 1))
  noise = tuple(
    jax.random.uniform(k, s) for k, s in zip(keys, shapes, strict=False)
  )
  return keep_ids_from_noise(
    noise, batch_size, mode=mode, ratio=ratio, grid=grid, layout=layout
  )


def mask_from_keep_ids(
  keep_ids: Int[Array, "B K"], num_tokens: int
) -> Bool[Array, "B L"]:
  """Returns the mask that keep ids stand for: True where removed.

  Args:
    keep_ids: ids of the tokens kept.
    num_tokens: tokens before masking, L.

  Returns:
    The mask over all tokens, in token order.
  """
  mask = jnp.ones((keep_ids.shape[0], num_tokens), bool)
  return jnp.put_along_axis(mask, keep_ids, False, axis=1, inplace=False)


def _rows_and_cols(
  mode: str, grid: tuple[int, int], layout: str
) -> tuple[int, int]:
  """Returns the rows and columns that the tokens are read as for masking."""
  if mode not in MODES:
    raise ValueError(f"masking mode {mode!r} is unknown; use one of {MODES}")
  if layout not in LAYOUTS:
    raise ValueError(
      f"masking layout {layout!r} is unknown; use one of {LAYOUTS}"
    )
  # Parity: the published code reads tokens laid out (time, freq) as a
  # (freq, time) grid, so its "time" removes blocks of consecutive patches and
  # its "freq" a pattern that repeats along time. Its 2-D mask of fine-tuning
  # is the one place where it uses the true grid.
  swapped = layout == "released" and mode != "time_freq"
  return grid[::-1] if swapped else grid


def _smallest(noise: Float[Array, "B N"], ratio: float) -> Int[Array, "B K"]:
  """Returns the positions with the smallest noise, smallest first."""
  kept = num_kept(noise.shape[1], ratio)
  return jnp.argsort(noise, axis=1)[:, :kept].astype(jnp.int32)
