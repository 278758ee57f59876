"""Adapters compute what PEFT's do, and leave the base alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiomosaic_jax.language import peft_adapters
from audiomosaic_jax.models import lora
from audiomosaic_jax.models.llama import TARGETS, abstract_params
from tests import tiny_llama

FOLDERS = pytest.mark.parametrize("name", tiny_llama.FOLDERS)


def stored(name):
  folder = tiny_llama.GOLDEN / name / "peft_adapter"
  model = tiny_llama.stored(name, **peft_adapters.read_settings(folder))
  tensors = peft_adapters.open_adapter(folder)
  return model, peft_adapters.from_tensors(tensors, model)


@FOLDERS
def test_logits_with_an_adapter_are_those_of_peft(name):
  model, adapters = stored(name)
  params = lora.join(adapters, tiny_llama.stored_params(name))
  expected = tiny_llama.golden(name, "golden_lora.npz")
  valid = expected["attention_mask"] == 1
  logits = tiny_llama.logits_of(model, params, expected["input_ids"], valid)
  np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-4)
  plain = tiny_llama.golden(name)["logits"]
  assert not np.allclose(logits, plain, atol=1e-2)


@FOLDERS
def test_gradients_of_adapters_are_those_of_peft(name):
  model, adapters = stored(name)
  base = tiny_llama.stored_params(name)
  expected = tiny_llama.golden(name, "golden_lora.npz")
  valid = expected["loss_attention_mask"] == 1

  def loss_of(adapters):
    params = lora.join(adapters, base)
    logits = tiny_llama.logits_of(
      model, params, expected["loss_input_ids"], valid
    )
    return tiny_llama.next_token_loss(logits, expected["loss_labels"])

  loss, gradients = jax.jit(jax.value_and_grad(loss_of))(adapters)
  np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
  for kind, tree in (("param", adapters), ("grad", gradients)):
    ours = {
      f"{kind}:{key.removeprefix(peft_adapters.PREFIX)}": x
      for key, x in peft_adapters.to_tensors(tree).items()
    }
    theirs = {key for key in expected if key.startswith(f"{kind}:")}
    assert set(ours) == theirs
    for key in theirs:
      scale = np.abs(expected[key]).max()
      assert np.abs(ours[key] - expected[key]).max() <= 1e-3 * scale, key


def test_an_adapter_changes_nothing_before_it_is_trained():
  model = tiny_llama.build(lora_rank=3, lora_targets=TARGETS)
  shapes = abstract_params(model)
  adapters = lora.init_adapters(shapes, jax.random.key(2))
  base = tiny_llama.random_params(tiny_llama.build())
  assert len(jax.tree.leaves(adapters)) == 2 * len(TARGETS)
  params = lora.join(adapters, base)
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  ids, valid = tiny_llama.inputs(model)
  np.testing.assert_array_equal(
    tiny_llama.logits_of(model, params, ids, valid),
    tiny_llama.logits_of(tiny_llama.build(), base, ids, valid),
  )


def test_factors_are_drawn_as_peft_draws_them():
  model = tiny_llama.build(
    {**tiny_llama.SETTINGS, "hidden_size": 256}, lora_rank=16
  )
  shapes = abstract_params(model)
  draw = lora.init_adapters
  attention = draw(shapes, jax.random.key(0))["layers"]["self_attn"]
  a = attention["q_proj"]["lora_a"]
  bound = 256**-0.5
  assert bound * 0.99 < np.abs(a).max() <= bound
  np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.05)
  assert not np.allclose(a, attention["v_proj"]["lora_a"])
  assert not np.allclose(a[0], a[1])
  assert not np.any(attention["q_proj"]["lora_b"])


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), TARGETS])
def test_a_merged_adapter_is_the_adapter_applied(targets):
  model = tiny_llama.build(lora_rank=3, lora_targets=targets)
  params = tiny_llama.random_params(model)
  merged = lora.merge(params, alpha=model.lora_alpha)
  assert not lora.split(merged)[0]
  ids, valid = tiny_llama.inputs(model)
  applied = tiny_llama.logits_of(model, params, ids, valid)
  plain = tiny_llama.logits_of(tiny_llama.build(), merged, ids, valid)
  np.testing.assert_allclose(plain, applied, rtol=0, atol=2e-5)
  assert not np.allclose(
    tiny_llama.logits_of(tiny_llama.build(), lora.split(params)[1], ids, valid),
    applied,
  )


def test_a_bfloat16_base_stays_and_its_float32_adapters_learn():
  model = tiny_llama.build(
    lora_rank=2, param_dtype="bfloat16", dtype="bfloat16"
  )
  shapes = abstract_params(model)
  adapters = lora.init_adapters(shapes, jax.random.key(0))
  base = lora.split(tiny_llama.random_params(model))[1]
  assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {"float32"}
  assert {x.dtype.name for x in jax.tree.leaves(base)} == {"bfloat16"}
  before = jax.tree.map(np.array, base)
  ids, valid = tiny_llama.inputs(model)
  optimizer = optax.adamw(3e-2)

  @jax.jit
  def step(adapters, state):
    def loss_of(adapters):
      logits = tiny_llama.logits_of(
        model, lora.join(adapters, base), ids, valid
      )
      assert logits.dtype == jnp.float32
      return tiny_llama.next_token_loss(logits, ids)

    loss, gradients = jax.value_and_grad(loss_of)(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss

  state, losses = optimizer.init(adapters), []
  for _ in range(20):
    adapters, state, loss = step(adapters, state)
    losses.append(float(loss))
  assert losses[-1] < losses[0] - 0.3
  assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {"float32"}
  jax.tree.map(np.testing.assert_array_equal, before, base)


def test_dropout_of_adapters_needs_training_and_their_own_key():
  model = tiny_llama.build(lora_rank=2, lora_dropout=0.5)
  params = tiny_llama.random_params(model)
  ids, valid = tiny_llama.inputs(model)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train, seed):
    return model.apply(
      {"params": params},
      ids,
      valid,
      train=train,
      method="from_ids",
      rngs={"dropout": jax.random.key(seed)},
    )

  np.testing.assert_array_equal(run(False, 0), run(False, 1))
  np.testing.assert_array_equal(run(True, 0), run(True, 0))
  assert not np.allclose(run(True, 0), run(True, 1))
  assert not np.allclose(run(True, 0), run(False, 0))


def test_splitting_and_joining_lose_nothing():
  params = tiny_llama.random_params(tiny_llama.build(lora_rank=2))
  adapters, base = lora.split(params)
  joined = lora.join(adapters, base)
  assert jax.tree.structure(joined) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, joined, params)
