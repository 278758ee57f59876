"""The audio-language model computes what the published one computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from audiomosaic_jax import losses, weight_files
from audiomosaic_jax.language import audio_weights, generate
from audiomosaic_jax.models import audio_lm
from tests import tiny_audio_lm, tiny_llama

ORDERS = ("time", "reference")


@functools.partial(jax.jit, static_argnames=("model", "method", "train"))
def apply(model, params, *inputs, method="__call__", train=False):
  return model.apply({"params": params}, *inputs, method=method, train=train)


def text_of(golden):
  return golden["input_ids"], golden["text_attention_mask"] == 1


def all_heard(golden):
  return jnp.ones(len(golden["fbank"]), bool)


def loss_of(params, model, golden):
  ids, valid = text_of(golden)
  logits = model.apply(
    {"params": params},
    golden["fbank"],
    ids,
    valid,
    all_heard(golden),
    train=False,
  )
  total, count = losses.next_token(logits, golden["labels"])
  return total / count


def test_encoder_gives_the_published_tokens():
  model, golden = tiny_audio_lm.build(), tiny_audio_lm.golden()
  params = {"params": tiny_audio_lm.params()["encoder"]}
  tokens = model.encoder.apply(params, golden["fbank"], None, train=False)
  np.testing.assert_allclose(tokens, golden["encoder_tokens"], atol=2e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("raw", ["", "raw_"])
def test_pooling_and_projection_are_the_published_ones(order, raw):
  golden = tiny_audio_lm.golden()
  tokens = golden["raw_tokens"] if raw else golden["encoder_tokens"][:, 1:]
  pooled = audio_lm.pool_tokens(
    tokens, grid=(64, 8), time_stride=2, order=order
  )
  expected = golden[f"{raw}pooled_{order}_order"]
  np.testing.assert_allclose(pooled, expected, atol=2e-6)
  projector = tiny_audio_lm.build().projector
  projected = projector.apply(
    {"params": tiny_audio_lm.params()["projector"]}, pooled
  )
  expected = golden[f"{raw}projected_{order}_order"]
  np.testing.assert_allclose(projected, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("count_padding", "name"),
  [(True, "logits_train_positions"), (False, "logits_cumsum_positions")],
)
def test_logits_are_the_published_ones(count_padding, name):
  golden = tiny_audio_lm.golden()
  model = tiny_audio_lm.build(count_padding=count_padding)
  ids, valid = text_of(golden)
  logits = apply(
    model,
    tiny_audio_lm.params(),
    golden["fbank"],
    ids,
    valid,
    all_heard(golden),
  )
  np.testing.assert_allclose(logits[valid], golden[name][valid], atol=2e-4)


def test_loss_and_gradients_are_the_published_ones():
  model, golden = tiny_audio_lm.build(), tiny_audio_lm.golden()
  loss, grads = jax.jit(jax.value_and_grad(loss_of), static_argnums=1)(
    tiny_audio_lm.params(), model, golden
  )
  np.testing.assert_allclose(loss, golden["loss_train_positions"], atol=1e-5)
  found = audio_weights.to_tensors(grads)
  names = [name for name in golden if name.startswith("grad:")]
  assert len(names) == 7
  for name in names:
    expected = golden[name]
    error = np.abs(found[name.removeprefix("grad:")] - expected).max()
    assert error <= 1e-3 * np.abs(expected).max(), name


@pytest.mark.parametrize(
  ("key", "penalty"), [("greedy", 1.0), ("greedy_rep1.1", 1.1)]
)
def test_answers_are_the_published_ones_in_one_batch_of_mixed_lengths(
  key, penalty
):
  golden = tiny_audio_lm.golden()
  model = tiny_audio_lm.build(count_padding=False)
  params = tiny_audio_lm.params()
  ids, valid = text_of(golden)
  heard = all_heard(golden)
  embeds, kept = apply(
    model, params, golden["fbank"], ids, valid, heard, method="prompt"
  )
  sampling = generate.Sampling(12, 0.0, 0, 1.0, penalty, (), 0)
  tokens = generate.generate(
    model.llama,
    params["llama"],
    embeds,
    kept,
    jnp.where(valid, ids, -1),
    jax.random.key(0),
    sampling,
  )
  for row, length in enumerate(np.asarray(valid.sum(axis=1))):
    expected = golden[f"{key}_{row}"][length:]
    count = min(len(expected), 12)
    assert count > 3
    np.testing.assert_array_equal(tokens[row, :count], expected[:count])


def test_a_row_without_audio_is_the_text_alone():
  golden = tiny_audio_lm.golden()
  model = tiny_audio_lm.build(count_padding=False)
  params = tiny_audio_lm.params()
  ids, valid = text_of(golden)
  heard = jnp.array([False, True])
  given = (golden["fbank"], ids, valid)
  logits = apply(model, params, *given, heard)
  alone = tiny_llama.logits_of(model.llama, params["llama"], ids, valid)
  np.testing.assert_allclose(logits[0][valid[0]], alone[0][valid[0]], atol=1e-5)
  with_all = apply(model, params, *given, all_heard(golden))
  np.testing.assert_allclose(
    logits[1][valid[1]], with_all[1][valid[1]], atol=1e-5
  )
  assert np.abs(with_all[0] - logits[0])[valid[0]].max() > 1e-2


def test_time_order_keeps_an_event_in_its_place_and_the_published_does_not():
  tokens = np.zeros((1, 64, 8, 1), np.float32)
  tokens[0, 10, 3] = 1
  tokens = jnp.asarray(tokens.reshape(1, 512, 1))
  places = {
    order: np.flatnonzero(
      audio_lm.pool_tokens(tokens, grid=(64, 8), time_stride=2, order=order)
    )
    for order in ORDERS
  }
  # Column 10 is in the fifth pair; published, 10 mod 8 blocks and band 3.
  assert places["time"].tolist() == [5]
  assert places["reference"].tolist() == [(10 * 8 + 3) % 64 // 2]


def test_shuffled_tokens_change_training_alone():
  golden = tiny_audio_lm.golden()
  model = tiny_audio_lm.build(shuffle_tokens=True)
  variables = {"params": tiny_audio_lm.params()}
  listen = functools.partial(
    model.apply, variables, golden["fbank"], method="listen"
  )
  still = listen(train=False)
  rngs = {"shuffle": jax.random.key(0)}
  assert np.abs(listen(train=True, rngs=rngs) - still).max() > 1e-2
  plain = tiny_audio_lm.build().apply(
    variables, golden["fbank"], method="listen"
  )
  np.testing.assert_array_equal(still, plain)


def test_audio_weights_survive_the_way_to_a_file_and_back():
  params = tiny_audio_lm.params()
  tensors = audio_weights.to_tensors(params)
  stored = weight_files.open_weights(tiny_audio_lm.FOLDER)
  audio = {name for name in stored if "audio" in name}
  assert set(tensors) == audio
  for name in audio:
    read = weight_files.read_whole(stored[name])
    np.testing.assert_array_equal(tensors[name], read)
  prefixed = {
    f"base_model.model.{name}": weight_files.Tensor(x.shape, x.__getitem__)
    for name, x in tensors.items()
  }
  again = traverse_util.flatten_dict(
    audio_weights.from_tensors(prefixed, params)
  )
  for path, leaf in again.items():
    expected = traverse_util.flatten_dict(params)[path]
    np.testing.assert_array_equal(leaf, expected)


def test_a_projector_of_another_width_is_refused():
  tensors = weight_files.open_weights(tiny_audio_lm.FOLDER)
  target = tiny_audio_lm.shapes(tiny_audio_lm.build())
  other = {"kernel": jnp.zeros((32, 48)), "bias": jnp.zeros(48)}
  target = {**target, "projector": {"proj": other}}
  with pytest.raises(ValueError, match=r"\(64, 32\).*wanted.*\(48, 32\)"):
    audio_weights.from_tensors(tensors, target)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pooling_order": "freq"}, "'freq' is unknown; use one of .*'time'"),
    ({"time_stride": 3}, "time_stride 3 does not divide the 64 columns"),
  ],
)
def test_errors_say_what_to_set(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny_audio_lm.shapes(tiny_audio_lm.build(**changes))


def test_ignored_labels_and_the_first_are_not_counted():
  logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
  labels = jnp.array([[3, -100, 2, 1], [0, 4, -100, -100]])
  total, count = losses.next_token(logits, labels)
  assert count == 3
  scores = np.log(np.asarray(jax.nn.softmax(logits)))
  expected = -(scores[0, 1, 2] + scores[0, 2, 1] + scores[1, 0, 4])
  np.testing.assert_allclose(total, expected, rtol=1e-6)
