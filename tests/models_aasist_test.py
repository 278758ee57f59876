import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_heads_test import (
  FBANK,
  QUICK,
  build,
  golden_keep_ids,
  golden_model,
  lively,
  logits_of,
  tolerance,
)

from audiomosaic_jax import torch_params
from audiomosaic_jax.models import aasist, graphs

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Our module, the stored output, and how far rounding gets: 2e-5 of its scale.
STAGES = {
  "reduce": ("LL", 1e-5),
  "norm_in": ("first_bn", 1e-5),
  "graph_spectral": ("gat_S", 5e-4),
  "graph_temporal": ("gat_T", 5e-4),
  "pool_spectral": ("pool_S", 5e-4),
  "pool_temporal": ("pool_T", 5e-4),
}


def test_every_stage_equals_the_reference(golden):
  z = golden("heads.npz")
  model, variables, fbank = golden_model(z, "aasist")
  wanted = functools.partial(
    model.apply,
    train=False,
    capture_intermediates=lambda m, _: m.name in STAGES and m.path[0] in STAGES,
  )
  _, extra = jax.jit(wanted, compiler_options=QUICK)(variables, fbank, None)
  assert set(extra["intermediates"]) == set(STAGES)
  for name, (stored, atol) in STAGES.items():
    (output,) = extra["intermediates"][name]["__call__"]
    expected = z[f"aasist/mid/{stored}"]
    if stored == "first_bn":
      expected = np.moveaxis(expected, 1, -1)
    np.testing.assert_allclose(output, expected, atol=atol, rtol=0)


def test_shuffled_ids_give_the_logits_of_published_training(golden):
  z = golden("heads.npz")
  model, variables, fbank = golden_model(z, "aasist")
  run = "aasist/train_shuffle"
  ids = golden_keep_ids(z, run, (0.0, 0.0), model.encoder.grid)
  shuffled = logits_of(model, variables, fbank, ids)
  np.testing.assert_allclose(
    shuffled, z[f"{run}/logits"], atol=tolerance(z, "aasist"), rtol=0
  )
  ordered = logits_of(model, variables, fbank)
  assert float(jnp.abs(shuffled - ordered).max()) > 1


def test_pooling_keeps_the_best_nodes_best_first():
  x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 9, 4)), jnp.float32)
  pool = graphs.GraphPool(ratio=0.5, dropout=0.3)
  variables = pool.init(jax.random.key(0), x, train=False)
  kernel, bias = (variables["params"]["proj"][k] for k in ("kernel", "bias"))
  scores = np.asarray(jax.nn.sigmoid(x @ kernel + bias))[..., 0]
  pooled = pool.apply(variables, x, train=False)
  assert pooled.shape == (3, 4, 4)
  for nodes, score, kept in zip(x, scores, pooled, strict=True):
    best = np.argsort(-score)[:4]
    np.testing.assert_allclose(
      kept, nodes[best] * score[best, None], rtol=1e-5, atol=1e-6
    )


def test_pooling_never_drops_the_last_node():
  pool = graphs.GraphPool(ratio=0.5, dropout=0.0)
  out, _ = pool.init_with_output(
    jax.random.key(0), jnp.ones((2, 1, 4)), train=False
  )
  assert out.shape == (2, 1, 4)


def test_a_graph_of_equal_nodes_stays_one_of_equal_nodes():
  graph = graphs.GraphAttention(width=6, temperature=2.0, dropout=0.0)
  x = jnp.tile(jnp.arange(4.0), (2, 5, 1))
  y, _ = graph.init_with_output(jax.random.key(0), x, train=False)
  assert bool(y.any())
  np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-6)


def test_attention_depends_on_the_kinds_of_both_nodes():
  rng = np.random.default_rng(3)
  temporal, spectral, master = (
    jnp.asarray(rng.normal(size=(2, n, 4)), jnp.float32) for n in (3, 5, 1)
  )
  layer = graphs.HeteroAttention(width=6, temperature=1.0, dropout=0.0)
  nodes = (temporal, spectral, master)
  variables = layer.init(jax.random.key(0), *nodes, train=False)
  apply = jax.jit(
    functools.partial(layer.apply, train=False), compiler_options=QUICK
  )
  before = apply(variables, *nodes)
  moved = {}
  for kind in ("temporal", "across", "spectral", "master"):
    name = f"att_weight_{kind}"
    params = variables["params"]
    changed = params | {name: params[name] + 1.0}
    after = layer.apply(variables | {"params": changed}, *nodes, train=False)
    moved[kind] = tuple(
      bool(jnp.abs(a - b).max() > 1e-5)
      for a, b in zip(after, before, strict=True)
    )
  assert moved == {
    "temporal": (True, False, False),
    "spectral": (False, True, False),
    "across": (True, True, False),
    "master": (False, False, True),
  }


@pytest.mark.parametrize(
  "rate", ["input_dropout", "pool_dropout", "branch_dropout", "readout_dropout"]
)
def test_every_dropout_acts_in_training(rate):
  rates = dict.fromkeys(
    ("input_dropout", "pool_dropout", "branch_dropout", "readout_dropout"), 0.0
  )
  model = build("aasist", **(rates | {rate: 0.5}))
  variables = lively(model)

  @jax.jit(compiler_options=QUICK)
  def train(key):
    logits, _ = model.apply(
      variables,
      FBANK[:2],
      None,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    return logits

  first, again, other = (train(jax.random.key(k)) for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert float(jnp.abs(first - other).max()) > 1e-3


def test_training_without_dropout_normalises_by_the_batch_and_records_it():
  model = build(
    "aasist",
    input_dropout=0.0,
    pool_dropout=0.0,
    branch_dropout=0.0,
    readout_dropout=0.0,
  )
  variables = lively(model)
  train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
  logits, updated = jax.jit(train, compiler_options=QUICK)(
    variables, FBANK, None
  )
  assert (
    float(jnp.abs(logits - logits_of(model, variables, FBANK)).max()) > 0.01
  )
  changed = jax.tree.map(
    lambda a, b: bool((a != b).all()),
    updated["batch_stats"],
    variables["batch_stats"],
  )
  assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize(
  ("path", "module", "inputs"),
  [
    ("residual_2", aasist.ResidualBlock(64), [(4, 4, 32)]),
    ("graph_temporal", graphs.GraphAttention(64, 2.0, 0.2), [(3, 64)]),
    (
      "branch_1/graph_0",
      graphs.HeteroAttention(32, 2.0, 0.2),
      [(3, 64), (2, 64), (1, 64)],
    ),
  ],
)
def test_initial_values_have_the_spread_of_the_published_ones(
  path, module, inputs
):
  published = json.loads((GOLDEN / "import_shapes.json").read_text())
  published = published["finetune_envsdd_ata_aasist"]["state_dict"]
  inputs = [jnp.ones((1, *shape)) for shape in inputs]
  init = functools.partial(module.init, train=False)
  variables = jax.jit(init, compiler_options=QUICK)(jax.random.key(0), *inputs)
  for name in reversed(path.split("/")):
    variables = {kind: {name: leaf} for kind, leaf in variables.items()}
  state = torch_params.to_torch(variables, ignored={})
  assert len(state) >= 10
  for name, tensor in state.items():
    # Both spreads are estimates from `size` draws.
    size, expected = tensor.size, published[name]
    assert list(tensor.shape) == expected["shape"]
    assert tensor.std() == pytest.approx(
      expected["init_std"], rel=4 / np.sqrt(size)
    ), name
