"""Contrastive losses without the [2B, 2B] matrix, for very large batches.

Every anchor a is compared with N = 2B + Q candidates: both views of all clips,
and further negatives. All that the loss needs of a row of logits is one number,

  R_a = log sum_{b != a} exp s(a, b)        NT-Xent
  R_a = sum_{b != a} softplus s(a, b)       sigmoid

and the gradient of the row is w(a, b) = dR_a / ds(a, b), which is a function of
s(a, b) and R_a alone. So the forward pass goes over blocks of candidates and
keeps R, and the backward pass computes each block of logits again:

  du_a = scale * sum_b [ g_a w(a, b) + g_b w(b, a) ] u_b

with g the cotangent of R. Both roles of a projection, anchor and candidate,
meet in that sum, because s is symmetric: the devices exchange 2B projections
and 2 * 2B scalars, never a gradient of size [2B, E].

Equal to `losses.py` to 1e-6, loss and gradients, on 1, 2, 4 and 8 devices.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from audiomosaic_jax import losses, per_device, sharding


class Rows(NamedTuple):
  """How a row of logits becomes a number, block by block.

  Attributes:
    start: what a row has seen before the first block.
    add: (seen, logits [m, n]) -> seen; -inf is a logit that does not count.
    finish: seen -> R.
    weight: (logits, R) -> dR / dlogits.
  """

  start: tuple[float, ...]
  add: Callable
  finish: Callable
  weight: Callable


class Blocks(NamedTuple):
  """What is fixed when the program is traced.

  Attributes:
    name: a key of ROWS.
    size: anchors and candidates in a block, at most.
    mesh: the devices that the rows are split over.
  """

  name: str
  size: int
  mesh: Mesh


def contrast(
  name: str,
  z_time: Float[Array, "B E"],
  z_freq: Float[Array, "B E"],
  *,
  logit_scale: ScalarLike,
  logit_bias: ScalarLike,
  negatives: Float[Array, "Q E"] | None,
  block_size: int,
  mesh: Mesh,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `losses.CONTRASTIVE[name]` in memory that blocks bound.

  Args:
    name: "nt_xent" or "sigmoid".
    z_time: [B, E] projections of one view, sharded over the mesh.
    z_freq: [B, E] projections of the other.
    logit_scale: inverse temperature.
    logit_bias: added to every logit.
    negatives: [Q, E] further candidates without gradient, or None.
    block_size: anchors and candidates per block; a device holds the logits of
      one block, [block_size, block_size].
    mesh: the devices.

  Returns:
    As `losses.nt_xent`.

  Raises:
    ValueError: fewer than two clips.
  """
  losses.check_batch(len(z_time))
  u_time, u_freq = losses.unit_rows(z_time), losses.unit_rows(z_freq)
  if negatives is None:
    negatives = u_time[:0]
  queue = losses.unit_rows(jax.lax.stop_gradient(negatives))
  scale, bias = jnp.float32(logit_scale), jnp.float32(logit_bias)
  blocks = Blocks(name, block_size, mesh)
  rows, hardest = _compare(blocks, u_time, u_freq, queue, scale, bias)
  positive = scale * jnp.sum(u_time * u_freq, axis=1) + bias
  loss = sum(jnp.mean(row - positive) for row in rows) / 2
  hits = [jnp.mean((positive > h).astype(jnp.float32)) for h in hardest]
  return loss, {"accuracy": sum(hits) / 2}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compare(blocks, u_time, u_freq, queue, scale, bias):
  """Returns R and the largest negative logit, both per view and row [B]."""
  forward = per_device.map_shards(
    functools.partial(_forward, ROWS[blocks.name], blocks.size),
    blocks.mesh,
    rows_in=(True, True, False, False, False),
    rows_out=True,
  )
  return forward(u_time, u_freq, queue, scale, bias)


def _compare_forward(blocks, *arrays):
  rows, hardest = _compare(blocks, *arrays)
  return (rows, hardest), (*arrays, rows)


def _compare_backward(blocks, residuals, cotangents):
  *arrays, rows = residuals
  # The largest negative is for the accuracy, which has no gradient.
  grads, _ = cotangents
  backward = per_device.map_shards(
    functools.partial(_backward, ROWS[blocks.name], blocks.size),
    blocks.mesh,
    rows_in=(True, True, False, False, False, True, True),
    rows_out=(True, True, False, False),
  )
  d_time, d_freq, d_scale, d_bias = backward(*arrays, rows, grads)
  return d_time, d_freq, jnp.zeros_like(arrays[2]), d_scale, d_bias


_compare.defvjp(_compare_forward, _compare_backward)


class _Anchors(NamedTuple):
  """Rows of the matrix of logits; `column` and `positive` are columns of it."""

  u: Float[Array, "M E"]
  column: Int[Array, " M"]
  positive: Int[Array, " M"]


class _Candidates(NamedTuple):
  """Columns of the matrix of logits, which every device holds all of."""

  u: Float[Array, "N E"]
  column: Int[Array, " N"]


# What fills the last block: padding is no anchor's own or positive column, and
# no candidate of any anchor.
_NO_ANCHORS = _Anchors(u=0.0, column=-2, positive=-2)
_NO_CANDIDATES = _Candidates(u=0.0, column=-1)


def _forward(kind: Rows, size: int, u_time, u_freq, queue, scale, bias):
  """`_compare` of the anchors of one device."""
  candidates = _blocks(_candidates(u_time, u_freq, queue), _NO_CANDIDATES, size)

  def reduce_anchors(anchors):
    def add(seen, candidates):
      rows, hardest = seen
      logits, _ = _logits(anchors, candidates, scale, bias)
      is_positive = anchors.positive[:, None] == candidates.column
      negatives = jnp.where(is_positive, -jnp.inf, logits)
      hardest = jnp.maximum(hardest, jnp.max(negatives, axis=1))
      return (kind.add(rows, logits), hardest), None

    start = _full(len(anchors.u), (kind.start, -math.inf))
    (rows, hardest), _ = jax.lax.scan(add, start, candidates)
    return kind.finish(rows), hardest

  anchors = _blocks(_anchors(u_time, u_freq), _NO_ANCHORS, size)
  rows, hardest = jax.lax.map(reduce_anchors, anchors)
  return _by_view(rows, len(u_time)), _by_view(hardest, len(u_time))


def _backward(
  kind: Rows, size: int, u_time, u_freq, queue, scale, bias, rows, grads
):
  """The gradients of `_compare` for one device, see the top of this file."""
  # The queue was never an anchor: no row, no cotangent.
  no_rows = jnp.full(len(queue), jnp.inf), jnp.zeros(len(queue))
  all_rows, all_grads = (
    jnp.concatenate([*map(_gather, views), none])
    for views, none in zip((rows, grads), no_rows, strict=True)
  )
  candidates = _blocks(
    (_candidates(u_time, u_freq, queue), all_rows, all_grads),
    (_NO_CANDIDATES, jnp.inf, 0.0),
    size,
  )

  def differentiate_anchors(block):
    anchors, row, grad = block

    def add(sums, block):
      candidates, other_row, other_grad = block
      d_u, d_scale, d_bias = sums
      logits, cosine = _logits(anchors, candidates, scale, bias)
      as_anchor = grad[:, None] * kind.weight(logits, row[:, None])
      as_candidate = other_grad * kind.weight(logits, other_row)
      d_u += losses.dot(as_anchor + as_candidate, candidates.u.T)
      d_scale += jnp.sum(as_anchor * cosine, axis=1)
      d_bias += jnp.sum(as_anchor, axis=1)
      return (d_u, d_scale, d_bias), None

    zeros = _full(len(anchors.u), (0.0, 0.0))
    start = jnp.zeros_like(anchors.u) + zeros[0][:, None], *zeros
    (d_u, *d_scalars), _ = jax.lax.scan(add, start, candidates)
    return scale * d_u, *d_scalars

  own = _anchors(u_time, u_freq), jnp.concatenate(rows), jnp.concatenate(grads)
  blocks = _blocks(own, (_NO_ANCHORS, jnp.inf, 0.0), size)
  d_u, *d_scalars = jax.lax.map(differentiate_anchors, blocks)
  total = [jax.lax.psum(jnp.sum(d), sharding.DATA_AXIS) for d in d_scalars]
  return *_by_view(d_u, len(u_time)), *total


def _anchors(u_time: Array, u_freq: Array) -> _Anchors:
  """Returns this device's rows, those of one view after the other's."""
  own, devices = len(u_time), jax.lax.axis_size(sharding.DATA_AXIS)
  clip = own * jax.lax.axis_index(sharding.DATA_AXIS) + jnp.arange(own)
  time, freq = clip, clip + own * devices
  return _Anchors(
    u=jnp.concatenate([u_time, u_freq]),
    column=jnp.concatenate([time, freq]),
    positive=jnp.concatenate([freq, time]),
  )


def _candidates(u_time: Array, u_freq: Array, queue: Array) -> _Candidates:
  """Returns all columns: both views of every clip, then the queue."""
  u = jnp.concatenate([_gather(u_time), _gather(u_freq), queue])
  return _Candidates(u=u, column=jnp.arange(len(u)))


def _logits(
  anchors: _Anchors, candidates: _Candidates, scale: Array, bias: Array
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
  """Returns logits, -inf where a pair does not count, and cosines."""
  cosine = losses.dot(anchors.u, candidates.u)
  is_self = anchors.column[:, None] == candidates.column
  counts: Bool[Array, "m n"] = ~is_self & (candidates.column >= 0)
  return jnp.where(counts, scale * cosine + bias, -jnp.inf), cosine


def _blocks(tree, fill, size: int):
  """Returns arrays [L, ...] as [blocks, size, ...], the last one filled up."""
  length = len(jax.tree.leaves(tree)[0])
  size = min(size, length)
  missing = -length % size

  def cut(x, value):
    widths = [(0, missing)] + [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, widths, constant_values=value)
    return x.reshape(-1, size, *x.shape[1:])

  return jax.tree.map(cut, tree, fill)


def _by_view(blocks: Array, own: int) -> tuple[Array, Array]:
  """Returns the rows of either view, without what filled the last block."""
  rows = blocks.reshape(-1, *blocks.shape[2:])
  return rows[:own], rows[own : 2 * own]


def _full(length: int, values):
  """Returns a vector of each value that every device counts on its own."""
  return jax.tree.map(
    lambda v: jax.lax.pcast(
      jnp.full(length, v), sharding.DATA_AXIS, to="varying"
    ),
    values,
  )


def _gather(rows: Array) -> Array:
  """Returns the rows of all devices."""
  return jax.lax.all_gather(rows, sharding.DATA_AXIS, tiled=True)


def _add_exponentials(seen, logits):
  """Adds to (largest logit m, sum of exp(logit - m))."""
  largest, total = seen
  new = jnp.maximum(largest, jnp.max(logits, axis=1))
  added = jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
  return new, total * jnp.exp(largest - new) + added


ROWS = {
  "nt_xent": Rows(
    # A finite start: the difference of two infinities is not a number.
    start=(-1e30, 0.0),
    add=_add_exponentials,
    finish=lambda seen: seen[0] + jnp.log(seen[1]),
    weight=lambda logits, row: jnp.exp(logits - row),
  ),
  "sigmoid": Rows(
    start=(0.0,),
    add=lambda seen, logits: (
      seen[0] + jnp.sum(jax.nn.softplus(logits), axis=1),
    ),
    finish=lambda seen: seen[0],
    weight=lambda logits, row: jax.nn.sigmoid(logits),
  ),
}
