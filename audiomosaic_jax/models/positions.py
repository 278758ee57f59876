"""Position embeddings: their first values, and their fit to other lengths.

A table of positions has one row per token, n = t * F + f, and first a row for
the class token if the encoder has one. The functions here are NumPy: they run
once, when a model is initialised or a checkpoint is loaded.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

LAYOUTS = ("paper", "released")


def sincos_table(
  height: int, width: int, channels: int
) -> Float[np.ndarray, "L D"]:
  """Returns the 2-D sine-cosine position table of a row-major grid.

    angle_k(p) = p * 10000^(-k / (D/4)),   k = 0 .. D/4 - 1
    row(h, w)  = [sin angle(w), cos angle(w), sin angle(h), cos angle(h)]

  Args:
    height: rows of the grid.
    width: columns of the grid, the axis that varies fastest.
    channels: D, a multiple of four.

  Returns:
    One row per grid cell, float32.

  Raises:
    ValueError: if channels is not a multiple of four.

  Reference: MAE (He et al. 2022); equal to the published table to 4e-6, the
    last bit of a float32 power, in which processors differ.
  """
  if channels % 4:
    raise ValueError(
      f"sin-cos positions need a width divisible by 4, got {channels}; "
      f"use {channels // 4 * 4} or {channels // 4 * 4 + 4}"
    )
  # Parity: angles in float32 from the start; doubles differ by up to 1e-6.
  k = np.arange(channels // 4, dtype=np.float32)
  freqs = 1 / 10000 ** (k / np.float32(channels / 4))
  h, w = np.indices((height, width), dtype=np.float32)
  angles = [np.outer(axis.ravel(), freqs) for axis in (w, h)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)


def resize_positions(
  pos_embed: Float[np.ndarray, "1 N D"],
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  *,
  layout: str,
  method: str,
) -> Float[np.ndarray, "1 M D"]:
  """Fits learned position embeddings to a spectrogram of another size.

    new[t, f] = sum over i, j of  A[t, i] B[f, j] old[i, j]

  A and B interpolate along time and along frequency, or cut. The row of the
  class token, if there is one, is kept as it is.

  Args:
    pos_embed: the table of the encoder, with or without a class token.
    old_grid: (time, freq) patches it was made for.
    new_grid: (time, freq) patches it shall fit.
    layout: "paper" resizes the (time, freq) grid that the tokens are laid out
      in, any size to any size; "released" the grid that the loader of the
      published code takes it for.
    method: a name in METHODS; "bilinear" is what the published loader does.

  Returns:
    The table for the new grid, in the dtype of the old.

  Raises:
    ValueError: if the table does not fit the old grid, if "released" cannot
      read it as a grid, or if "crop" is to make an axis longer.

  Reference: `interpolate_pos_embed_audio` of the published code, both layouts;
    equal to 2e-7, and to 2e-5 from 64 to 12 patches, a ratio that PyTorch
    rounds to float32.
  """
  _check(pos_embed, old_grid, new_grid, layout, method)
  num_tokens = old_grid[0] * old_grid[1]
  extra = pos_embed.shape[1] - num_tokens
  if layout == "released":
    # Parity: the published loader takes the new grid for (freq, time), and
    # the old tokens for rows of the new number of columns. From 1024 to 512
    # frames it resizes 16 x 32 to 8 x 32, which is no downsampling in time.
    new_grid = new_grid[::-1]
    old_grid = (num_tokens // new_grid[1], new_grid[1])
  rows, cols = (
    METHODS[method](*sizes) for sizes in zip(old_grid, new_grid, strict=True)
  )
  table = pos_embed[0, extra:].reshape(*old_grid, -1).astype(np.float64)
  table = np.einsum("ti,fj,ijd->tfd", rows, cols, table, optimize=True)
  table = table.reshape(-1, table.shape[-1]).astype(pos_embed.dtype)
  return np.concatenate([pos_embed[:, :extra], table[None]], axis=1)


def _check(
  pos_embed: Float[np.ndarray, "1 N D"],
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  layout: str,
  method: str,
) -> None:
  """Raises ValueError for what `resize_positions` cannot work with."""
  if layout not in LAYOUTS:
    raise ValueError(f"layout {layout!r} is unknown; use one of {LAYOUTS}")
  if method not in METHODS:
    raise ValueError(
      f"method {method!r} is unknown; use one of {tuple(METHODS)}"
    )
  num_rows, num_tokens = pos_embed.shape[1], old_grid[0] * old_grid[1]
  if num_rows - num_tokens not in (0, 1):
    raise ValueError(
      f"position table has {num_rows} rows, but grid {old_grid} needs "
      f"{num_tokens}, or {num_tokens + 1} with a class token; give the grid "
      "that the table was made for"
    )
  if layout == "released" and num_tokens % new_grid[0]:
    raise ValueError(
      f"the published loader cannot read {num_tokens} positions as rows of "
      f"{new_grid[0]}, the time patches of grid {new_grid}; use layout 'paper'"
    )
  if method == "crop" and any(
    old < new for old, new in zip(old_grid, new_grid, strict=True)
  ):
    raise ValueError(
      f"cannot crop positions of grid {old_grid} to the larger {new_grid}; "
      "use method 'bilinear'"
    )


def _interpolation(
  old: int, new: int, taps: int, kernel: Callable[[np.ndarray], np.ndarray]
) -> Float[np.ndarray, "new old"]:
  """Returns the matrix that interpolates `old` samples at `new` places.

  Sample i lies at i + 1/2 of `old`, and place t at (t + 1/2) old / new. What
  a kernel sees beyond the ends is the sample at the end. Nothing is averaged
  when there are fewer places than samples, as in PyTorch.
  """
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  matrix = np.zeros((new, old))
  for tap in range(1 - taps // 2, taps // 2 + 1):
    sample = np.floor(centre) + tap
    column = np.clip(sample, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new), column), kernel(abs(centre - sample)))
  return matrix


def _triangle(x: np.ndarray) -> np.ndarray:
  return 1 - x


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution with a = -0.75, as PyTorch has it."""
  a = -0.75
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, far)


METHODS = {
  "bilinear": lambda old, new: _interpolation(old, new, 2, _triangle),
  "bicubic": lambda old, new: _interpolation(old, new, 4, _cubic),
  "crop": lambda old, new: np.eye(new, old),
}
