"""Generation draws what transformers draws, in batches and alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax.language import generate
from tests import tiny_llama

FOLDERS = pytest.mark.parametrize("name", tiny_llama.FOLDERS)
GREEDY = generate.Sampling(12, 0.0, 0, 1.0, 1.0, (), 0)
WARM = GREEDY._replace(temperature=1.3, top_k=20, top_p=0.9)


def run(name, ids, valid, sampling, *, seed=0, how=generate.generate):
  model, params = tiny_llama.stored(name), tiny_llama.stored_params(name)
  embeds = model.apply({"params": params}, ids, method="embed")
  prompt_ids = jnp.where(valid, ids, -1)
  key = jax.random.key(seed)
  return how(model, params, embeds, valid, prompt_ids, key, sampling)


def prompt(expected, prefix=""):
  return expected[f"{prefix}input_ids"], expected[
    f"{prefix}attention_mask"
  ] == 1


def step_logits(name, embeds, valid):
  """Returns [B, steps, V] of a greedy run without a stop token."""
  model, params = tiny_llama.stored(name), tiny_llama.stored_params(name)
  none = jnp.full((len(embeds), 1), -1)
  given = (none, jax.random.key(0), GREEDY)
  state = generate.prefill(model, params, embeds, valid, *given)
  logits = [np.asarray(state.logits)]
  for _ in range(GREEDY.max_new_tokens - 1):
    state = generate.advance(model, params, state, *given[1:])
    logits.append(np.asarray(state.logits))
  return np.stack(logits, axis=1)


@FOLDERS
@pytest.mark.parametrize(
  ("key", "prefix", "change"),
  [
    ("gen_no_eos_sequences", "", {}),
    ("gen_left_padded_sequences", "left_", {}),
    (
      "gen_repetition_penalty_1_1_sequences",
      "",
      {"repetition_penalty": 1.1},
    ),
    ("gen_sequences", "", {"eos_ids": "eos_token_id"}),
  ],
)
def test_greedy_tokens_are_those_of_transformers(name, key, prefix, change):
  expected = tiny_llama.golden(name)
  if "eos_ids" in change:
    change = {"eos_ids": (int(expected["eos_token_id"]),)}
  ids, valid = prompt(expected, prefix)
  tokens = run(name, ids, valid, GREEDY._replace(**change))
  np.testing.assert_array_equal(tokens, expected[key][:, ids.shape[1] :])


@FOLDERS
def test_embeddings_are_continued_as_by_transformers(name):
  expected = tiny_llama.golden(name)
  model, params = tiny_llama.stored(name), tiny_llama.stored_params(name)
  embeds = expected["inputs_embeds"]
  valid = jnp.ones(embeds.shape[:2], bool)
  none = jnp.full((len(embeds), 1), -1)
  tokens = generate.generate(
    model, params, embeds, valid, none, jax.random.key(0), GREEDY
  )
  np.testing.assert_array_equal(tokens, expected["gen_from_embeds_new_tokens"])
  np.testing.assert_allclose(
    step_logits(name, embeds, valid),
    expected["gen_from_embeds_step_logits"],
    rtol=0,
    atol=2e-4,
  )


@FOLDERS
@pytest.mark.parametrize(
  ("key", "prefix"),
  [
    ("gen_no_eos_step_logits", ""),
    ("gen_left_padded_step_logits", "left_"),
  ],
)
def test_logits_of_every_step_are_those_of_transformers(name, key, prefix):
  expected = tiny_llama.golden(name)
  ids, valid = prompt(expected, prefix)
  model, params = tiny_llama.stored(name), tiny_llama.stored_params(name)
  embeds = model.apply({"params": params}, ids, method="embed")
  logits = step_logits(name, embeds, valid)
  np.testing.assert_allclose(logits, expected[key], rtol=0, atol=2e-4)


@pytest.mark.parametrize("setting", ["ltu", "warm", "topk", "both"])
def test_probabilities_are_those_of_transformers(setting):
  expected = tiny_llama.golden("sampling")
  penalty, temperature, top_k, top_p = map(
    float, expected[f"{setting}_settings"]
  )
  logits, ids = expected["logits"], expected["input_ids"]
  seen = jnp.zeros(logits.shape, bool).at[jnp.arange(3)[:, None], ids].set(True)
  sampling = GREEDY._replace(
    repetition_penalty=penalty,
    temperature=temperature,
    top_k=int(top_k),
    top_p=top_p,
  )
  probs = jax.nn.softmax(generate.next_logits(logits, seen, sampling))
  probs_expected = expected[f"{setting}_probs"]
  np.testing.assert_array_equal(probs == 0, probs_expected == 0)
  np.testing.assert_allclose(probs, probs_expected, rtol=0, atol=1e-6)


def test_tokens_fall_as_often_as_their_probability():
  logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
  rows = 4000
  state = generate.State(
    step=jnp.int32(-1),
    tokens=jnp.zeros(rows, jnp.int32),
    logits=jnp.broadcast_to(logits, (rows, 4)),
    cache=None,
    filled=None,
    lengths=None,
    seen=jnp.zeros((rows, 4), bool),
    done=jnp.zeros(rows, bool),
  )
  sampling = GREEDY._replace(temperature=1.0, top_k=3)
  drawn = generate._draw(state, jax.random.key(0), sampling).tokens
  shares = np.bincount(drawn, minlength=4) / rows
  expected = np.append(jax.nn.softmax(logits[0, :3]), 0)
  np.testing.assert_allclose(shares, expected, atol=0.03)
  assert shares[3] == 0


def test_a_batch_of_mixed_lengths_is_its_rows_one_by_one():
  name = tiny_llama.FOLDERS[0]
  expected = tiny_llama.golden(name)
  ids, valid = prompt(expected, "left_")
  sampling = GREEDY._replace(repetition_penalty=1.2)
  together = run(name, ids, valid, sampling)
  assert len({int(row.sum()) for row in valid}) > 1
  for row, row_valid, tokens in zip(ids, valid, together, strict=True):
    row = row[row_valid][None]
    alone = run(name, row, jnp.ones(row.shape, bool), sampling)
    np.testing.assert_array_equal(alone[0], tokens)


@pytest.mark.parametrize("before", [0, 2, 100])
def test_padding_may_stand_anywhere(before):
  name = tiny_llama.FOLDERS[0]
  ids, valid = prompt(tiny_llama.golden(name), "left_")
  orders = []
  for row in np.asarray(valid):
    real, padding = np.flatnonzero(row), np.flatnonzero(~row)
    orders.append([*real[:before], *padding, *real[before:]])
  moved = [
    np.take_along_axis(np.asarray(x), np.array(orders), 1) for x in (ids, valid)
  ]
  tokens = run(name, *map(jnp.asarray, moved), WARM)
  np.testing.assert_array_equal(tokens, run(name, ids, valid, WARM))


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_stream_yields_the_columns_of_the_whole(sampling):
  name = tiny_llama.FOLDERS[0]
  expected = tiny_llama.golden(name)
  sampling = sampling._replace(eos_ids=(int(expected["eos_token_id"]),))
  ids, valid = prompt(expected)
  whole = run(name, ids, valid, sampling)
  columns = list(run(name, ids, valid, sampling, how=generate.stream))
  streamed = np.stack(columns, axis=1)
  np.testing.assert_array_equal(streamed, whole[:, : streamed.shape[1]])
  assert (whole[:, streamed.shape[1] :] == sampling.pad_id).all()


def test_generation_stops_once_every_row_has_ended():
  name = tiny_llama.FOLDERS[0]
  expected = tiny_llama.golden(name)
  ids, valid = prompt(expected)
  tokens = np.asarray(run(name, ids, valid, GREEDY))
  third = tuple(int(token) for token in tokens[:, 2])
  sampling = GREEDY._replace(eos_ids=third, pad_id=5)
  columns = list(run(name, ids, valid, sampling, how=generate.stream))
  assert len(columns) <= 3
  ended = np.asarray(run(name, ids, valid, sampling))
  assert (ended[:, 3:] == 5).all()
  assert np.isin(ended, third).any(axis=1).all()


def test_random_tokens_follow_the_key_and_nothing_else():
  name = tiny_llama.FOLDERS[0]
  ids, valid = prompt(tiny_llama.golden(name))
  one = run(name, ids, valid, WARM, seed=1)
  np.testing.assert_array_equal(one, run(name, ids, valid, WARM, seed=1))
  assert not np.array_equal(one, run(name, ids, valid, WARM, seed=2))


@pytest.mark.parametrize(
  "change",
  [
    {"max_new_tokens": 0},
    {"temperature": -1.0},
    {"top_k": -1},
    {"top_p": 0.0},
    {"repetition_penalty": 0.0},
  ],
)
def test_settings_that_cannot_be_are_named(change):
  name = tiny_llama.FOLDERS[0]
  ids, valid = prompt(tiny_llama.golden(name))
  ((field, value),) = change.items()
  with pytest.raises(ValueError, match=f"{field} {value}"):
    run(name, ids, valid, GREEDY._replace(**change))
