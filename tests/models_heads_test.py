import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_vit import TINY_VIT

from audiomosaic_jax import masking, torch_params
from audiomosaic_jax.models import heads
from audiomosaic_jax.models.readout import POOLINGS

AASIST = {
  "width": 128,
  "filters": (32, 32, 64, 64, 64, 64),
  "graph_width": 64,
  "branch_width": 32,
  "pool_ratio": 0.5,
  "temperatures": (2.0, 2.0, 100.0),
  "input_dropout": 0.2,
  "pool_dropout": 0.3,
  "branch_dropout": 0.2,
  "readout_dropout": 0.5,
}
SETTINGS = {
  "linear": {"pooling": "mean"},
  "layer": {"pooling": "mean", "layer": 0},
  "weighted_sum": {"pooling": "mean", "parity": "paper"},
  "attentive": {"pooling": "mean", "parity": "paper", "num_queries": 2},
  "prototype": {"num_prototypes": 3},
  "aasist": AASIST
  | {"width": 12, "filters": (4, 8), "graph_width": 8, "branch_width": 4},
}
# Reference case -> head and the settings that its config does not hold.
CASES = {
  "classifier_avg": ("linear", {}),
  "classifier_cls": ("linear", {}),
  "classifier_big": ("linear", {}),
  "probe_layer": ("layer", {"layer": 0}),
  "probe_weighted_sum": ("weighted_sum", {"parity": "released"}),
  "probe_attentive1": ("attentive", {"parity": "released", "num_queries": 1}),
  "probe_attentiveN": ("attentive", {"parity": "released", "num_queries": 3}),
  "aasist": ("aasist", AASIST),
}
# Compiling takes these tests far longer than running.
QUICK = {"xla_backend_optimization_level": 0}
GRID = (4, 4)
FBANK = jnp.asarray(
  np.random.default_rng(0).normal(size=(8, 64, 64)), jnp.float32
)


def build(head, *, encoder=None, **changes):
  settings = {"grid": GRID, "num_classes": 5, "freeze_encoder": False}
  settings |= SETTINGS[head] | changes
  return heads.build(head=head, encoder=TINY_VIT | (encoder or {}), **settings)


def shapes_of(model, fbank):
  return jax.eval_shape(
    lambda key: model.init(key, fbank, None, train=False), jax.random.key(0)
  )


def init(model):
  start = jax.jit(
    lambda key: model.init(key, FBANK[:1], None, train=False),
    compiler_options=QUICK,
  )
  return start(jax.random.key(0))


def lively(model, fbank=FBANK):
  """Variables far from their initial values; variances stay positive."""
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape) * 0.3
    if path[-1].key == "var":
      values = np.exp(values)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model, fbank))


@jax.jit(static_argnums=0, compiler_options=QUICK)
def logits_of(model, variables, fbank, keep_ids=None):
  return model.apply(variables, fbank, keep_ids, train=False)


def state_of(z, case):
  start = f"{case}/param/"
  return {k.removeprefix(start): z[k] for k in z.files if k.startswith(start)}


def golden_model(z, case):
  """Returns (model, variables, input) of a stored case."""
  config = json.loads(str(z[f"{case}/cfg_json"]))
  head, extra = CASES[case]
  if "pooling" in config:
    extra = extra | {"pooling": config["pooling"].replace("avg", "mean")}
  model = heads.build(
    head=head,
    grid=masking.grid_shape(*config["spec_size"], 16),
    encoder=TINY_VIT
    | {
      "width": config["embed_dim"],
      "depth": config["depth"],
      "num_heads": config["num_heads"],
      "mlp_ratio": 4.0,
      "pos_layout": "released",
    },
    num_classes=config["num_classes"],
    freeze_encoder=False,
    **extra,
  )
  x = z[f"{case}/x"] if f"{case}/x" in z.files else z["x"]
  fbank = jnp.asarray(x[:, 0])
  ignore = torch_params.AASIST_UNUSED if head == "aasist" else ()
  variables, _ = torch_params.from_torch(
    state_of(z, case), shapes_of(model, fbank), ignore=ignore
  )
  return model, variables, fbank


def golden_keep_ids(z, run, ratio, grid):
  noise = tuple(jnp.asarray(z[f"{run}/noise_{axis}"]) for axis in "tf")
  return masking.keep_ids_from_noise(
    noise,
    len(noise[0]),
    mode="time_freq",
    ratio=ratio,
    grid=grid,
    layout="released",
  )


def tolerance(z, case):
  """Four times the rounding of the reference, and 1e-6 of the scale.

  Graphs multiply rounding by 30, and so by what order each sum is taken in:
  in float64 the logits of AASIST are within the reference's own 9e-6.
  """
  times = 8 if case == "aasist" else 4
  scale = np.abs(z[f"{case}/logits"]).max()
  return times * float(z[f"{case}/logits_f64absdiff"]) + 1e-6 * scale


def test_every_head_has_settings_here():
  assert set(SETTINGS) == set(heads.HEADS)


def test_every_stored_case_is_compared(golden):
  stored = {k.split("/")[0] for k in golden("heads.npz").files if "/" in k}
  assert stored - {"classifier_fusion"} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_reference(golden, case):
  z = golden("heads.npz")
  np.testing.assert_allclose(
    logits_of(*golden_model(z, case)),
    z[f"{case}/logits"],
    atol=tolerance(z, case),
    rtol=0,
  )


@pytest.mark.parametrize("case", ["classifier_avg", "classifier_big"])
def test_logits_of_masked_training_equal_those_of_the_reference(golden, case):
  z = golden("heads.npz")
  run = f"{case}/train_masked"
  model, variables, fbank = golden_model(z, case)
  ratio = tuple(float(z[f"{run}/mask_{axis}_prob"]) for axis in "tf")
  ids = golden_keep_ids(z, run, ratio, model.encoder.grid)

  @jax.jit
  def forward(variables, fbank, ids):
    return model.apply(
      variables,
      fbank,
      ids,
      train=True,
      capture_intermediates=lambda m, _: m.name == "norm_pre",
    )

  logits, extra = forward(variables, fbank, ids)
  (blocks_in,) = extra["intermediates"]["encoder"]["norm_pre"]["__call__"]
  np.testing.assert_allclose(
    blocks_in, z[f"{run}/blocks_in"], atol=2e-5, rtol=0
  )
  np.testing.assert_allclose(
    logits, z[f"{run}/logits"], atol=tolerance(z, case), rtol=0
  )


@pytest.mark.parametrize("head", heads.HEADS)
def test_an_example_alone_equals_itself_in_a_batch_over_devices(head):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  model = build(head)
  variables = lively(model)
  spread = jax.device_put(FBANK, NamedSharding(mesh, PartitionSpec("data")))
  together = logits_of(model, variables, spread)
  assert together.shape == (8, 5)
  alone = logits_of(model, variables, FBANK[3:4])
  np.testing.assert_allclose(together[3:4], alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("head", heads.HEADS)
def test_only_aasist_sees_the_order_of_tokens(head):
  model = build(head)
  variables = lively(model)
  ids = jnp.tile(jnp.arange(16, dtype=jnp.int32), (8, 1))
  expected = logits_of(model, variables, FBANK)
  ordered = logits_of(model, variables, FBANK, ids)
  shuffled = logits_of(model, variables, FBANK, (ids * 5 + 3) % 16)
  np.testing.assert_allclose(ordered, expected, atol=2e-5, rtol=2e-5)
  moved = np.abs(shuffled - expected).max()
  assert moved > 2e-4 if head == "aasist" else moved < 2e-5


@pytest.mark.parametrize("head", heads.HEADS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_gets_no_gradient_and_drops_no_path(head, frozen):
  model = build(head, encoder={"drop_path": 0.5}, freeze_encoder=frozen)
  variables = lively(model)

  @jax.jit(compiler_options=QUICK)
  def grads_and_passes(params, key):
    def loss(params):
      logits, updated = model.apply(
        variables | {"params": params},
        FBANK,
        None,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda m, _: m.name == "encoder",
        rngs={"drop_path": key, "dropout": jax.random.key(0)},
      )
      (tokens,) = updated["intermediates"]["encoder"]["__call__"]
      return jnp.sum(jnp.sin(logits)), tokens

    return jax.grad(loss, has_aux=True)(params)

  grads, first = grads_and_passes(variables["params"], jax.random.key(1))
  _, second = grads_and_passes(variables["params"], jax.random.key(2))
  trained = {
    name: any(float(jnp.abs(g).max()) > 1e-6 for g in jax.tree.leaves(module))
    for name, module in grads.items()
  }
  assert trained.pop("encoder") == (not frozen)
  assert all(trained.values()), trained
  if frozen:
    assert not any(bool(g.any()) for g in jax.tree.leaves(grads["encoder"]))
  same = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
  assert all(jax.tree.leaves(same)) == frozen


@pytest.mark.parametrize("head", heads.HEADS)
def test_bfloat16_encoders_get_float32_logits_close_to_those_of_float32(head):
  model = build(head)
  variables = lively(model)
  half = build(head, encoder={"dtype": "bfloat16"})
  logits = logits_of(half, variables, FBANK)
  expected = logits_of(model, variables, FBANK)
  assert logits.dtype == jnp.float32
  error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
  assert 0 < float(error) < 0.05


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_classifier_is_linear_in_the_normed_pooled_tokens(pooling):
  model = build("linear", pooling=pooling)
  variables = lively(model)
  params = variables["params"]
  tokens = model.encoder.apply(
    {"params": params["encoder"]}, FBANK, None, train=False
  )
  x = np.asarray(POOLINGS[pooling](tokens), np.float64)
  x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
  x = x * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
  assert x.shape[1] == (64 if pooling == "fusion" else 32)
  np.testing.assert_allclose(
    logits_of(model, variables, FBANK),
    x @ params["head"]["kernel"] + params["head"]["bias"],
    atol=2e-5,
  )


def test_the_head_starts_near_zero():
  params = init(build("linear", num_classes=527))["params"]
  assert float(params["head"]["kernel"].std()) == pytest.approx(
    2.5e-5, rel=0.03
  )
  assert not params["head"]["bias"].any()


@pytest.mark.parametrize(
  ("head", "changes", "message"),
  [
    ("linear", {"pooling": "max"}, "pooling 'max' is unknown.*'fusion'"),
    (
      "layer",
      {"pooling": "fusion", "encoder": {"class_token": False}},
      "'fusion' needs class_token=True, got False; use pooling 'mean'",
    ),
    ("layer", {"layer": 2}, "layer 2 is not a block.*depth 2; use 0 to 1"),
    ("layer", {"layer": -1}, "layer -1 is not a block.*use 0 to 1"),
    ("weighted_sum", {"parity": "both"}, "parity 'both' is unknown.*'paper'"),
    ("attentive", {"num_queries": 5}, "width 32 is not divisible.*5"),
    ("aasist", {"width": 2}, "width 2 and 17 tokens.*at least 3"),
  ],
)
def test_errors_name_both_values_and_the_fix(head, changes, message):
  with pytest.raises(ValueError, match=message):
    shapes_of(build(head, **changes), FBANK)


def test_an_unknown_head_is_refused_by_name():
  with pytest.raises(ValueError, match=r"head 'knn' is unknown.*'aasist'"):
    heads.build(head="knn", grid=GRID, encoder=TINY_VIT)
