"""Training objectives: contrastive, supervised, and of the next token.

Every loss here is written for the global batch. Under `jax.jit` with sharded
inputs the compiler adds the communication, so one device and many devices give
the same loss and the same gradients.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, ScalarLike

MIN_NORM = 1e-12
MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 1.0
# The label of a token that no loss is computed of.
IGNORED = -100


def nt_xent(
  z_time: Float[Array, "B E"],
  z_freq: Float[Array, "B E"],
  *,
  logit_scale: ScalarLike,
  logit_bias: ScalarLike,
  negatives: Float[Array, "Q E"] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Symmetric NT-Xent over the 2B projections of a batch of B clips.

  With u = z / |z|, s(a, b) = logit_scale * <u_a, u_b> + logit_bias, and p(a)
  the other view of the clip that a came from,

    loss = 1 / (2B) * sum_a [ log sum_{b != a} exp s(a, b) - s(a, p(a)) ].

  Args:
    z_time: [B, E] projections of the time-masked view; need not be unit norm.
    z_freq: [B, E] projections of the frequency-masked view, in the same order.
    logit_scale: inverse temperature; may be a learned, traced scalar.
    logit_bias: added to every logit. The softmax cancels it, so its gradient
      is zero; it exists because published checkpoints carry it.
    negatives: [Q, E] further projections that every anchor is compared with
      and that get no gradient, or None.

  Returns:
    The scalar float32 loss, and {"accuracy": the fraction of the 2B anchors
    whose positive beats every negative}. A tie counts as a miss, so collapsed
    embeddings score 0 instead of 1.

  Raises:
    ValueError: if the batch has fewer than two clips (no negatives).

  Reference: Chen et al. 2020 (arXiv 2002.05709), equation 1; AudioMosaic
    section 3. Tested to 1e-6 against the PyTorch reference on one process and
    on four.
  """

  def reduce(pieces):
    rows = [jax.nn.logsumexp(piece, axis=1) for piece in pieces]
    return functools.reduce(jnp.logaddexp, rows)

  return _contrast(reduce, z_time, z_freq, logit_scale, logit_bias, negatives)


def sigmoid_pairs(
  z_time: Float[Array, "B E"],
  z_freq: Float[Array, "B E"],
  *,
  logit_scale: ScalarLike,
  logit_bias: ScalarLike,
  negatives: Float[Array, "Q E"] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Every pair of projections classified on its own: one clip, or two?

  In the notation of `nt_xent`,

    loss = 1 / (2B) * sum_a [ sum_{b != a} softplus s(a, b) - s(a, p(a)) ].

  No pair's term depends on another, so a small batch is less of a handicap.
  Most pairs are negative: start with a bias of about -log(2B), and learn it
  and the temperature.

  Args:
    z_time: as of `nt_xent`.
    z_freq: as of `nt_xent`.
    logit_scale: as of `nt_xent`.
    logit_bias: added to every logit.
    negatives: as of `nt_xent`.

  Returns:
    As `nt_xent`.

  Raises:
    ValueError: as `nt_xent`.

  Reference: Zhai et al. 2023 (SigLIP, arXiv 2303.15343), algorithm 1. Differs
    from upstream: pairs within a view are negatives too, as in NT-Xent.
  """

  def reduce(pieces):
    return sum(jnp.sum(jax.nn.softplus(piece), axis=1) for piece in pieces)

  return _contrast(reduce, z_time, z_freq, logit_scale, logit_bias, negatives)


def next_token(
  logits: Float[Array, "B N V"], labels: Int[Array, "B N"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Cross-entropy of every token given those before it, as sum and count.

  The mean over a batch is the one divided by the other; over several batches,
  as of an accumulated gradient, the sums of both.

  Args:
    logits: after every token.
    labels: the tokens; IGNORED ones are not counted, nor is the first.

  Returns:
    (sum of -log p, number of counted tokens).

  Reference: transformers, whose mean over one batch is equal to 1e-5.
  """
  following = labels[:, 1:]
  counted = following != IGNORED
  scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
  chosen = jnp.where(counted, following, 0)[:, :, None]
  found = jnp.take_along_axis(scores, chosen, axis=-1)[:, :, 0]
  return -jnp.sum(found, where=counted), counted.sum()


def inverse_temperature(log_scale: Float[Array, ""]) -> Float[Array, ""]:
  """The logit scale of a learned temperature, 1 / clip(exp(-s), 0.01, 1).

  Args:
    log_scale: the parameter s, the logarithm of the inverse temperature.

  Returns:
    The inverse temperature, between 1 and 100. Its gradient is zero while s is
    outside the limits and passes on the limits themselves.

  Reference: AudioMosaic's learnable temperature; tested to 1e-6 against the
    PyTorch reference.
  """
  temperature = jnp.exp(-log_scale)
  inside = (temperature >= MIN_TEMPERATURE) & (temperature <= MAX_TEMPERATURE)
  clipped = jnp.clip(temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
  # jnp.clip alone would halve the gradient at s = 0, a natural initial value.
  return 1 / jnp.where(inside, temperature, clipped)


def softmax_cross_entropy(
  logits: Float[Array, "B C"],
  targets: Float[Array, "B C"],
  *,
  class_weights: Sequence[float],
  label_smoothing: float,
) -> Float[Array, ""]:
  """Cross-entropy of the softmax, for one class per clip.

    loss = sum_bc w_c t_bc (-log softmax(logits)_bc) / sum_bc w_c t_bc

  with t the targets, mixed (1 - s) t + s / C by label smoothing s.

  Args:
    logits: [B, C].
    targets: [B, C] rows that sum to one: a class, or mixed classes.
    class_weights: C of them, or () for ones.
    label_smoothing: s, from 0 to 1.

  Returns:
    The mean loss, float32.

  Reference: torch.nn.functional.cross_entropy with class indices. Differs from
    upstream: mixed targets are weighed as whole ones are, by the mean weight;
    PyTorch divides those by the batch size.
  """
  targets = targets * (1 - label_smoothing) + label_smoothing / logits.shape[1]
  weighted = targets * _class_weights(class_weights, logits.shape[1])
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
  return -jnp.sum(weighted * log_p) / jnp.sum(weighted)


def sigmoid_cross_entropy(
  logits: Float[Array, "B C"],
  targets: Float[Array, "B C"],
  *,
  class_weights: Sequence[float],
  label_smoothing: float,
) -> Float[Array, ""]:
  """Cross-entropy of a sigmoid per class, for any number of classes per clip.

    loss = mean_bc w_c [softplus(x_bc) - t_bc x_bc]

  with x the logits and t the targets, mixed (1 - s) t + s / 2 by smoothing s.

  Args:
    logits: [B, C].
    targets: [B, C]; the sum of two mixed rows may exceed one.
    class_weights: C of them, or () for ones.
    label_smoothing: s, from 0 to 1.

  Returns:
    The mean over clips and classes, float32.

  Reference: torch.nn.BCEWithLogitsLoss(weight=class_weights).
  """
  logits = logits.astype(jnp.float32)
  targets = targets * (1 - label_smoothing) + label_smoothing / 2
  loss = jax.nn.softplus(logits) - targets * logits
  return jnp.mean(loss * _class_weights(class_weights, logits.shape[1]))


def _class_weights(
  weights: Sequence[float], num_classes: int
) -> Float[Array, " C"]:
  """Returns one weight per class.

  Raises:
    ValueError: if there are weights for another number of classes.
  """
  if not len(weights):
    return jnp.ones(num_classes)
  if len(weights) != num_classes:
    raise ValueError(
      f"class_weights has {len(weights)} values for {num_classes} classes; "
      "give one each, or () for none"
    )
  return jnp.asarray(weights, jnp.float32)


def check_batch(batch_size: int) -> None:
  """Raises ValueError if a batch has no negatives."""
  if batch_size < 2:
    raise ValueError(
      f"a contrastive loss needs negatives, but the batch has {batch_size} "
      "clip; use a global batch of at least 2"
    )


def unit_rows(z: Float[Array, "B E"]) -> Float[Array, "B E"]:
  """Rows scaled to unit length in float32; a zero row stays zero."""
  z = z.astype(jnp.float32)
  squared_norm = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
  # The floor is inside the root, where the derivative at zero is finite.
  return z / jnp.sqrt(jnp.maximum(squared_norm, MIN_NORM**2))


def dot(a: Float[Array, "B E"], b: Float[Array, "N E"]) -> Float[Array, "B N"]:
  """All inner products, in full float32 on every backend.

  A TPU multiplies float32 matrices in bfloat16 by default, which at a
  temperature of 0.1 moves logits by hundredths.
  """
  return jnp.einsum("be,ne->bn", a, b, precision=jax.lax.Precision.HIGHEST)


def _contrast(
  reduce: Callable[[list[Array]], Array],
  z_time: Float[Array, "B E"],
  z_freq: Float[Array, "B E"],
  logit_scale: ScalarLike,
  logit_bias: ScalarLike,
  negatives: Float[Array, "Q E"] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mean over the 2B anchors of what `reduce` makes of a row of logits.

  Each view is one block of anchors with [B, 2B] logits: its own view (without
  the anchor itself) and the other view. The views are never joined along the
  batch axis, because that would reshuffle a sharded batch between devices.

  Args:
    reduce: of [B, N] pieces of the same rows, -inf for what is left out.
    z_time: see `nt_xent`; so are the others.
  """
  check_batch(z_time.shape[0])
  u_time, u_freq = unit_rows(z_time), unit_rows(z_freq)
  queues = []
  if negatives is not None:
    queues = [unit_rows(jax.lax.stop_gradient(negatives))]
  is_diagonal = jnp.eye(len(u_time), dtype=bool)

  def logits(anchors, candidates):
    return logit_scale * dot(anchors, candidates) + logit_bias

  def compare(anchors, others):
    own = jnp.where(is_diagonal, -jnp.inf, logits(anchors, anchors))
    # The second view's block is computed again rather than transposed: the
    # transpose of sharded rows adds gathers and reductions between devices.
    cross = logits(anchors, others)
    rest = [logits(anchors, queue) for queue in queues]
    # Row sums over a mask stay on the device that owns the row.
    positive = jnp.sum(jnp.where(is_diagonal, cross, 0.0), axis=1)
    others = [own, jnp.where(is_diagonal, -jnp.inf, cross), *rest]
    hardest = [jnp.max(piece, axis=1) for piece in others]
    hit = positive > functools.reduce(jnp.maximum, hardest)
    loss = reduce([own, cross, *rest]) - positive
    return jnp.mean(loss), jnp.mean(hit.astype(jnp.float32))

  loss_time, hit_time = compare(u_time, u_freq)
  loss_freq, hit_freq = compare(u_freq, u_time)
  return (loss_time + loss_freq) / 2, {"accuracy": (hit_time + hit_freq) / 2}


# Losses between two views: as `nt_xent`.
CONTRASTIVE = {"nt_xent": nt_xent, "sigmoid": sigmoid_pairs}
# Supervised losses: (logits, targets, class_weights, label_smoothing) -> loss.
SUPERVISED = {
  "softmax": softmax_cross_entropy,
  "sigmoid": sigmoid_cross_entropy,
}
