"""Numbers that say how good a representation is, as pure functions of arrays.

Three kinds: the spread of embeddings (effective rank, uniformity, local
intrinsic dimension), the agreement of two views (alignment, similarity), and
what labels say (nearest neighbours, ridge regression, accuracies). All of them
work under `jax.jit` and on host arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = Array | np.ndarray

_HIGHEST = jax.lax.Precision.HIGHEST
_LID_LOG_OFFSET = 1e-4
MAX_DIAGNOSED = 8192


def effective_rank(embedding: Float[AnyArray, "N D"]) -> Float[Array, ""]:
  """How many directions the embeddings use: exp of a spectrum's entropy.

  With singular values s_i of the matrix as given (not centred, not scaled) and
  p_i = s_i / sum s,  effective rank = exp(-sum p_i log p_i).

  Args:
    embedding: [N, D], one row per clip.

  Returns:
    A number from 1 (all rows parallel) to min(N, D).

  Reference: Roy & Vetterli 2007; this is RankMe (Garrido et al. 2023) without
    the 1e-7 it adds to every p_i.
  """
  values = jnp.linalg.svd(_float32(embedding), compute_uv=False)
  shares = values / jnp.maximum(jnp.sum(values), jnp.finfo(jnp.float32).tiny)
  return jnp.exp(jnp.sum(jax.scipy.special.entr(shares)))


def alignment(
  z_time: Float[AnyArray, "B E"], z_freq: Float[AnyArray, "B E"]
) -> Float[Array, ""]:
  """Mean squared distance between the two unit-norm views of a clip.

  Args:
    z_time: [B, E] projections of one view.
    z_freq: [B, E] projections of the other, in the same order.

  Returns:
    A number from 0 (the views agree) to 4.

  Reference: Wang & Isola 2020, equation 1 with alpha = 2.
  """
  difference = _unit_rows(z_time) - _unit_rows(z_freq)
  return jnp.mean(jnp.sum(jnp.square(difference), axis=1))


def uniformity(z: Float[AnyArray, "B E"]) -> Float[Array, ""]:
  """log of the mean of exp(-2 |u_i - u_j|^2) over pairs of unit-norm rows.

  Args:
    z: [B, E] projections of one view; B at least 2.

  Returns:
    A number up to 0 (all rows equal); lower is spread more evenly.

  Reference: Wang & Isola 2020, equation 2 with t = 2.
  """
  u = _unit_rows(z)
  num_rows = u.shape[0]
  exponent = 4 * _dot(u, u) - 4
  exponent = jnp.where(jnp.eye(num_rows, dtype=bool), -jnp.inf, exponent)
  num_pairs = num_rows * (num_rows - 1)
  return jax.nn.logsumexp(exponent) - jnp.log(jnp.float32(num_pairs))


def similarity_stats(
  z_time: Float[AnyArray, "B E"], z_freq: Float[AnyArray, "B E"]
) -> dict[str, Float[Array, ""]]:
  """Cosine similarity across the views, of the same and of different clips.

  Args:
    z_time: [B, E] projections of one view; B at least 2.
    z_freq: [B, E] projections of the other, in the same order.

  Returns:
    Mean and standard deviation over the B positives and the B (B - 1)
    negatives, and the mean over clips of the hardest negative.
  """
  cosine = _dot(_unit_rows(z_time), _unit_rows(z_freq))
  is_positive = jnp.eye(cosine.shape[0], dtype=bool)
  hardest = jnp.max(jnp.where(is_positive, -jnp.inf, cosine), axis=1)
  return {
    "positive_mean": jnp.mean(cosine, where=is_positive),
    "positive_std": jnp.std(cosine, where=is_positive),
    "negative_mean": jnp.mean(cosine, where=~is_positive),
    "negative_std": jnp.std(cosine, where=~is_positive),
    "hardest_negative_mean": jnp.mean(hardest),
  }


def lid_moments(
  data: Float[AnyArray, "N D"],
  reference: Float[AnyArray, "M D"] | None = None,
  *,
  k: int,
) -> Float[Array, " N"]:
  """Local intrinsic dimension around each row, by the method of moments.

  With r_1 <= ... <= r_k the distances to the nearest rows other than itself and
  m the mean of r_1 ... r_(k-1),  lid = m / (r_k - m).

  Args:
    data: [N, D] rows to look around; each must also be a row of `reference`.
    reference: [M, D] rows among which the neighbours are; None for `data`.
    k: number of neighbours; at most N - 2 are used. The published training log
      is over the rows of both views together, with k = 32.

  Returns:
    [N] estimates; not finite where all k neighbours are equally far.

  Reference: Amsaleg et al. 2018; equal to the PyTorch reference to 1e-4.
  """
  distances = _neighbour_distances(data, reference, k)
  mean = jnp.mean(distances[:, :-1], axis=1)
  return mean / (distances[:, -1] - mean)


def lid_mle(
  data: Float[AnyArray, "N D"],
  reference: Float[AnyArray, "M D"] | None = None,
  *,
  k: int,
) -> Float[Array, " N"]:
  """Local intrinsic dimension around each row, by maximum likelihood.

  lid = -k / sum_(j < k) log(r_j / r_k + 1e-4), distances as in `lid_moments`.

  Args:
    data: [N, D] rows to look around; each must also be a row of `reference`.
    reference: [M, D] rows among which the neighbours are; None for `data`.
    k: number of neighbours; at most N - 2 are used.

  Returns:
    [N] estimates.

  Reference: Levina & Bickel 2004, with the offset of the PyTorch reference;
    equal to that to 1e-4.
  """
  distances = _neighbour_distances(data, reference, k)
  ratios = distances[:, :-1] / distances[:, -1:]
  log_sum = jnp.sum(jnp.log(ratios + _LID_LOG_OFFSET), axis=1)
  return -distances.shape[1] / log_sum


@jax.jit
def diagnose(views: dict[str, tuple[jax.Array, jax.Array]]) -> dict:
  """Returns the health of the embeddings of one step.

  Effective rank and intrinsic dimension (LID) of the pooled features show
  collapse before the loss does; alignment and uniformity are the two things
  that NT-Xent trades against each other. Of a batch above 8192 clips, a part.
  """
  every = -(-len(views["z"][0]) // MAX_DIAGNOSED)
  views = jax.tree.map(lambda rows: rows[::every], views)
  z_time, z_freq = views["z"]
  # Rows of one view, not of both: joining views would reshuffle the devices.
  pooled = views["pooled"][0]
  return {
    "effective_rank": effective_rank(pooled),
    "alignment": alignment(z_time, z_freq),
    "uniformity": uniformity(z_time),
    "lid": lid_moments(pooled, k=32).mean(),
  }


def knn_predict(
  train_embedding: Float[AnyArray, "N D"],
  train_labels: Int[AnyArray, " N"],
  test_embedding: Float[AnyArray, "M D"],
  *,
  k: int,
  num_classes: int,
  temperature: float,
) -> Int[Array, " M"]:
  """The class with most votes among the k most similar training clips.

  A neighbour with cosine similarity c votes with weight exp(c / temperature).

  Args:
    train_embedding: [N, D].
    train_labels: [N] class ids.
    test_embedding: [M, D].
    k: number of neighbours, at most N.
    num_classes: one more than the largest class id.
    temperature: smaller trusts the nearest neighbours more.

  Returns:
    [M] predicted class ids.

  Raises:
    ValueError: if k exceeds the number of training clips.

  Reference: Wu et al. 2018 (instance discrimination), equation 9; equal to
    scikit-learn's KNeighborsClassifier with these weights.
  """
  targets = jax.nn.one_hot(train_labels, num_classes)
  votes = knn_votes(
    train_embedding, targets, test_embedding, k=k, temperature=temperature
  )
  return jnp.argmax(votes, axis=1)


def knn_votes(
  train_embedding: Float[AnyArray, "N D"],
  train_targets: Float[AnyArray, "N C"],
  test_embedding: Float[AnyArray, "M D"],
  *,
  k: int,
  temperature: float,
) -> Float[Array, "M C"]:
  """What the k most similar training clips vote for; see `knn_predict`.

  Args:
    train_embedding: [N, D].
    train_targets: [N, C], 1 for the classes of a clip.
    test_embedding: [M, D].
    k: number of neighbours, at most N.
    temperature: smaller trusts the nearest neighbours more.

  Returns:
    [M, C] sums of weights.

  Raises:
    ValueError: if k exceeds the number of training clips.
  """
  num_train = train_embedding.shape[0]
  if not 1 <= k <= num_train:
    raise ValueError(
      f"k {k} must be between 1 and the {num_train} training clips;"
      f" use k={min(max(k, 1), num_train)}"
    )
  cosine = _dot(_unit_rows(test_embedding), _unit_rows(train_embedding))
  cosine, neighbours = jax.lax.top_k(cosine, k)
  # Relative to a perfect match, so that no temperature overflows.
  weights = jnp.exp((cosine - 1) / temperature)
  voters = jnp.asarray(train_targets, jnp.float32)[neighbours]
  return jnp.einsum("mk,mkc->mc", weights, voters, precision=_HIGHEST)


def ridge_probe(
  train_embedding: Float[AnyArray, "N D"],
  train_labels: Int[AnyArray, " N"],
  test_embedding: Float[AnyArray, "M D"],
  *,
  num_classes: int,
  l2: float,
  class_balanced: bool,
) -> Float[Array, "M C"]:
  """Class scores of a linear probe fitted in closed form.

  With x standardised by the training mean and deviation and y one-hot, solves
  min over W, b of  sum_i w_i |W x_i + b - y_i|^2 + l2 |W|^2.

  Args:
    train_embedding: [N, D].
    train_labels: [N] class ids.
    test_embedding: [M, D].
    num_classes: one more than the largest class id.
    l2: strength of the penalty, positive.
    class_balanced: weight clips so that every class that occurs has the same
      total weight; otherwise w_i = 1.

  Returns:
    [M, num_classes] scores; their argmax is the prediction.

  Raises:
    ValueError: if l2 is not positive.

  Reference: equal to scikit-learn's StandardScaler and Ridge to 1e-4.
  """
  if not l2 > 0:
    raise ValueError(
      f"l2 {l2} must be positive for a unique solution; use a small one, 1e-3"
    )
  x, x_test = _float32(train_embedding), _float32(test_embedding)
  mean, std = jnp.mean(x, axis=0), jnp.std(x, axis=0)
  # A constant feature has only rounding noise to divide by.
  std = jnp.where(std > 1e-6 * jnp.max(jnp.abs(x), axis=0), std, 1.0)
  x, x_test = (x - mean) / std, (x_test - mean) / std

  targets = jax.nn.one_hot(train_labels, num_classes)
  weights = jnp.ones(x.shape[0])
  if class_balanced:
    sizes = jnp.sum(targets, axis=0)
    num_present = jnp.sum(sizes > 0)
    weights = x.shape[0] / (num_present * (targets @ sizes))
  # Centring by weighted means solves for the intercept.
  x_mean = jnp.average(x, axis=0, weights=weights)
  y_mean = jnp.average(targets, axis=0, weights=weights)
  x, targets = x - x_mean, targets - y_mean
  weighted = (x * weights[:, None]).T
  gram = jnp.matmul(weighted, x, precision=_HIGHEST)
  gram = gram + l2 * jnp.eye(x.shape[1])
  moment = jnp.matmul(weighted, targets, precision=_HIGHEST)
  kernel = jax.scipy.linalg.solve(gram, moment, assume_a="pos")
  return jnp.matmul(x_test - x_mean, kernel, precision=_HIGHEST) + y_mean


def accuracy(
  predictions: Int[AnyArray, " N"], labels: Int[AnyArray, " N"]
) -> Float[Array, ""]:
  """The fraction of predicted class ids that are right."""
  return jnp.mean(jnp.asarray(predictions) == jnp.asarray(labels))


def top_k_accuracy(
  logits: Float[AnyArray, "N C"], labels: Int[AnyArray, " N"], *, k: int
) -> Float[Array, ""]:
  """The fraction of clips whose class is among the k highest scores.

  Args:
    logits: [N, C] scores; any increasing function of them does as well.
    labels: [N] class ids.
    k: number of guesses per clip.

  Returns:
    A number from 0 to 1.

  Reference: equal to the PyTorch reference for k = 1 and k = 5.
  """
  _, guesses = jax.lax.top_k(jnp.asarray(logits), k)
  hits = guesses == jnp.asarray(labels)[:, None]
  return jnp.mean(jnp.any(hits, axis=1))


def balanced_accuracy(
  predictions: Int[AnyArray, " N"],
  labels: Int[AnyArray, " N"],
  *,
  num_classes: int,
) -> Float[Array, ""]:
  """Mean over classes of the fraction of their clips that are recognised.

  Args:
    predictions: [N] class ids.
    labels: [N] class ids.
    num_classes: one more than the largest class id.

  Returns:
    A number from 0 to 1. Classes that no clip belongs to are left out.

  Reference: equal to scikit-learn's balanced_accuracy_score.
  """
  labels = jnp.asarray(labels)
  hits = (jnp.asarray(predictions) == labels).astype(jnp.float32)
  sizes = jnp.bincount(labels, length=num_classes)
  recalled = jnp.bincount(labels, weights=hits, length=num_classes)
  return jnp.mean(recalled / jnp.maximum(sizes, 1), where=sizes > 0)


def _float32(x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
  return jnp.asarray(x, jnp.float32)


def _unit_rows(x: Float[AnyArray, "N D"]) -> Float[Array, "N D"]:
  x = _float32(x)
  norm = jnp.linalg.norm(x, axis=1, keepdims=True)
  return x / jnp.maximum(norm, 1e-12)


def _dot(a: Float[Array, "N D"], b: Float[Array, "M D"]) -> Float[Array, "N M"]:
  return jnp.einsum("nd,md->nm", a, b, precision=_HIGHEST)


def _neighbour_distances(
  data: Float[AnyArray, "N D"],
  reference: Float[AnyArray, "M D"] | None,
  k: int,
) -> Float[Array, "N k"]:
  """Ascending distances to the k nearest other rows, k cut to N - 2."""
  k = min(k, data.shape[0] - 2)
  if k < 2:
    raise ValueError(
      f"a local dimension needs at least 2 neighbours, but {data.shape[0]} rows"
      f" leave k={k} (cut to 2 less than the rows); use at least 4 rows and k=2"
    )
  reference = data if reference is None else reference
  # Distances do not change with the origin, but their rounding does.
  origin = jnp.mean(_float32(reference), axis=0)
  a, b = _float32(data) - origin, _float32(reference) - origin
  squared = (
    jnp.sum(jnp.square(a), axis=1)[:, None]
    + jnp.sum(jnp.square(b), axis=1)
    - 2 * _dot(a, b)
  )
  # The nearest row is the row itself.
  nearest = -jax.lax.top_k(-squared, k + 1)[0][:, 1:]
  return jnp.sqrt(jnp.maximum(nearest, 0.0))
