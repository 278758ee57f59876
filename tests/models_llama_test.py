"""The decoder computes what transformers does, however it is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax.models import llama_config
from audiomosaic_jax.models.llama import (
  abstract_params,
  causal_mask,
  empty_cache,
  positions_of,
)
from audiomosaic_jax.models.rope import rope_frequencies
from tests import tiny_llama

LOGITS = {"rtol": 0, "atol": 2e-4}
FOLDERS = pytest.mark.parametrize("name", tiny_llama.FOLDERS)


def stored(name):
  return tiny_llama.stored(name), tiny_llama.stored_params(name)


@FOLDERS
def test_logits_and_every_layer_are_those_of_transformers(name):
  model, params = stored(name)
  expected = tiny_llama.golden(name)
  ids, valid = expected["input_ids"], expected["attention_mask"] == 1

  def run(params, ids):
    embeds = model.apply({"params": params}, ids, method="embed")
    decoded = model.apply(
      {"params": params},
      embeds,
      positions_of(valid),
      causal_mask(valid),
      train=False,
      return_layers=True,
    )
    return embeds, decoded

  embeds, decoded = jax.jit(run)(params, ids)
  np.testing.assert_array_equal(embeds, expected["hidden_0"])
  np.testing.assert_allclose(decoded.layers[0], expected["hidden_1"], **LOGITS)
  np.testing.assert_allclose(decoded.hidden, expected["hidden_2"], **LOGITS)
  logits = tiny_llama.logits_of(model, params, ids, valid)
  np.testing.assert_allclose(logits, expected["logits"], **LOGITS)


@pytest.mark.parametrize("name", ["llama_rope_llama3", "llama_rope_linear"])
def test_scaled_positions_have_the_logits_of_transformers(name):
  # One with tied embeddings, the other a Mistral with heads of their own size.
  model, params = stored(name)
  expected = tiny_llama.golden(name)
  ids = expected["input_ids"]
  valid = jnp.ones(ids.shape, bool)
  logits = tiny_llama.logits_of(model, params, ids, valid)
  np.testing.assert_allclose(logits, expected["logits"], **LOGITS)
  plain = model.clone(rope_type="default", rope_scaling=())
  logits = tiny_llama.logits_of(plain, params, ids, valid)
  assert np.abs(logits - expected["logits"]).max() > 0.1


@FOLDERS
def test_it_takes_embeddings_for_ids(name):
  model, params = stored(name)
  expected = tiny_llama.golden(name)
  embeds = expected["inputs_embeds"]
  valid = jnp.ones(embeds.shape[:2], bool)
  decoded = model.apply(
    {"params": params},
    embeds,
    positions_of(valid),
    causal_mask(valid),
    train=False,
  )
  logits = model.apply({"params": params}, decoded.hidden, method="head")
  np.testing.assert_allclose(logits, expected["embeds_logits"], **LOGITS)


@FOLDERS
@pytest.mark.parametrize(
  ("side", "positions", "key"),
  [
    ("left", "left_position_ids", "left_logits"),
    ("left", None, "left_logits_arange_positions"),
    ("right", None, "right_logits"),
  ],
)
def test_padded_rows_have_the_logits_of_transformers(
  name, side, positions, key
):
  model, params = stored(name)
  expected = tiny_llama.golden(name)
  ids = expected[f"{side}_input_ids"]
  valid = expected[f"{side}_attention_mask"] == 1
  counted = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  embeds = model.apply({"params": params}, ids, method="embed")
  decoded = model.apply(
    {"params": params},
    embeds,
    expected[positions] if positions else counted,
    causal_mask(valid),
    train=False,
  )
  logits = model.apply({"params": params}, decoded.hidden, method="head")
  np.testing.assert_allclose(logits[valid], expected[key][valid], **LOGITS)
  if side == "left" and positions:
    ours = positions_of(jnp.asarray(valid))[valid]
    np.testing.assert_array_equal(ours, expected[positions][valid])


@FOLDERS
def test_the_loss_is_that_of_transformers(name):
  model, params = stored(name)
  expected = tiny_llama.golden(name)
  valid = expected["right_attention_mask"] == 1
  logits = tiny_llama.logits_of(
    model, params, expected["right_input_ids"], valid
  )
  loss = tiny_llama.next_token_loss(logits, expected["loss_labels"])
  np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)


@FOLDERS
def test_tokens_decoded_one_by_one_have_the_logits_of_the_whole(name):
  model, params = stored(name)
  ids = tiny_llama.golden(name)["input_ids"]
  rows, length = ids.shape
  whole = tiny_llama.logits_of(model, params, ids, jnp.ones(ids.shape, bool))

  @jax.jit
  def step(cache, token, index):
    embeds = model.apply({"params": params}, token[:, None], method="embed")
    decoded = model.apply(
      {"params": params},
      embeds,
      jnp.full((rows, 1), index, jnp.int32),
      jnp.broadcast_to(jnp.arange(length) <= index, (rows, 1, length)),
      train=False,
      cache=cache,
      index=index,
    )
    hidden = decoded.hidden[:, 0]
    return decoded.cache, model.apply({"params": params}, hidden, method="head")

  cache = empty_cache(model, rows, length)
  for index in range(length):
    cache, logits = step(cache, ids[:, index], jnp.int32(index))
    np.testing.assert_allclose(logits, whole[:, index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_layers_changes_no_gradient(remat):
  def gradient(remat):
    model = tiny_llama.build(remat=remat, lora_rank=2, num_hidden_layers=2)
    ids, valid = tiny_llama.inputs(model)

    def loss(params):
      return tiny_llama.next_token_loss(
        tiny_llama.logits_of(model, params, ids, valid), ids
      )

    return jax.jit(jax.grad(loss))(tiny_llama.random_params(model))

  for one, other in zip(
    jax.tree.leaves(gradient("none")),
    jax.tree.leaves(gradient(remat)),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_no_token_sees_the_next_ones():
  model = tiny_llama.build()
  params = tiny_llama.random_params(model)
  ids, valid = tiny_llama.inputs(model)
  before = tiny_llama.logits_of(model, params, ids, valid)
  after = tiny_llama.logits_of(model, params, ids.at[:, 4].add(1), valid)
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert not np.allclose(before[:, 4:], after[:, 4:])


def test_tied_embeddings_are_the_head():
  model = tiny_llama.build({**tiny_llama.SETTINGS, "tie_word_embeddings": True})
  params = tiny_llama.random_params(model)
  assert "lm_head" not in params
  ids, valid = tiny_llama.inputs(model)
  untied = tiny_llama.build()
  head = params["embed_tokens"].T
  np.testing.assert_allclose(
    tiny_llama.logits_of(model, params, ids, valid),
    tiny_llama.logits_of(untied, {**params, "lm_head": head}, ids, valid),
    atol=1e-6,
  )


# Name -> (config.json as published, parameters)
LARGE = {
  "vicuna-7b": (
    {
      "vocab_size": 32000,
      "hidden_size": 4096,
      "intermediate_size": 11008,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
    },
    6_738_415_616,
  ),
  "vicuna-13b": (
    {
      "vocab_size": 32000,
      "hidden_size": 5120,
      "intermediate_size": 13824,
      "num_hidden_layers": 40,
      "num_attention_heads": 40,
      "num_key_value_heads": 40,
    },
    13_015_864_320,
  ),
  "llama-3-8b": (
    {
      "vocab_size": 128256,
      "hidden_size": 4096,
      "intermediate_size": 14336,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
      "num_key_value_heads": 8,
      "rope_theta": 500000.0,
    },
    8_030_261_248,
  ),
  "llama-3.2-1b": (
    {
      "vocab_size": 128256,
      "hidden_size": 2048,
      "intermediate_size": 8192,
      "num_hidden_layers": 16,
      "num_attention_heads": 32,
      "num_key_value_heads": 8,
      "tie_word_embeddings": True,
      "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      },
    },
    1_235_814_400,
  ),
  "tinyllama": (
    {
      "vocab_size": 32000,
      "hidden_size": 2048,
      "intermediate_size": 5632,
      "num_hidden_layers": 22,
      "num_attention_heads": 32,
      "num_key_value_heads": 4,
    },
    1_100_048_384,
  ),
  "mistral-7b-v0.3": (
    {
      "model_type": "mistral",
      "vocab_size": 32768,
      "hidden_size": 4096,
      "intermediate_size": 14336,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
      "num_key_value_heads": 8,
      "sliding_window": None,
    },
    7_248_023_552,
  ),
}


@pytest.mark.parametrize(("settings", "count"), LARGE.values(), ids=LARGE)
def test_published_models_have_their_number_of_parameters(settings, count):
  settings = {"model_type": "llama", "rms_norm_eps": 1e-5, **settings}
  shapes = abstract_params(tiny_llama.build(settings))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_adapters_of_the_published_model_have_their_number_of_parameters():
  settings = {**LARGE["vicuna-7b"][0], "model_type": "llama"}
  settings["rms_norm_eps"] = 1e-6
  with_adapters = abstract_params(tiny_llama.build(settings, lora_rank=8))
  size = sum(leaf.size for leaf in jax.tree.leaves(with_adapters))
  assert size - LARGE["vicuna-7b"][1] == 4_194_304


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"model_type": "qwen2"}, "model_type 'qwen2'.*'llama', 'mistral'"),
    ({"model_type": None}, "model_type None"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu'"),
    ({"sliding_window": 4096}, "sliding_window 4096"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'.*'llama3'"),
    ({"rope_scaling": {"type": "linear"}}, r"'linear' lacks \['factor'\]"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rms_norm_eps": None}, r"lacks \['rms_norm_eps'\]"),
  ],
)
def test_other_architectures_are_refused_by_name(change, words):
  with pytest.raises(ValueError, match=words):
    llama_config.from_hf_config({**tiny_llama.SETTINGS, **change})


def test_a_choice_that_is_unknown_is_named():
  ids = jnp.zeros((1, 1), jnp.int32)
  for change in (
    {"lora_targets": ("c_attn",)},
    {"remat": "some"},
    {"rope_type": "yarn"},
    {"num_key_value_heads": 3},
  ):
    with pytest.raises(ValueError, match=str(next(iter(change)))):
      model = tiny_llama.build(**change)
      model.init(
        jax.random.key(0), ids, ids == 0, train=False, method="from_ids"
      )


def test_config_files_of_all_ages_say_the_same():
  scaled = {"rope_type": "linear", "factor": 4.0}
  new = {**tiny_llama.SETTINGS, "head_dim": 8}
  new["rope_parameters"] = {**scaled, "rope_theta": 5e5}
  old = {**tiny_llama.SETTINGS, "rope_theta": 5e5, "head_dim": None}
  old["rope_scaling"] = {"type": "linear", "factor": 4.0}
  read = llama_config.from_hf_config
  assert read(new) == read(old)
  assert read(old)["rope_theta"] == 5e5
  assert read(tiny_llama.SETTINGS)["rope_theta"] == 10000.0


def test_heads_of_keys_are_those_of_queries_where_none_are_given():
  settings = {**tiny_llama.SETTINGS}
  del settings["num_key_value_heads"]
  assert llama_config.from_hf_config(settings)["num_key_value_heads"] == 4


def test_scaled_positions_turn_as_published():
  plain = rope_frequencies(128, "default", 5e5, ())
  np.testing.assert_allclose(
    rope_frequencies(128, "linear", 5e5, (4.0,)), plain / 4, rtol=1e-6
  )
  scaled = rope_frequencies(128, "llama3", 5e5, (8.0, 1.0, 4.0, 8192.0))
  turns = 8192 * plain / (2 * np.pi)
  np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
  np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
  between = (turns > 1) & (turns < 4)
  assert between.any()
  assert (scaled < plain)[between].all() and (scaled > plain / 8)[between].all()
  assert (np.diff(scaled) < 0).all()
