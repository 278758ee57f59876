import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_vit import TINY_VIT

from audiomosaic_jax import losses
from audiomosaic_jax.models import audiomosaic
from configs import common

ENCODER = TINY_VIT | {"drop_path": 0.1, "remat": "dots"}
SETTINGS = {
  "grid": (4, 2),
  "encoder": ENCODER,
  "projector": {"hidden_features": 24, "out_features": 16},
  "pooling": "mean",
  "use_fc_norm": True,
  "temperature": 0.1,
  "logit_bias": 0.0,
  "learnable_temperature": False,
  "learnable_bias": False,
  "num_online_classes": 0,
}
FULL_SIZE = {
  "grid": (64, 8),
  "encoder": {"mlp_ratio": 4.0, **common.VIT_SIZES["base"]},
  "projector": {"hidden_features": 512, "out_features": 128},
}
FBANK = jnp.asarray(
  np.random.default_rng(0).normal(size=(16, 64, 32)), jnp.float32
)
KEEP_TIME = jnp.tile(jnp.array([0, 1, 6, 7], jnp.int32), (16, 1))
KEEP_FREQ = jnp.tile(jnp.array([0, 2, 4, 6], jnp.int32), (16, 1))


def build(*, encoder=None, **changes):
  settings = SETTINGS | changes | {"encoder": ENCODER | (encoder or {})}
  return audiomosaic.build(**settings)


def init(model):
  return jax.jit(lambda key: model.init(key, FBANK[:2], None, train=False))(
    jax.random.key(0)
  )


def two_view_loss(model, variables, fbank, keep_time, keep_freq, key):
  """Loss and batch statistics after the first and then the second view."""
  z = []
  for ids in (keep_time, keep_freq):
    (projected, _), updated = model.apply(
      variables,
      fbank,
      ids,
      train=True,
      mutable=["batch_stats"],
      rngs={"drop_path": jax.random.fold_in(key, len(z))},
    )
    variables = variables | updated
    z.append(projected)
  loss, _ = losses.nt_xent(*z, logit_scale=10.0, logit_bias=0.0, negatives=None)
  return loss, updated["batch_stats"]


def test_full_size_model_has_the_published_number_of_parameters():
  model = build(**FULL_SIZE)
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 1024, 128)), None, train=False),
    jax.random.key(0),
  )
  count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  assert count == 86_111_232


def test_parameter_tree_has_the_documented_names():
  model = build(
    learnable_temperature=True, learnable_bias=True, num_online_classes=3
  )
  params = init(model)["params"]
  assert set(params) == {
    "encoder",
    "fc_norm",
    "projector",
    "online_classifier",
    "logit_scale",
    "logit_bias",
  }
  assert set(params["projector"]) == {"dense_0", "norm_0", "dense_1", "norm_1"}
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("learnable", [True, False])
def test_temperature_starts_where_the_settings_say(learnable):
  model = build(
    temperature=0.2,
    logit_bias=-3.0,
    learnable_temperature=learnable,
    learnable_bias=learnable,
  )
  variables = init(model)
  log_scale, bias = model.apply(variables, method="similarity")
  assert float(losses.inverse_temperature(log_scale)) == pytest.approx(5.0)
  assert float(bias) == -3.0
  assert ("logit_scale" in variables["params"]) == learnable


def test_poolings_are_what_their_names_say():
  tokens = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
  pooled = {name: f(tokens) for name, f in audiomosaic.POOLINGS.items()}
  np.testing.assert_array_equal(pooled["mean"][0], [4, 5, 6, 7])
  np.testing.assert_array_equal(pooled["mean_no_cls"][0], [6, 7, 8, 9])
  np.testing.assert_array_equal(pooled["cls"][0], [0, 1, 2, 3])
  np.testing.assert_array_equal(pooled["fusion"][0], [0, 1, 2, 3, 6, 7, 8, 9])


@pytest.mark.parametrize("pooling", audiomosaic.POOLINGS)
def test_embedding_is_the_normed_pooled_output_of_the_encoder(pooling):
  model = build(pooling=pooling)
  variables = init(model)
  embedding = model.apply(variables, FBANK, method="embed")
  _, pooled = model.apply(variables, FBANK, None, train=False)
  assert embedding.shape == (16, 64 if pooling == "fusion" else 32)
  # The scale is one and the bias zero at initialisation.
  centred = pooled - pooled.mean(-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
  np.testing.assert_allclose(
    embedding, centred / jnp.sqrt(variance + 1e-6), atol=2e-5
  )


def test_a_band_is_read_as_the_normed_mean_of_its_row_of_patches():
  model = build()
  variables = init(model)
  readouts = model.apply(variables, FBANK, method="readouts")
  embedding = model.apply(variables, FBANK, method="embed")
  np.testing.assert_allclose(readouts["mean"], embedding, atol=1e-6)
  tokens = model.apply(
    variables,
    FBANK,
    method=lambda m, x: m.encoder(x, None, train=False),
  )
  num_bands = model.encoder.grid[1]
  for band in range(num_bands):
    # Token n = t * bands + f, after the class token.
    row = np.asarray(tokens)[:, 1 + band :: num_bands].mean(axis=1)
    expected = (row - row.mean(1, keepdims=True)) / row.std(1, keepdims=True)
    got = readouts["bands"][:, band * 32 : (band + 1) * 32]
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_bfloat16_model_returns_float32_close_to_the_float32_model():
  variables = init(build())
  z, pooled = build(encoder={"dtype": "bfloat16"}).apply(
    variables, FBANK, None, train=False
  )
  expected, _ = build().apply(variables, FBANK, None, train=False)
  assert z.dtype == pooled.dtype == jnp.float32
  cosine = jnp.sum(z * expected, -1) / (
    jnp.linalg.norm(z, axis=-1) * jnp.linalg.norm(expected, axis=-1)
  )
  assert float(cosine.min()) > 0.995


def test_last_projector_bias_never_gets_a_gradient():
  model = build()
  variables = init(model)

  @jax.jit
  @jax.grad
  def grads(params):
    loss, _ = two_view_loss(
      model,
      variables | {"params": params},
      FBANK,
      KEEP_TIME,
      KEEP_FREQ,
      jax.random.key(1),
    )
    return loss

  projector = grads(variables["params"])["projector"]
  assert not projector["norm_1"]["bias"].any()
  assert projector["norm_1"]["scale"].any()
  assert projector["norm_0"]["bias"].any()


def test_eight_devices_equal_one_in_loss_gradients_and_statistics():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  model = build()
  variables = init(model)

  def step(params, stats, fbank, keep_time, keep_freq, key):
    return two_view_loss(
      model,
      {"params": params, "batch_stats": stats},
      fbank,
      keep_time,
      keep_freq,
      key,
    )

  step = jax.value_and_grad(step, has_aux=True)
  sharded = jax.jit(
    step,
    in_shardings=(whole, whole, split, split, split, whole),
    out_shardings=whole,
  )
  arguments = (
    variables["params"],
    variables["batch_stats"],
    FBANK,
    KEEP_TIME,
    KEEP_FREQ,
    jax.random.key(2),
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
    sharded(*arguments),
    jax.jit(step)(*arguments),
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pooling": "max"}, "pooling 'max' is unknown.*'mean_no_cls'"),
    (
      {"pooling": "cls", "encoder": {"class_token": False}},
      "'cls' needs class_token=True, got False; use pooling 'mean'",
    ),
  ],
)
def test_errors_name_both_values_and_the_fix(changes, message):
  with pytest.raises(ValueError, match=message):
    init(build(**changes))
