"""AdamW with per-step schedules, layer-wise rates and frozen parameters.

Which parameter decays, learns slower or stays frozen is decided from its path
in the tree while tracing; a compiled step holds arrays only.

The encoder's blocks are stacked: a leaf below ".../blocks/..." holds that
parameter of every block, block i at index i of axis 0.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, ScalarLike

PyTree = Any

STACKED = "blocks"
NEVER_DECAYED = ("bias", "cls_token", "pos_embed")
INPUT_LAYER = ("patch_embed", "cls_token", "pos_embed")


def make_schedule(
  *,
  name: str,
  base_lr: float,
  min_lr: float,
  warmup_steps: int,
  total_steps: int,
  milestones: Sequence[float] | None = None,
  milestone_factor: float | None = None,
) -> Callable[[ScalarLike], Float[Array, ""]]:
  """The learning rate at every step.

  The rate rises linearly from exactly 0 at step 0 to base_lr at warmup_steps.
  With x in [0, 1] the progress from there to total_steps it then follows

    cosine      min_lr + (base_lr - min_lr) * (1 + cos(pi x)) / 2
    polynomial  min_lr + (base_lr - min_lr) * (1 - x)
    linear      base_lr * (1 - x)
    milestones  base_lr * milestone_factor ^ (number of milestones reached)
    constant    base_lr

  and after total_steps it stays where it is.

  Parity: as in the published code "linear" ends at 0 whatever min_lr is;
  "polynomial" is the line that ends at min_lr.
  Differs from upstream: there the last of three milestones does nothing. Here
  every listed milestone acts, so (0.65, 0.85) with factor 0.1 is its schedule.

  Args:
    name: a key of SCHEDULES.
    base_lr: the highest rate.
    min_lr: the rate at total_steps, for "cosine" and "polynomial".
    warmup_steps: steps of linear warm-up; 0 starts at base_lr.
    total_steps: the step at which the rate stops changing, warm-up included.
    milestones: fractions of total_steps, for "milestones".
    milestone_factor: multiplies the rate at each of them.

  Returns:
    A function from the step, a Python integer or a traced one, to the rate.

  Raises:
    ValueError: if a value is unknown, out of order or missing.

  Reference: equal to the PyTorch scheduler to 1e-6 at 184 steps of two runs.
  """
  _check_schedule(name, warmup_steps, total_steps, milestones, milestone_factor)
  decay_steps = total_steps - warmup_steps
  milestone_steps = np.ceil(np.array(milestones or ()) * total_steps)
  milestone_steps = milestone_steps.astype(np.int32)

  def schedule(step: ScalarLike) -> Float[Array, ""]:
    step = jnp.asarray(step, jnp.int32)
    # Counted from the end in integers: the last small rates keep all digits.
    left = jnp.clip(total_steps - step, 0, decay_steps) / decay_steps
    reached = jnp.sum(step >= milestone_steps)
    dropped = (milestone_factor or 1.0) ** reached.astype(jnp.float32)
    decayed = SCHEDULES[name](base_lr, min_lr, left, dropped)
    warming = base_lr * (step / max(warmup_steps, 1))
    return jnp.where(step < warmup_steps, warming, decayed)

  return schedule


def decay_mask(params: PyTree) -> PyTree:
  """True for every leaf that weight decay shrinks.

  Those are the tensors with more than one axis, not counting the axis that
  stacks the blocks, that are no bias, class token or position embedding.

  Args:
    params: parameter tree of arrays or shapes.

  Returns:
    A tree of Python booleans of the same structure.

  Reference: the parameter groups of the published pretraining and fine-tuning.
  """

  def decays(path, leaf):
    names = _names(path)
    ndim = len(leaf.shape) - (STACKED in names)
    return ndim > 1 and names[-1] not in NEVER_DECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: PyTree, *, depth: int, decay: float) -> PyTree:
  """The factor on the learning rate of every leaf, decay ** (distance to head).

  The patch embedding, the class token and the positions get
  decay ** (depth + 1), block i gets decay ** (depth - i), the rest gets 1.

  Parity: the rest includes norm_pre, which sits before the blocks.

  Args:
    params: parameter tree of arrays or shapes.
    depth: number of blocks of the encoder.
    decay: the rate of a block relative to that of the block after it.

  Returns:
    A tree of float32 arrays that broadcast against the leaves: [depth, 1, ...]
    for stacked blocks, scalars otherwise.

  Raises:
    ValueError: if a stacked leaf does not hold `depth` blocks.

  Reference: Clark et al. 2020 (ELECTRA); Bao et al. 2022 (BEiT), 3.3.
  """
  per_block = decay ** np.arange(depth, 0, -1, dtype=np.float64)

  def scale(path, leaf):
    names = _names(path)
    if STACKED in names:
      if leaf.shape[0] != depth:
        raise ValueError(
          f"{'/'.join(names)} stacks {leaf.shape[0]} blocks, but depth is"
          f" {depth}; pass the depth of the model that made these parameters"
        )
      ones = (1,) * (len(leaf.shape) - 1)
      return per_block.reshape(depth, *ones).astype(np.float32)
    is_input = not set(names).isdisjoint(INPUT_LAYER)
    return np.float32(decay ** (depth + 1) if is_input else 1.0)

  return jax.tree_util.tree_map_with_path(scale, params)


def make_optimizer(
  params: PyTree,
  *,
  schedule: Callable[[ScalarLike], Float[Array, ""]],
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  layer_decay: float,
  frozen: Sequence[str],
  grad_clip_norm: float | None,
) -> optax.GradientTransformation:
  """AdamW whose updates reproduce torch.optim.AdamW with parameter groups.

  With m, v the bias-corrected moments and lr = schedule(step) * layer scale,

    update = -lr * (m / (sqrt(v) + eps) + weight_decay * decays * param).

  A frozen parameter gets a zero update and has no moments; it does not count
  towards the gradient norm either.

  Args:
    params: parameter tree of arrays or shapes, read for its paths only.
    schedule: the learning rate of a step, see `make_schedule`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: strength of decoupled decay where `decay_mask` is true.
    layer_decay: see `layer_scales`; 1.0 trains every layer at the same rate.
    frozen: regular expressions; a parameter whose whole path, such as
      "projector/norm_1/bias", matches one of them is never changed.
    grad_clip_norm: largest global gradient norm; None leaves it alone.

  Returns:
    A transformation with `init(params)` and `update(grads, state, params)`.

  Raises:
    ValueError: if a frozen pattern matches no parameter or all are frozen, or
      if layer decay is asked of parameters that hold no stacked blocks.

  Reference: Loshchilov & Hutter 2019; after five steps at 1e-2 within 2e-7 of
    torch's update rule written in float64 NumPy.
  """
  _check_frozen(params, frozen)
  steps = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
  steps += [optax.add_decayed_weights(weight_decay, mask=decay_mask)]
  if grad_clip_norm is not None:
    steps = [optax.clip_by_global_norm(grad_clip_norm), *steps]
  if layer_decay != 1.0:
    steps += [_scale_layers(_stack_depth(params), layer_decay)]
  steps += [optax.scale_by_learning_rate(schedule)]

  def label(path, _):
    return "frozen" if _is_frozen(_names(path), frozen) else "trained"

  return optax.partition(
    {"trained": optax.chain(*steps), "frozen": optax.set_to_zero()},
    lambda tree: jax.tree_util.tree_map_with_path(label, tree),
  )


def _check_schedule(
  name: str,
  warmup_steps: int,
  total_steps: int,
  milestones: Sequence[float] | None,
  milestone_factor: float | None,
) -> None:
  """Raises ValueError for what `make_schedule` cannot work with."""
  if name not in SCHEDULES:
    raise ValueError(f"unknown schedule {name!r}; use one of {[*SCHEDULES]}")
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"warmup_steps {warmup_steps} must be between 0 and total_steps"
      f" {total_steps}; train longer or warm up for fewer steps"
    )
  if name == "milestones" and not (milestones and milestone_factor):
    raise ValueError(
      f"schedule 'milestones' got milestones={milestones} and"
      f" milestone_factor={milestone_factor}; give both, such as (0.65, 0.85)"
      " and 0.1"
    )


def _scale_layers(depth: int, decay: float) -> optax.GradientTransformation:
  """Multiplies the update of each leaf with its `layer_scales`."""

  def update(updates, _):
    # Frozen leaves are absent from this tree, hence scales made on the spot.
    scales = layer_scales(updates, depth=depth, decay=decay)
    return jax.tree.map(lambda u, s: (u * s).astype(u.dtype), updates, scales)

  return optax.stateless(update)


def _stack_depth(params: PyTree) -> int:
  """The number of blocks that the stacked leaves hold."""
  depths = {
    leaf.shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if STACKED in _names(path)
  }
  if len(depths) != 1:
    raise ValueError(
      f"layer_decay needs one stack of {STACKED!r}, but the parameters hold"
      f" stacks of {sorted(depths)} blocks; use layer_decay=1.0"
    )
  return depths.pop()


def _names(path: tuple[Any, ...]) -> list[str]:
  return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _is_frozen(names: Sequence[str], frozen: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, "/".join(names)) for pattern in frozen)


def _check_frozen(params: PyTree, frozen: Sequence[str]) -> None:
  """Raises ValueError for patterns that freeze nothing or everything."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = [_names(path) for path, _ in leaves]
  for pattern in frozen:
    if not any(_is_frozen(name, [pattern]) for name in names):
      raise ValueError(
        f"frozen pattern {pattern!r} matches no parameter; it must match a"
        f" whole path such as {'/'.join(names[0])!r} ('encoder/.*' for all"
        " below encoder)"
      )
  if all(_is_frozen(name, frozen) for name in names):
    raise ValueError(
      f"frozen patterns {list(frozen)} match all {len(names)} parameters;"
      " leave at least one to train"
    )


def _cosine(base_lr, min_lr, left, dropped):
  # (1 + cos(pi x)) / 2 without its cancellation where the rate is small.
  factor = jnp.square(jnp.sin(jnp.pi / 2 * left))
  return min_lr + (base_lr - min_lr) * factor


def _polynomial(base_lr, min_lr, left, dropped):
  return min_lr + (base_lr - min_lr) * left


def _linear(base_lr, min_lr, left, dropped):
  return base_lr * left


def _milestones(base_lr, min_lr, left, dropped):
  return base_lr * dropped


def _constant(base_lr, min_lr, left, dropped):
  return jnp.full_like(left, base_lr)


# name -> (base_lr, min_lr, fraction of the decay that is left, product of the
# milestone factors so far) -> rate after the warm-up.
SCHEDULES = {
  "cosine": _cosine,
  "polynomial": _polynomial,
  "linear": _linear,
  "milestones": _milestones,
  "constant": _constant,
}
