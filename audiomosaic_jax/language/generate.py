"""Continues prompts with a decoder, one token at a time.

  tokens = generate(model, params, embeds, valid, ids, key, sampling)

The prompt is embeddings, so that audio may stand before the text, and rows may
be of any lengths, with padding anywhere: it is moved to the front, and the
rest is as if every row were alone. `stream` returns the same tokens as they
come.

Of the logits of a step:
  1. those of ids seen before, in the prompt or since, are divided by the
     repetition penalty where positive and multiplied by it elsewhere;
  2. all are divided by the temperature;
  3. those below the k-th largest fall out (top-k);
  4. of the rest, in falling order, those fall out that follow a probability of
     `top_p` (top-p).
A temperature of 0 takes the largest after 1.

Reference: the logits processors of transformers, in their order; greedy
tokens are the same, probabilities to 1e-6.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from audiomosaic_jax.models.llama import (
  Cache,
  Llama,
  causal_mask,
  empty_cache,
  positions_of,
)


class Sampling(NamedTuple):
  """How tokens are drawn.

  Attributes:
    max_new_tokens: of a row, at most.
    temperature: 0 is greedy.
    top_k: 0 is off.
    top_p: 1 is off.
    repetition_penalty: 1 is off.
    eos_ids: tokens that end a row; they are part of it.
    pad_id: what follows the end.
  """

  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float
  repetition_penalty: float
  eos_ids: tuple[int, ...]
  pad_id: int


class State(NamedTuple):
  """Where a generation stands; the rows have `step` + 1 new tokens.

  Attributes:
    step: number of the last token.
    tokens: the last token of every row.
    logits: that it was drawn from, as the decoder gave them.
    cache: of the decoder.
    filled: places of the cache that may be seen.
    lengths: valid tokens of the prompts.
    seen: ids that the penalty concerns.
    done: rows that have ended.
  """

  step: Int[Array, ""]
  tokens: Int[Array, "B"]
  logits: Float[Array, "B V"]
  cache: Cache
  filled: Bool[Array, "B S"]
  lengths: Int[Array, "B"]
  seen: Bool[Array, "B V"]
  done: Bool[Array, "B"]


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def generate(
  model: Llama,
  params: Any,
  embeds: Float[Array, "B T H"],
  valid: Bool[Array, "B T"],
  prompt_ids: Int[Array, "B P"],
  key: Key[Array, ""],
  sampling: Sampling,
) -> Int[Array, "B N"]:
  """Generates until every row has ended, or has `max_new_tokens`.

  Args:
    model: the decoder.
    params: its parameters.
    embeds: of the prompts.
    valid: False for padding.
    prompt_ids: ids in the prompts, which only the penalty looks at; negative
      for none.
    key: random key; unused if greedy.
    sampling: how tokens are drawn.

  Returns:
    New tokens, `pad_id` after the end of a row.
  """
  state = _prefill(model, params, embeds, valid, prompt_ids, key, sampling)
  tokens = jnp.full(
    (len(embeds), sampling.max_new_tokens), sampling.pad_id, jnp.int32
  )

  def go_on(carry):
    state, _ = carry
    return ~state.done.all() & (state.step + 1 < sampling.max_new_tokens)

  def body(carry):
    state, tokens = carry
    state = _advance(model, params, state, key, sampling)
    return state, tokens.at[:, state.step].set(state.tokens)

  first = tokens.at[:, 0].set(state.tokens)
  return jax.lax.while_loop(go_on, body, (state, first))[1]


def stream(
  model: Llama,
  params: Any,
  embeds: Float[Array, "B T H"],
  valid: Bool[Array, "B T"],
  prompt_ids: Int[Array, "B P"],
  key: Key[Array, ""],
  sampling: Sampling,
) -> Iterator[np.ndarray]:
  """Yields the columns of what `generate` returns, as they come.

  Args:
    As of `generate`.

  Yields:
    [B] the next token of every row; no more once all have ended.
  """
  state = prefill(model, params, embeds, valid, prompt_ids, key, sampling)
  yield np.asarray(state.tokens)
  for _ in range(sampling.max_new_tokens - 1):
    if np.asarray(state.done).all():
      return
    state = advance(model, params, state, key, sampling)
    yield np.asarray(state.tokens)


def next_logits(
  logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
  """Returns logits whose softmax is what a token is drawn from."""
  penalty = sampling.repetition_penalty
  penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
  logits = jnp.where(seen, penalised, logits)
  if sampling.temperature == 0:
    return logits
  logits = logits / sampling.temperature
  if 0 < sampling.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    # The one that crosses the threshold stays.
    stays = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
    least = jnp.where(stays, ordered, jnp.inf).min(axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def _prefill(
  model, params, embeds, valid, prompt_ids, key, sampling: Sampling
) -> State:
  """Returns the state after the first token."""
  _check(sampling)
  rows, length = valid.shape
  embeds, valid = _align_right(embeds, valid)
  room = ((0, 0), (0, sampling.max_new_tokens))
  mask = jnp.pad(causal_mask(valid), ((0, 0), *room))
  decoded = model.apply(
    {"params": params},
    embeds,
    positions_of(valid),
    mask,
    train=False,
    cache=empty_cache(model, rows, length + sampling.max_new_tokens),
  )
  # Negative ids fall outside, and are dropped.
  ids = jnp.where(prompt_ids < 0, model.vocab_size, prompt_ids)
  seen = jnp.zeros((rows, model.vocab_size), bool)
  seen = seen.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")
  state = State(
    step=jnp.int32(-1),
    tokens=jnp.zeros(rows, jnp.int32),
    logits=_head(model, params, decoded.hidden[:, -1]),
    cache=decoded.cache,
    filled=jnp.pad(valid, room),
    lengths=valid.sum(axis=-1),
    seen=seen,
    done=jnp.zeros(rows, bool),
  )
  return _draw(state, key, sampling)


def _advance(model, params, state: State, key, sampling: Sampling) -> State:
  """Returns the state after one more token."""
  index = state.filled.shape[-1] - sampling.max_new_tokens + state.step
  filled = state.filled.at[:, index].set(True)
  embeds = model.apply(
    {"params": params}, state.tokens[:, None], method="embed"
  )
  decoded = model.apply(
    {"params": params},
    embeds,
    (state.lengths + state.step)[:, None],
    filled[:, None],
    train=False,
    cache=state.cache,
    index=index,
  )
  state = state._replace(
    logits=_head(model, params, decoded.hidden[:, 0]),
    cache=decoded.cache,
    filled=filled,
  )
  return _draw(state, key, sampling)


def _draw(state: State, key, sampling: Sampling) -> State:
  """Returns the state with a token drawn from its logits."""
  step = state.step + 1
  logits = next_logits(state.logits, state.seen, sampling)
  if sampling.temperature == 0:
    tokens = logits.argmax(axis=-1)
  else:
    tokens = jax.random.categorical(jax.random.fold_in(key, step), logits)
  tokens = jnp.where(state.done, sampling.pad_id, tokens).astype(jnp.int32)
  ends = jnp.isin(tokens, jnp.asarray(sampling.eos_ids, jnp.int32))
  return state._replace(
    step=step,
    tokens=tokens,
    seen=state.seen.at[jnp.arange(len(tokens)), tokens].set(True),
    done=state.done | ends,
  )


def _align_right(embeds, valid):
  """Moves the padding of every row to its front; the rest keeps its order."""
  order = jnp.argsort(valid, axis=-1, stable=True)
  embeds = jnp.take_along_axis(embeds, order[:, :, None], axis=1)
  return embeds, jnp.take_along_axis(valid, order, axis=1)


def _head(model, params, hidden):
  return model.apply({"params": params}, hidden, method="head")


def _check(sampling: Sampling) -> None:
  for name, fits, wanted in (
    ("max_new_tokens", sampling.max_new_tokens > 0, "above 0"),
    ("temperature", sampling.temperature >= 0, "0 (greedy) or above"),
    ("top_k", sampling.top_k >= 0, "0 (off) or above"),
    ("top_p", 0 < sampling.top_p <= 1, "above 0 and up to 1 (off)"),
    ("repetition_penalty", sampling.repetition_penalty > 0, "above 0"),
  ):
    if not fits:
      value = getattr(sampling, name)
      raise ValueError(f"{name} {value} cannot be; give one {wanted}")


_STATIC = ("model", "sampling")
prefill = jax.jit(_prefill, static_argnames=_STATIC)
# The cache is written in place: what was given is gone.
advance = jax.jit(_advance, static_argnames=_STATIC, donate_argnames="state")
