import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_vit import (
  FBANK,
  KEEP_IDS,
  lively,
  loss,
  loss_and_grads,
  small,
)

from audiomosaic_jax import masking, torch_params
from audiomosaic_jax.models import vit
from configs import common

ENCODERS = ("encoder_a", "encoder_b", "encoder_c", "encoder_d")
# The reference's own rounding is 1e-6 to 3e-6; wrong GELU or eps gives 8e-5.
ATOL = 2e-5

encode = jax.jit(
  lambda model, variables, fbank, keep_ids: model.apply(
    variables, fbank, keep_ids, train=False
  ),
  static_argnums=0,
)


def load_golden_encoder(z):
  config = json.loads(str(z["cfg_json"]))
  model = small(
    grid=tuple(config["true_grid_time_freq"]),
    width=config["embed_dim"],
    depth=config["depth"],
    num_heads=config["num_heads"],
    mlp_ratio=config.get("mlp_ratio", 4.0),
    norm={"rmsnorm": "rmsnorm"}.get(config.get("norm_layer_type"), "layernorm"),
    activation=config.get("act_type", "gelu"),
    qk_norm=config.get("qk_norm", False),
    qkv_bias=config.get("qkv_bias", True),
    proj_bias=config["proj_bias"],
    pos_layout="released",
  )
  fbank = jnp.asarray(z["x"][:, 0])
  shapes = jax.eval_shape(
    lambda key: model.init(key, fbank, None, train=False), jax.random.key(0)
  )
  state = {
    k.removeprefix("param/"): z[k] for k in z.files if k.startswith("param/")
  }
  variables, ignored = torch_params.from_torch(
    state, {"params": {"encoder": shapes["params"]}}, ignore=()
  )
  assert set(ignored) == {"head.weight", "head.bias"}
  return model, {"params": variables["params"]["encoder"]}, fbank


def run_with_stages(model, variables, fbank, keep_ids):
  """Returns output, block outputs, patch embedding and pre-norm output."""

  @jax.jit
  def forward(variables, fbank, keep_ids):
    return model.apply(
      variables,
      fbank,
      keep_ids,
      train=False,
      return_layers=True,
      capture_intermediates=lambda m, _: m.name in ("patch_embed", "norm_pre"),
    )

  (out, layers), extra = forward(variables, fbank, keep_ids)
  stages = extra["intermediates"]
  patch, pre = (stages[n]["__call__"][0] for n in ("patch_embed", "norm_pre"))
  return out, layers, patch, pre


@pytest.mark.parametrize("name", ENCODERS)
def test_unmasked_encoder_equals_the_reference_block_by_block(golden, name):
  z = golden(f"{name}.npz")
  model, variables, fbank = load_golden_encoder(z)
  out, layers, patch, pre = run_with_stages(model, variables, fbank, None)
  np.testing.assert_allclose(patch, z["eval/patch"], atol=ATOL, rtol=0)
  np.testing.assert_allclose(pre, z["eval/pre"], atol=ATOL, rtol=0)
  for i, layer in enumerate(layers):
    np.testing.assert_allclose(layer, z[f"eval/block{i}"], atol=ATOL, rtol=0)
  np.testing.assert_allclose(out, z["eval/out"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("mode", ["time", "freq", "random"])
def test_masked_encoder_equals_the_reference_block_by_block(golden, name, mode):
  z = golden(f"{name}.npz")
  model, variables, fbank = load_golden_encoder(z)
  keep_ids = jnp.asarray(z[f"{mode}/ids_keep"])
  out, layers, _, pre = run_with_stages(model, variables, fbank, keep_ids)
  np.testing.assert_allclose(pre, z[f"{mode}/blocks_in"], atol=ATOL, rtol=0)
  assert len(layers) == model.depth
  for i, layer in enumerate(layers):
    np.testing.assert_allclose(layer, z[f"{mode}/block{i}"], atol=ATOL, rtol=0)
  np.testing.assert_allclose(out, z[f"{mode}/out"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
  ("layout", "table"), [("paper", (64, 8)), ("released", (8, 64))]
)
def test_positions_start_at_the_table_of_their_layout(golden, layout, table):
  model = small(grid=(64, 8), width=48, depth=1, pos_layout=layout)
  params = model.init(
    jax.random.key(0), jnp.zeros((1, 1024, 128)), None, train=False
  )["params"]
  expected = golden("posembed.npz")[f"sincos/h{table[0]}_w{table[1]}_d48"]
  table = params["pos_embed"][0]
  np.testing.assert_allclose(table, expected, rtol=0, atol=4e-6)


def test_patches_flatten_as_a_convolution_kernel_does():
  kernel = np.random.default_rng(2).normal(size=(5, 1, 16, 16))
  convolved = jax.lax.conv_general_dilated(
    FBANK[:, None], jnp.float32(kernel), (16, 16), "VALID"
  )
  patches = vit.patchify(jnp.asarray(FBANK), 16)
  np.testing.assert_allclose(
    patches @ kernel.reshape(5, -1).T.astype(np.float32),
    convolved.reshape(8, 5, -1).transpose(0, 2, 1),
    atol=1e-4,
  )


def test_initial_weights_have_the_spread_of_the_published_ones():
  model = small(width=192, depth=2, grid=(4, 2))
  params = model.init(jax.random.key(0), FBANK, None, train=False)["params"]
  kernel = params["blocks"]["mlp"]["fc1"]["kernel"]
  assert float(kernel.std()) == pytest.approx(0.02, rel=0.02)
  assert float(abs(kernel).max()) > 0.06, "not truncated at two deviations"
  assert not bool((kernel[0] == kernel[1]).any()), "blocks differ"
  assert float(params["cls_token"].std()) == pytest.approx(1e-6, rel=0.2)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if jax.tree_util.keystr(path).endswith("'bias']"):
      assert not bool(leaf.any())


def test_all_ids_in_order_equal_no_ids():
  model = small()
  variables = lively(model)
  ids = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (8, 8))
  np.testing.assert_allclose(
    encode(model, variables, FBANK, ids),
    encode(model, variables, FBANK, None),
    atol=1e-6,
  )


def test_removed_tokens_cannot_be_seen():
  model = small()
  variables = lively(model)
  changed = np.array(FBANK)
  changed[:, 16:32, :16] = 7.0  # token 2 of the 4 x 2 grid
  changed[:, 48:, 16:] = -7.0  # token 7
  np.testing.assert_array_equal(
    encode(model, variables, FBANK, KEEP_IDS),
    encode(model, variables, jnp.asarray(changed), KEEP_IDS),
  )


def test_order_of_ids_only_permutes_tokens():
  model = small()
  variables = lively(model)
  order = np.array([2, 0, 1])
  out = encode(model, variables, FBANK, KEEP_IDS)
  permuted = encode(model, variables, FBANK, KEEP_IDS[:, order])
  np.testing.assert_allclose(permuted[:, 0], out[:, 0], atol=1e-5)
  np.testing.assert_allclose(permuted[:, 1:], out[:, 1:][:, order], atol=1e-5)


def test_jitted_encoder_equals_the_plain_one():
  model = small()
  variables = lively(model)
  np.testing.assert_allclose(
    model.apply(variables, FBANK[:2], KEEP_IDS[:2], train=False),
    encode(model, variables, FBANK[:2], KEEP_IDS[:2]),
    atol=2e-5,
  )


def test_layers_are_the_block_outputs_and_the_last_feeds_the_norm():
  model = small(final_norm=False)
  variables = lively(model)
  out, layers = model.apply(
    variables, FBANK, KEEP_IDS, train=False, return_layers=True
  )
  assert layers.shape == (3, 8, 4, 32)
  np.testing.assert_array_equal(layers[-1], out)
  assert "norm" not in variables["params"]


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters():
  model = small(dtype="bfloat16")
  variables = lively(model)
  out = encode(model, variables, FBANK, KEEP_IDS)
  expected = encode(small(), variables, FBANK, KEEP_IDS)
  assert out.dtype == jnp.bfloat16
  assert {x.dtype.name for x in jax.tree.leaves(variables)} == {"float32"}
  cosine = jnp.sum(out.astype(jnp.float32) * expected) / (
    jnp.linalg.norm(out.astype(jnp.float32)) * jnp.linalg.norm(expected)
  )
  assert float(cosine) > 0.999


def test_drop_path_rises_with_depth_and_is_off_in_evaluation():
  model = small(drop_path=0.6)
  variables = lively(model)

  def layers(key):
    return model.apply(
      variables,
      FBANK[:1],
      None,
      train=True,
      return_layers=True,
      rngs={"drop_path": key},
    )[1][:, 0]

  drawn = jax.jit(jax.vmap(layers))(jax.random.split(jax.random.key(0), 512))
  _, clean = model.apply(
    variables, FBANK[:1], None, train=False, return_layers=True
  )
  first, second, third = (drawn[:, i] for i in range(3))
  # Block rates are 0, 0.3, 0.6; a block with both branches dropped is the
  # identity.
  np.testing.assert_allclose(first, jnp.tile(clean[0], (512, 1, 1)), atol=1e-5)
  for before, after, rate in ((first, second, 0.3), (second, third, 0.6)):
    dropped = float((before == after).all((1, 2)).mean())
    assert dropped == pytest.approx(rate**2, abs=0.06)


def test_drop_path_keeps_the_expected_output_of_a_branch():
  model = small(drop_path=0.5, depth=2)
  variables = lively(model)
  # With a silent MLP the second block adds its attention branch or nothing.
  fc2 = variables["params"]["blocks"]["mlp"]["fc2"]
  variables["params"]["blocks"]["mlp"]["fc2"] = jax.tree.map(
    jnp.zeros_like, fc2
  )

  def added(**how):
    _, layers = model.apply(variables, FBANK, None, return_layers=True, **how)
    return layers[1] - layers[0]

  branch = added(train=False)
  drawn = added(train=True, rngs={"drop_path": jax.random.key(3)})
  kept = np.abs(drawn).max((1, 2)) > 0
  assert 0 < kept.sum() < 8
  np.testing.assert_allclose(drawn[kept], 2 * branch[kept], atol=1e-4)


def test_fixed_positions_get_no_gradient():
  for kind, moves in (("fixed", False), ("learnable", True)):
    model = small(pos_embed=kind)
    grads = loss_and_grads(model, lively(model), FBANK, KEEP_IDS)[1]
    assert bool(grads["params"]["pos_embed"].any()) == moves


def test_without_class_token_every_token_is_a_patch():
  model = small(class_token=False)
  variables = lively(model)
  assert encode(model, variables, FBANK, KEEP_IDS).shape == (
    8,
    3,
    32,
  )
  assert variables["params"]["pos_embed"].shape == (1, 8, 32)
  assert "cls_token" not in variables["params"]


@pytest.mark.parametrize("name", common.VIT_SIZES)
@pytest.mark.parametrize("class_token", [True, False])
def test_parameter_counts_follow_from_the_equations(name, class_token):
  model = small(
    grid=(64, 8),
    mlp_ratio=4.0,
    class_token=class_token,
    **common.VIT_SIZES[name],
  )
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 1024, 128)), None, train=False),
    jax.random.key(0),
  )
  d, depth = model.width, model.depth
  affine_norm = 2 * d
  patch_embed = 16 * 16 * d + d + affine_norm
  positions = (512 + class_token) * d + class_token * d
  attention = d * 3 * d + 3 * d + d * d + d
  mlp = d * 4 * d + 4 * d + 4 * d * d + d
  blocks = depth * (2 * affine_norm + attention + mlp)
  expected = patch_embed + positions + blocks + 2 * affine_norm
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected
  assert model.width % model.num_heads == 0


def test_eight_devices_equal_one_without_moving_tokens():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  model = small(remat="dots")
  variables = lively(model)
  step = jax.jit(
    jax.value_and_grad(lambda v, x, ids: loss(model, v, x, ids)),
    in_shardings=(whole, split, split),
    out_shardings=whole,
  )
  expected = loss_and_grads(model, variables, FBANK, KEEP_IDS)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=2e-5),
    step(variables, FBANK, KEEP_IDS),
    expected,
  )
  program = step.lower(variables, FBANK, KEEP_IDS).compile().as_text()
  for collective in ("all-to-all", "all-gather", "collective-permute"):
    assert f" {collective}(" not in program


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"grid": (8, 2)}, r"\(64, 32\).*grid \(8, 2\).*\(128, 32\)"),
    ({"pos_layout": "true"}, "pos_layout 'true' is unknown.*'paper'"),
    ({"pos_embed": "rope"}, "pos_embed 'rope' is unknown.*'learnable'"),
    ({"width": 34, "num_heads": 2}, "divisible by 4, got 34; use 32 or 36"),
    ({"num_heads": 5}, "width 32 is not divisible by num_heads 5"),
    ({"norm": "batchnorm"}, "norm 'batchnorm' is unknown.*'rmsnorm'"),
    ({"activation": "relu"}, "activation 'relu' is unknown.*'silu'"),
    ({"attention": "flash"}, "attention 'flash' is unknown.*'auto'"),
    ({"remat": "all"}, "remat 'all' is unknown.*'dots'"),
  ],
)
def test_errors_name_both_values_and_the_fix(changes, message):
  with pytest.raises(ValueError, match=message):
    small(**changes).init(jax.random.key(0), FBANK, None, train=False)


def test_masks_of_the_masking_module_fit_the_encoder():
  model = small()
  ids = masking.keep_ids(
    jax.random.key(0), 8, mode="time", ratio=0.5, grid=(4, 2), layout="paper"
  )
  out = encode(model, lively(model), FBANK, ids)
  assert out.shape == (8, 1 + 2 * 2, 32)
