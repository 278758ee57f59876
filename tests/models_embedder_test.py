"""What is embedded downstream is what was trained, and padding is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import TINY_VIT

from audiomosaic_jax.models import audiomosaic, embedder, heads, vit

GRID, FRAMES, BINS = (4, 2), 64, 32
PROJECTOR = {"hidden_features": 24, "out_features": 12}


def build(*, pooling="mean", num_classes=0, projector=True, **encoder):
  return embedder.Embedder(
    encoder=vit.ViT(grid=GRID, **(TINY_VIT | encoder)),
    projector=heads.Projector(**PROJECTOR) if projector else None,
    pooling=pooling,
    use_fc_norm=True,
    num_classes=num_classes,
  )


def scatter(variables, seed=0):
  """Redraws all parameters, so that none is at a telling initial value."""
  rng = np.random.default_rng(seed)
  redrawn = jax.tree.map(
    lambda x: x + jnp.float32(0.1 * rng.normal(size=x.shape)), variables
  )
  if "batch_stats" in redrawn:  # A variance is positive.
    redrawn["batch_stats"] = jax.tree.map(jnp.abs, redrawn["batch_stats"])
  return redrawn


def spectrograms(count=3, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.float32(rng.normal(size=(count, FRAMES, BINS)))


def run(model, variables, fbank, num_columns, *, columns=4, layers=True):
  return model.apply(
    variables,
    fbank,
    jnp.int32(num_columns),
    max_columns=columns,
    return_layers=layers,
  )


def init(model):
  fbank, counts = spectrograms(2), jnp.full(2, 4)
  return scatter(
    model.init(
      jax.random.key(0), fbank, counts, max_columns=4, return_layers=False
    )
  )


@pytest.mark.parametrize("pooling", ["mean", "cls", "mean_no_cls"])
def test_a_full_window_is_what_the_pretrained_model_says(pooling):
  model = build(pooling=pooling)
  variables, fbank = init(model), spectrograms()
  trained = audiomosaic.build(
    grid=GRID,
    encoder=TINY_VIT,
    projector=PROJECTOR,
    pooling=pooling,
    use_fc_norm=True,
    temperature=0.1,
    logit_bias=0.0,
    learnable_temperature=False,
    learnable_bias=False,
    num_online_classes=0,
  )
  out = run(model, variables, fbank, [4, 4, 4])
  embedding = trained.apply(variables, fbank, method="embed")
  z, _ = trained.apply(variables, fbank, None, train=False)
  np.testing.assert_allclose(out["embedding"], embedding, atol=2e-6)
  np.testing.assert_allclose(out["z"], z, atol=2e-5)


@pytest.mark.parametrize("pooling", ["mean", "fusion"])
def test_logits_are_those_of_the_classifier(pooling):
  model = build(pooling=pooling, num_classes=5, projector=False)
  variables, fbank = init(model), spectrograms()
  classifier = heads.build(
    head="linear",
    grid=GRID,
    encoder=TINY_VIT,
    num_classes=5,
    pooling=pooling,
    freeze_encoder=False,
  )
  out = run(model, variables, fbank, [4, 4, 4])
  expected = classifier.apply(variables, fbank, None, train=False)
  np.testing.assert_allclose(out["logits"], expected, atol=2e-5)
  assert "z" not in out


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "mean_no_cls", "cls", "fusion"])
def test_what_is_behind_the_last_column_changes_nothing(pooling, class_token):
  if not class_token and pooling != "mean":
    pytest.skip("needs the class token")
  model = build(pooling=pooling, class_token=class_token)
  variables, fbank = init(model), spectrograms()
  counts = np.array([1, 2, 3])
  out = run(model, variables, fbank, counts)
  noisy = np.array(fbank)
  for row, count in enumerate(counts):
    noisy[row, 16 * count :] = 50.0
  other = run(model, variables, jnp.asarray(noisy), counts)
  np.testing.assert_array_equal(out["embedding"], other["embedding"])
  np.testing.assert_array_equal(out["z"], other["z"])
  for row, count in enumerate(counts):
    for name in ("frames", "layers"):
      np.testing.assert_array_equal(
        out[name][row][..., :count, :], other[name][row][..., :count, :]
      )


def test_fewer_columns_computed_are_the_same_columns():
  model = build()
  variables, fbank = init(model), spectrograms()
  counts = [1, 2, 2]
  wide = run(model, variables, fbank, counts)
  narrow = run(model, variables, fbank, counts, columns=2)
  np.testing.assert_allclose(wide["embedding"], narrow["embedding"], atol=2e-6)
  assert narrow["frames"].shape == (3, 2, 32)
  assert narrow["layers"].shape == (3, 2, 2, 32)
  for row, count in enumerate(counts):
    np.testing.assert_allclose(
      wide["frames"][row, :count], narrow["frames"][row, :count], atol=2e-6
    )


def test_frames_are_the_normed_mean_over_the_bands_of_the_last_layer():
  model = build()
  variables = init(model)
  out = run(model, variables, spectrograms(), [4, 4, 4])
  norm = variables["params"]["fc_norm"]
  x = np.asarray(out["layers"][:, -1], np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1) + 1e-6)[..., None]
  expected = x * norm["scale"] + norm["bias"]
  np.testing.assert_allclose(out["frames"], expected, atol=5e-6)
