"""Schedules, parameter groups and AdamW steps against the reference."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import TINY_VIT

from audiomosaic_jax import optimizer
from audiomosaic_jax.models import audiomosaic

DEPTH = 12
RUNS = ("pretrain", "finetune_as20k")

# Reference name (of block i: "blocks.i." + name) -> our path and the shape of
# a small stand-in with the right number of axes.
_LINEAR = {"weight": ("kernel", (2, 3)), "bias": ("bias", (3,))}
_NORM = {"weight": ("scale", (3,)), "bias": ("bias", (3,))}
_OUTSIDE_BLOCKS = {
  "cls_token": ("encoder/cls_token", (1, 1, 3)),
  "pos_embed": ("encoder/pos_embed", (1, 5, 3)),
} | {
  f"{theirs}.{name}": (f"{ours}/{leaf}", shape)
  for theirs, ours, leaves in (
    ("patch_embed.proj", "encoder/patch_embed/proj", _LINEAR),
    ("patch_embed.norm", "encoder/patch_embed/norm", _NORM),
    ("norm_pre", "encoder/norm_pre", _NORM),
    ("fc_norm", "fc_norm", _NORM),
    ("projector.0", "projector/dense_0", {"weight": _LINEAR["weight"]}),
    ("projector.1", "projector/norm_0", _NORM),
    ("projector.3", "projector/dense_1", {"weight": _LINEAR["weight"]}),
    ("projector.4", "projector/norm_1", _NORM),
    ("head", "head", _LINEAR),
  )
  for name, (leaf, shape) in leaves.items()
}
_INSIDE_BLOCKS = {
  f"{layer}.{name}": (
    f"encoder/blocks/{layer.replace('.', '/')}/{leaf}",
    (DEPTH, *shape),
  )
  for layer, leaves in (
    ("norm1", _NORM),
    ("attn.qkv", _LINEAR),
    ("attn.proj", _LINEAR),
    ("norm2", _NORM),
    ("mlp.fc1", _LINEAR),
    ("mlp.fc2", _LINEAR),
  )
  for name, (leaf, shape) in leaves.items()
}


def _tree(flat):
  """{"a/b": leaf} as nested dicts."""
  tree = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = functools.reduce(lambda n, key: n.setdefault(key, {}), parents, tree)
    node[name] = leaf
  return tree


def _flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _params(reference_names, seed=0):
  """Random parameters with the paths of the named reference tensors."""
  rng = np.random.default_rng(seed)
  table = dict(map(_our_path, reference_names))
  return _tree(
    {
      path: jnp.asarray(rng.standard_normal(shape), jnp.float32)
      for path, shape in table.items()
    }
  )


def _our_path(reference_name):
  if reference_name.startswith("blocks."):
    return _INSIDE_BLOCKS[reference_name.split(".", 2)[2]]
  return _OUTSIDE_BLOCKS[reference_name]


def _block_index(reference_name):
  parts = reference_name.split(".")
  return int(parts[1]) if parts[0] == "blocks" else None


@pytest.fixture(scope="module")
def groups():
  path = pathlib.Path(__file__).parent / "golden/optim_param_groups.json"
  return json.loads(path.read_text())


def _adamw(params, **changes):
  kwargs = {
    "schedule": lambda step: jnp.float32(1e-2),
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.05,
    "layer_decay": 1.0,
    "frozen": (),
    "grad_clip_norm": None,
  }
  return optimizer.make_optimizer(params, **kwargs | changes)


def _schedule(name="cosine", **changes):
  kwargs = {
    "base_lr": 1e-3,
    "min_lr": 1e-5,
    "warmup_steps": 10,
    "total_steps": 100,
    "milestones": (0.65, 0.85),
    "milestone_factor": 0.1,
  }
  return optimizer.make_schedule(name=name, **kwargs | changes)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
  ("theirs", "ours"),
  [
    ("cosine", "cosine"),
    ("None", "cosine"),
    ("linear", "linear"),
    ("polynomial", "polynomial"),
    ("milestone", "milestones"),
  ],
)
def test_schedules_equal_the_reference_at_every_stored_step(
  golden, run, theirs, ours
):
  z = golden("optim.npz")
  schedule = _schedule(
    ours,
    base_lr=float(z[f"{run}/base_lr"]),
    min_lr=float(z[f"{run}/min_lr"]),
    warmup_steps=int(z[f"{run}/warmup_steps"]),
    total_steps=int(z[f"{run}/total_steps"]),
  )
  steps = jnp.asarray(z[f"{run}/steps"], jnp.int32)
  rates = jax.jit(jax.vmap(schedule))(steps)
  assert rates[0] == 0.0
  np.testing.assert_allclose(rates, z[f"{run}/lr_{theirs}"], rtol=1e-6)
  np.testing.assert_allclose(
    rates * 0.37, z[f"{run}/lr_{theirs}_scaled0.37"], rtol=1e-6
  )


def test_a_run_without_warm_up_starts_at_the_full_rate(golden):
  expected = golden("optim.npz")["nowarmup/lr_cosine"]
  schedule = _schedule(
    min_lr=1e-6, warmup_steps=0, total_steps=len(expected) - 1
  )
  rates = [float(schedule(step)) for step in range(len(expected))]
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_every_schedule_warms_up_from_zero_and_stays_at_its_end(name):
  schedule = _schedule(name)
  assert schedule(0) == 0.0
  np.testing.assert_allclose(schedule(5), 5e-4, rtol=1e-6)
  np.testing.assert_allclose(schedule(10), 1e-3, rtol=1e-6)
  np.testing.assert_array_equal(schedule(1000), schedule(100))
  rates = jax.vmap(schedule)(jnp.arange(10, 101))
  assert jnp.all(jnp.diff(rates) <= 0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "cosin"}, "unknown schedule 'cosin'"),
    ({"warmup_steps": 100}, "warmup_steps 100 must .* total_steps 100"),
    ({"name": "milestones", "milestones": None}, "milestones=None"),
  ],
)
def test_a_schedule_that_cannot_work_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _schedule(**changes)


@pytest.mark.parametrize("config", ["pretrain", "finetune_as20k"])
def test_weight_decay_touches_the_same_tensors_as_the_reference(groups, config):
  expected = groups[config]
  mask = _flat(optimizer.decay_mask(_params(expected["params"])))
  for name, group in expected["params"].items():
    decay = expected["yaml_weight_decay"] * mask[_our_path(name)[0]]
    assert decay == group["weight_decay"], name


def test_the_reference_names_above_are_all_parameters_of_the_model(groups):
  encoder = TINY_VIT | {
    "patch_size": 4,
    "width": 8,
    "depth": DEPTH,
    "num_heads": 2,
  }
  model = audiomosaic.build(
    grid=(2, 2),
    encoder=encoder,
    projector={"hidden_features": 8, "out_features": 4},
    pooling="mean",
    use_fc_norm=True,
    temperature=0.1,
    logit_bias=0.0,
    learnable_temperature=False,
    learnable_bias=False,
    num_online_classes=0,
  )
  variables = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jnp.zeros((2, 8, 8)),
    None,
  )
  names = groups["pretrain"]["params"].keys() | {"projector.4.bias"}
  ours, table = _flat(variables["params"]), _flat(_params(names))
  assert {k: len(v.shape) for k, v in ours.items()} == {
    k: v.ndim for k, v in table.items()
  }


def test_pretraining_decays_51_reference_tensors_and_spares_108(groups):
  names = groups["pretrain"]["params"]
  mask = _flat(optimizer.decay_mask(_params(names)))
  decayed = [mask[_our_path(name)[0]] for name in names]
  assert (sum(decayed), len(decayed) - sum(decayed)) == (51, 108)


def test_norms_and_scalars_are_spared_from_decay_under_any_name():
  shapes = {
    "encoder/blocks/attn/q_norm/scale": (DEPTH, 4),
    "encoder/blocks/attn/qkv/bias": (DEPTH, 3, 2, 4),
    "encoder/blocks/attn/qkv/kernel": (DEPTH, 8, 3, 2, 4),
    "logit_scale": (),
  }
  shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  decayed = _flat(optimizer.decay_mask(_tree(shapes)))
  assert [path for path, on in decayed.items() if on] == [
    "encoder/blocks/attn/qkv/kernel"
  ]


@pytest.mark.parametrize(
  "config", ["finetune_as20k", "finetune_envsdd_ata_aasist"]
)
def test_layer_rates_equal_the_reference(groups, config):
  names = {
    name: group
    for name, group in groups[config]["params"].items()
    if name in _OUTSIDE_BLOCKS or name.startswith("blocks.")
  }
  scales = _flat(
    optimizer.layer_scales(
      _params(names), depth=DEPTH, decay=groups[config]["layer_decay"]
    )
  )
  assert len(names) > 140
  for name, group in names.items():
    scale = scales[_our_path(name)[0]]
    block = _block_index(name)
    ours = scale if block is None else np.ravel(scale)[block]
    np.testing.assert_allclose(ours, group["lr_scale"], rtol=1e-6)


def test_a_stack_of_another_depth_is_refused(groups):
  params = _params(groups["finetune_as20k"]["params"])
  with pytest.raises(ValueError, match="stacks 12 blocks, but depth is 6"):
    optimizer.layer_scales(params, depth=6, decay=0.75)


def _torch_adamw(params, grads, *, lr, b1, b2, eps, decays, scales, steps):
  """torch.optim.AdamW's update rule in float64, one flat dict per step."""
  params = {k: np.float64(v) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(value) for k, value in params.items()}
  for t in range(1, steps + 1):
    for k in params:
      g, rate = np.float64(grads[t - 1][k]), lr(t - 1) * scales[k]
      params[k] = params[k] * (1 - rate * decays[k])
      m[k] = b1 * m[k] + (1 - b1) * g
      v[k] = b2 * v[k] + (1 - b2) * g**2
      denominator = np.sqrt(v[k]) / np.sqrt(1 - b2**t) + eps
      params[k] = params[k] - rate / (1 - b1**t) * m[k] / denominator
  return params


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_five_steps_equal_torch_adamw_with_decay_and_layer_rates(
  groups, layer_decay
):
  names = groups["finetune_as20k"]["params"]
  params = _params(names)
  grads = [_params(names, seed=step + 1) for step in range(5)]
  schedule = _schedule(base_lr=1e-2, warmup_steps=2, total_steps=6)
  tx = _adamw(params, schedule=schedule, layer_decay=layer_decay)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  trained, state = params, tx.init(params)
  for grad in grads:
    trained, state = step(trained, state, grad)
  expected = _torch_adamw(
    _flat(params),
    [_flat(grad) for grad in grads],
    lr=lambda t: float(schedule(t)),
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    decays={
      path: 0.05 * on
      for path, on in _flat(optimizer.decay_mask(params)).items()
    },
    scales=_flat(
      optimizer.layer_scales(params, depth=DEPTH, decay=layer_decay)
    ),
    steps=5,
  )
  for path, value in _flat(trained).items():
    np.testing.assert_allclose(
      value, expected[path], rtol=2e-7, atol=2e-7, err_msg=path
    )


def test_the_first_step_of_a_warm_up_changes_nothing():
  params = {"dense": {"kernel": jnp.ones((2, 2))}}
  tx = _adamw(params, schedule=_schedule())
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(updates["dense"]["kernel"], 0.0)


@pytest.mark.parametrize(
  ("config", "frozen"),
  [
    ("pretrain", ("projector/norm_1/bias",)),
    ("linear_prob_as20k", ("encoder/.*",)),
  ],
)
def test_a_frozen_parameter_has_no_state_and_never_moves(
  groups, config, frozen
):
  missing = groups[config]["not_in_optimizer"]
  params = _params([*groups[config]["params"], *missing])
  tx = _adamw(params, frozen=frozen, layer_decay=0.65)
  state = tx.init(params)
  frozen_paths = {_our_path(name)[0] for name in missing}
  in_state = [path for path in _flat(state) if "/mu/" in path]
  assert len(in_state) == len(_flat(params)) - len(frozen_paths)
  assert not any(path.endswith(tuple(frozen_paths)) for path in in_state)
  # Even a gradient that is not zero must not move it.
  updates, state = jax.jit(tx.update)(params, state, params)
  for path, update in _flat(updates).items():
    assert (path in frozen_paths) == (not jnp.any(update)), path


def test_frozen_gradients_do_not_count_towards_the_clipped_norm():
  params = {"a": jnp.ones(3), "b": jnp.ones(3)}
  grads = {"a": jnp.array([0.3, 0.0, 0.4]), "b": jnp.full(3, 1e6)}
  # With eps far above the gradients Adam is linear in them.
  kwargs = {"eps": 1e6, "frozen": ("b",)}
  free = _adamw(params, **kwargs)
  clipped = _adamw(params, grad_clip_norm=0.25, **kwargs)
  update, _ = free.update(grads, free.init(params), params)
  half, _ = clipped.update(grads, clipped.init(params), params)
  np.testing.assert_allclose(half["a"], update["a"] / 2, rtol=1e-5)


def test_patterns_that_freeze_nothing_or_everything_are_refused():
  params = {"head": {"kernel": jnp.ones((2, 2))}}
  with pytest.raises(ValueError, match=r"'heads/.*' matches no parameter"):
    _adamw(params, frozen=("heads/.*",))
  with pytest.raises(ValueError, match="match all 1 parameters"):
    _adamw(params, frozen=(".*",))


def test_layer_decay_without_stacked_blocks_is_refused():
  params = {"head": {"kernel": jnp.ones((2, 2))}}
  with pytest.raises(ValueError, match="layer_decay needs one stack"):
    _adamw(params, layer_decay=0.65)


def test_the_state_holds_arrays_only_and_keeps_its_structure(groups):
  params = _params(groups["pretrain"]["params"])
  tx = _adamw(params, layer_decay=0.65, grad_clip_norm=1.0)
  state = tx.init(params)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  _, after = tx.update(params, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
    lambda a: (a.shape, a.dtype), state
  )
