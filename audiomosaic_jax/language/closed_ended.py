"""Closed-ended questions: which of many answers fits a clip best.

  score(clip, answer) = sum_i log p(answer_i | clip, question, answer_<i)

The likelihood of every label's answer needs no other model, draws nothing and
gives a score for each class. The similarity compares texts instead: what the
model writes, and every label's answer.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from audiomosaic_jax.models.audio_lm import AudioLM
from audiomosaic_jax.models.llama import (
  Cache,
  causal_mask,
  empty_cache,
  positions_of,
)

Params = dict[str, Any]
Embedder = Callable[[Sequence[str]], np.ndarray]


@functools.partial(
  jax.jit, static_argnames=("model", "answers_at_once", "per_token")
)
def likelihoods(
  model: AudioLM,
  params: Params,
  fbank: Float[Array, "B T F"],
  has_audio: Bool[Array, "B"],
  question: Int[Array, "P"],
  answers: Int[Array, "C N"],
  *,
  answers_at_once: int,
  per_token: bool,
) -> Float[Array, "B C"]:
  """Returns the log-likelihood of every answer for every clip.

  Audio and question are read once a clip; answers go on from their cache.

  Args:
    model: the audio-language model.
    params: of it, base included.
    fbank: standardised log-mel spectrograms.
    has_audio: False for clips that are not to be heard.
    question: tokens of the prompt, the same for all clips.
    answers: tokens that follow it, -1 for padding at the end.
    answers_at_once: which a clip's cache is copied for at a time.
    per_token: divide by the number of tokens.
  """
  batch, (count, length) = len(fbank), answers.shape
  asked = jnp.broadcast_to(question, (batch, len(question)))
  apply = functools.partial(model.apply, {"params": params})
  embeds, valid = apply(
    fbank, asked, jnp.ones(asked.shape, bool), has_audio, method="prompt"
  )
  read = embeds.shape[1]
  room = ((0, 0), (0, length))
  decoded = model.llama.apply(
    {"params": params["llama"]},
    embeds,
    positions_of(valid),
    jnp.pad(causal_mask(valid), ((0, 0), *room)),
    train=False,
    cache=empty_cache(model.llama, batch, read + length),
  )
  first = model.llama.apply(
    {"params": params["llama"]}, decoded.hidden[:, -1], method="head"
  )
  seen = jnp.pad(valid, room)

  def score(group: Int[Array, "K N"]) -> Float[Array, "B K"]:
    rows = len(group)
    follow = functools.partial(
      _follow, apply, read=read, lengths=valid.sum(axis=1).repeat(rows)
    )
    tokens = jnp.tile(group, (batch, 1))
    logits = follow(
      jnp.maximum(tokens, 0),
      jax.tree.map(lambda x: x.repeat(rows, axis=1), decoded.cache),
      seen.repeat(rows, axis=0),
    )
    logits = jnp.concatenate(
      [first.repeat(rows, axis=0)[:, None], logits[:, :-1]], axis=1
    )
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.maximum(tokens, 0)[:, :, None]
    found = jnp.take_along_axis(scores, chosen, axis=2)[:, :, 0]
    total = jnp.sum(found, axis=1, where=tokens >= 0)
    if per_token:
      total = total / jnp.sum(tokens >= 0, axis=1)
    return total.reshape(batch, rows)

  missing = -count % answers_at_once
  padded = jnp.pad(answers, ((0, missing), (0, 0)))
  groups = padded.reshape(-1, answers_at_once, length)
  found = jax.lax.map(score, groups)
  return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :count]


def _follow(
  apply: Callable,
  tokens: Int[Array, "R N"],
  cache: Cache,
  seen: Bool[Array, "R S"],
  *,
  read: int,
  lengths: Int[Array, "R"],
) -> Float[Array, "R N V"]:
  """Returns the logits after each token of answers that go on from a cache."""
  length = tokens.shape[1]
  own = jnp.tril(jnp.ones((length, length), bool))
  mask = jnp.repeat(seen[:, None], length, axis=1)
  own = jnp.broadcast_to(own, (len(tokens), length, length))
  mask = mask.at[:, :, read:].set(own)
  positions = lengths[:, None] + jnp.arange(length)
  return apply(tokens, positions, mask, cache, read, method="decode")


def pad_answers(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "C N"]:
  """Returns rows of tokens, filled up with -1."""
  return np.array(list(itertools.zip_longest(*rows, fillvalue=-1)), np.int32).T


def similarities(
  embedder: Embedder, written: Sequence[str], answers: Sequence[str]
) -> Float[np.ndarray, "B C"]:
  """Returns the cosines of written answers with every label's.

  Args:
    embedder: texts -> [n, D], any that runs on this machine. The published
      numbers are of one that does not.
    written: by the model, one for each clip.
    answers: one for each label.
  """
  texts, labels = (
    vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    for vectors in map(np.asarray, (embedder(written), embedder(answers)))
  )
  return texts @ labels.T
