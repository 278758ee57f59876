"""Representation metrics against the reference, scikit-learn and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import sklearn.neighbors
import sklearn.preprocessing

from audiomosaic_jax import metrics

NUM_CLASSES = 5


def _normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def labelled():
  """Overlapping clusters: train and test embeddings with class ids."""
  rng = np.random.default_rng(1)
  labels = np.minimum(rng.geometric(0.4, size=160) - 1, NUM_CLASSES - 1)
  centres = 1.2 * rng.standard_normal((NUM_CLASSES, 12))
  x = centres[labels] + rng.standard_normal((160, 12))
  x = (x * rng.uniform(0.5, 20, size=12) + 3).astype(np.float32)
  return x[:100], labels[:100], x[100:], labels[100:]


@pytest.mark.parametrize(
  ("matrix", "rank"),
  [
    (np.eye(6, dtype=np.float32), 6.0),
    (np.outer(np.arange(1, 6), np.ones(4)).astype(np.float32), 1.0),
    (np.zeros((4, 3), np.float32), 1.0),
    # Shares 3/4 and 1/4.
    (np.diag([3.0, 1.0]).astype(np.float32), 4 / 3**0.75),
  ],
)
def test_effective_rank_counts_the_directions_in_use(matrix, rank):
  np.testing.assert_allclose(metrics.effective_rank(matrix), rank, rtol=1e-5)


def test_effective_rank_ignores_scale_and_rotation():
  x = _normal(20, 8)
  rotation = np.linalg.qr(_normal(8, 8, seed=1))[0]
  expected = metrics.effective_rank(x)
  np.testing.assert_allclose(
    metrics.effective_rank(7 * x @ rotation), expected, rtol=1e-5
  )


def test_alignment_and_uniformity_are_the_sums_over_pairs_of_their_paper():
  a, b = _normal(6, 4), _normal(6, 4, seed=1)
  u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  np.testing.assert_allclose(
    metrics.alignment(a, b), np.mean(np.sum((u - v) ** 2, axis=1)), rtol=1e-5
  )
  pairs = [
    np.exp(-2 * np.sum((u[i] - u[j]) ** 2)) for i in range(6) for j in range(i)
  ]
  np.testing.assert_allclose(
    metrics.uniformity(a), np.log(np.mean(pairs)), rtol=1e-5
  )


def test_collapsed_views_are_aligned_and_not_uniform():
  ones = jnp.ones((8, 4))
  np.testing.assert_allclose(metrics.alignment(ones, 3 * ones), 0, atol=1e-6)
  np.testing.assert_allclose(metrics.uniformity(ones), 0, atol=1e-6)


def test_similarity_stats_separate_positives_from_negatives():
  a, b = _normal(7, 5), _normal(7, 5, seed=1)
  u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  cosine = u @ v.T
  negatives = cosine[~np.eye(7, dtype=bool)]
  expected = {
    "positive_mean": np.diag(cosine).mean(),
    "positive_std": np.diag(cosine).std(),
    "negative_mean": negatives.mean(),
    "negative_std": negatives.std(),
    "hardest_negative_mean": negatives.reshape(7, 6).max(axis=1).mean(),
  }
  stats = metrics.similarity_stats(a, b)
  assert stats.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(stats[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  "case", ["self_k32", "self_k20", "subset_k5", "small_k_clipped"]
)
def test_local_dimension_equals_the_reference(golden, case):
  z = golden("ntxent.npz")
  data, reference = z[f"lid/{case}/data"], z[f"lid/{case}/reference"]
  k = int(z[f"lid/{case}/k"])
  np.testing.assert_allclose(
    metrics.lid_moments(data, reference, k=k), z[f"lid/{case}/mom"], rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics.lid_mle(data, reference, k=k), z[f"lid/{case}/mle"], rtol=1e-5
  )


@pytest.mark.parametrize("case", [f"case{k}" for k in range(4)])
def test_the_logged_local_dimension_of_a_batch_equals_the_reference(
  golden, case
):
  z = golden("ntxent.npz")
  features = np.concatenate([z[f"{case}/f0"], z[f"{case}/f1"]])
  lid = metrics.lid_moments(features, k=32)
  np.testing.assert_allclose(lid.mean(), z[f"{case}/res/lids_mean"], rtol=1e-5)
  np.testing.assert_allclose(
    lid.var(ddof=1), z[f"{case}/res/lids_var"], rtol=1e-4
  )


def test_local_dimension_finds_the_dimension_of_a_flat_patch_far_away():
  plane = np.random.default_rng(0).uniform(size=(1500, 2)).astype(np.float32)
  x = plane @ _normal(2, 10) + 100
  for estimate in (metrics.lid_moments, metrics.lid_mle):
    lid = estimate(x, x, k=32)
    np.testing.assert_allclose(jnp.median(lid), 2.0, rtol=0.15)


def test_a_batch_too_small_for_a_local_dimension_is_refused():
  with pytest.raises(ValueError, match="3 rows leave k=1"):
    metrics.lid_moments(_normal(3, 2), _normal(3, 2), k=5)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_nearest_neighbours_vote_as_in_scikit_learn(labelled, k):
  x, y, x_test, _ = labelled
  classifier = sklearn.neighbors.KNeighborsClassifier(
    n_neighbors=k,
    metric="cosine",
    weights=lambda distance: np.exp((1 - distance) / 0.1),
  ).fit(x, y)
  predictions = metrics.knn_predict(
    x, y, x_test, k=k, num_classes=NUM_CLASSES, temperature=0.1
  )
  np.testing.assert_array_equal(predictions, classifier.predict(x_test))


def test_more_neighbours_than_clips_are_refused(labelled):
  x, y, x_test, _ = labelled
  with pytest.raises(ValueError, match=r"k 101 .* 100 training clips"):
    metrics.knn_predict(
      x, y, x_test, k=101, num_classes=NUM_CLASSES, temperature=0.1
    )


@pytest.mark.parametrize("class_balanced", [False, True])
def test_the_ridge_probe_equals_scikit_learn(labelled, class_balanced):
  x, y, x_test, _ = labelled
  scaler = sklearn.preprocessing.StandardScaler().fit(x)
  weights = len(y) / (len(np.unique(y)) * np.bincount(y)[y])
  ridge = sklearn.linear_model.Ridge(alpha=2.0).fit(
    scaler.transform(x),
    np.eye(NUM_CLASSES)[y],
    sample_weight=weights if class_balanced else None,
  )
  scores = metrics.ridge_probe(
    x,
    y,
    x_test,
    num_classes=NUM_CLASSES,
    l2=2.0,
    class_balanced=class_balanced,
  )
  expected = ridge.predict(scaler.transform(x_test))
  np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_the_ridge_probe_survives_a_constant_feature_and_a_missing_class(
  labelled,
):
  x, y, x_test, _ = labelled
  kwargs = {"l2": 1.0, "class_balanced": True}
  expected = metrics.ridge_probe(
    x, y, x_test, num_classes=NUM_CLASSES, **kwargs
  )
  x, x_test = (
    np.pad(a, ((0, 0), (0, 1)), constant_values=0.1) for a in (x, x_test)
  )
  scores = metrics.ridge_probe(
    x, y, x_test, num_classes=NUM_CLASSES + 1, **kwargs
  )
  np.testing.assert_allclose(scores[:, :-1], expected, atol=1e-4)
  np.testing.assert_allclose(scores[:, -1], 0, atol=1e-6)


def test_a_ridge_probe_without_penalty_is_refused(labelled):
  x, y, x_test, _ = labelled
  with pytest.raises(ValueError, match=r"l2 0\.0 must be positive"):
    metrics.ridge_probe(
      x, y, x_test, num_classes=NUM_CLASSES, l2=0.0, class_balanced=False
    )


def test_top_1_and_top_5_accuracy_equal_the_reference(golden):
  z = golden("metrics.npz")
  logits, labels = z["single_label/logits"], z["single_label/targets"]
  for k, name in ((1, "top1"), (5, "top5")):
    np.testing.assert_allclose(
      metrics.top_k_accuracy(logits, labels, k=k),
      z[f"single_label/{name}"],
      rtol=1e-6,
    )
  np.testing.assert_allclose(
    metrics.accuracy(logits.argmax(axis=1), labels),
    z["single_label/acc"],
    rtol=1e-6,
  )


def test_balanced_accuracy_equals_scikit_learn_and_skips_absent_classes():
  rng = np.random.default_rng(0)
  labels = rng.choice([0, 1, 3], p=[0.7, 0.2, 0.1], size=80)
  predictions = np.where(rng.uniform(size=80) < 0.6, labels, 1)
  expected = sklearn.metrics.balanced_accuracy_score(labels, predictions)
  result = metrics.balanced_accuracy(
    predictions, labels, num_classes=NUM_CLASSES
  )
  np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_metrics_give_the_same_numbers_when_compiled(labelled):
  x, y, x_test, y_test = labelled

  def all_of_them(x, y, x_test, y_test):
    predictions = metrics.knn_predict(
      x, y, x_test, k=5, num_classes=NUM_CLASSES, temperature=0.1
    )
    scores = metrics.ridge_probe(
      x, y, x_test, num_classes=NUM_CLASSES, l2=1.0, class_balanced=True
    )
    return {
      "effective_rank": metrics.effective_rank(x),
      "uniformity": metrics.uniformity(x),
      "lid_moments": metrics.lid_moments(x, x, k=10),
      "knn": metrics.accuracy(predictions, y_test),
      "balanced": metrics.balanced_accuracy(
        predictions, y_test, num_classes=NUM_CLASSES
      ),
      "ridge": scores,
    }

  eager = all_of_them(x, y, x_test, y_test)
  compiled = jax.jit(all_of_them)(x, y, x_test, y_test)
  for name, value in eager.items():
    np.testing.assert_allclose(
      compiled[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
