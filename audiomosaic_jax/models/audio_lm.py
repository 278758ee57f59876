"""The audio-language model: an encoder listens, a Llama answers.

  tokens = ViT(fbank), the class token left out
  audio  = LayerNorm(pool(tokens) / 50) W + b            32 tokens a clip
  logits = Llama([audio; embed(text)]), those of the text

The audio stands before the text without a separator. A row without sound has
its audio tokens masked, so that it is read as the text alone.

Reference: LTU (Gong et al. 2024, arXiv 2305.10790) with the encoder of
AudioMosaic; logits of the published forward pass are equal to 2e-4, gradients
to 1e-3 relative.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audiomosaic_jax.models.llama import (
  Cache,
  Llama,
  causal_mask,
  positions_of,
)
from audiomosaic_jax.models.vit import ViT


def pool_tokens(
  tokens: Float[Array, "B L D"],
  *,
  grid: tuple[int, int],
  time_stride: int,
  order: str,
) -> Float[Array, "B A D"]:
  """Averages patch tokens over frequency, then over neighbours in time.

  Args:
    tokens: [B, T * F, D] of the patches, row-major in (time, freq).
    grid: (T, F).
    time_stride: columns of patches that become one token.
    order: a name in ORDERS. "time" keeps the order in time. "reference" is
      the index arithmetic of the published code.

  Returns:
    [B, T / time_stride, D].
  """
  columns = ORDERS[order](tokens, *grid)
  batch, count, width = columns.shape
  parts = columns.reshape(batch, count // time_stride, time_stride, width)
  return parts.mean(axis=2)


class AudioProjector(nn.Module):
  """Brings audio tokens to the width of the decoder, in float32.

  Attributes:
    features: H, channels of the decoder.
    divisor: of the tokens before their norm, where it matters through eps.
  """

  features: int
  divisor: float

  @nn.compact
  def __call__(self, x: Float[Array, "B A D"]) -> Float[Array, "B A H"]:
    norm = nn.LayerNorm(
      epsilon=1e-5, use_bias=False, use_scale=False, dtype=jnp.float32
    )
    x = norm(x.astype(jnp.float32) / self.divisor)
    return nn.Dense(self.features, dtype=jnp.float32, name="proj")(x)


class AudioLM(nn.Module):
  """Encoder, projector and decoder in one tree of parameters.

  Attributes:
    encoder: the Vision Transformer, with a class token.
    projector: from its channels to the decoder's.
    llama: the decoder.
    time_stride: columns of patches that become one audio token.
    pooling_order: a name in ORDERS.
    shuffle_tokens: permute the patch tokens of every clip in training, as the
      published training does by accident; needs the rng collection "shuffle".
    count_padding: positions count padding, as in the published training; else
      a token's position is the number of valid ones before it.
  """

  encoder: ViT
  projector: AudioProjector
  llama: Llama
  time_stride: int
  pooling_order: str
  shuffle_tokens: bool
  count_padding: bool

  def setup(self):
    if self.pooling_order not in ORDERS:
      raise ValueError(
        f"pooling_order {self.pooling_order!r} is unknown; use one of "
        f"{tuple(ORDERS)}"
      )
    if not self.encoder.class_token:
      raise ValueError(
        "the encoder has no class token, which pooling leaves out; set "
        "model.encoder.class_token=True"
      )
    if self.encoder.grid[0] % self.time_stride:
      raise ValueError(
        f"time_stride {self.time_stride} does not divide the "
        f"{self.encoder.grid[0]} columns of patches of a clip; use a divisor"
      )

  @property
  def num_audio_tokens(self) -> int:
    """A, audio tokens of a clip."""
    return self.encoder.grid[0] // self.time_stride

  def __call__(
    self,
    fbank: Float[Array, "B T F"],
    ids: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
    has_audio: Bool[Array, "B"],
    *,
    train: bool,
  ) -> Float[Array, "B N V"]:
    """Returns the float32 logits after every token of the text.

    Args:
      fbank: standardised log-mel spectrograms.
      ids: tokens of the text.
      valid: False for padding, anywhere in a row.
      has_audio: False for rows whose spectrogram means nothing.
      train: dropout of adapters on; needs the rng collection "dropout".
    """
    embeds, valid = self.prompt(fbank, ids, valid, has_audio, train=train)
    if self.count_padding:
      places = jnp.arange(valid.shape[1])
      positions = jnp.broadcast_to(places, valid.shape)
    else:
      positions = positions_of(valid)
    decoded = self.llama(embeds, positions, causal_mask(valid), train=train)
    return self.llama.head(decoded.hidden[:, self.num_audio_tokens :])

  def prompt(
    self,
    fbank: Float[Array, "B T F"],
    ids: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
    has_audio: Bool[Array, "B"],
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "B AN H"], Bool[Array, "B AN"]]:
    """Returns what the decoder reads: embeddings, and which of them count."""
    audio = self.listen(fbank, train=train)
    text = self.llama.embed(ids)
    heard = jnp.broadcast_to(has_audio[:, None], audio.shape[:2])
    embeds = jnp.concatenate([audio.astype(text.dtype), text], axis=1)
    return embeds, jnp.concatenate([heard, valid], axis=1)

  def listen(
    self, fbank: Float[Array, "B T F"], *, train: bool = False
  ) -> Float[Array, "B A H"]:
    """Returns the audio tokens of clips, as wide as the decoder."""
    tokens = self.encoder(fbank, None, train=train)[:, 1:]
    if self.shuffle_tokens and train:
      keys = jax.random.split(self.make_rng("shuffle"), len(tokens))
      tokens = jax.vmap(jax.random.permutation)(keys, tokens)
    pooled = pool_tokens(
      tokens.astype(jnp.float32),
      grid=self.encoder.grid,
      time_stride=self.time_stride,
      order=self.pooling_order,
    )
    return self.projector(pooled)

  def decode(
    self,
    ids: Int[Array, "B N"],
    positions: Int[Array, "B N"],
    mask: Bool[Array, "B N S"],
    cache: Cache,
    index: Int[Array, ""] | int,
  ) -> Float[Array, "B N V"]:
    """Returns the logits of further text, after what a cache holds."""
    decoded = self.llama(
      self.llama.embed(ids),
      positions,
      mask,
      train=False,
      cache=cache,
      index=index,
    )
    return self.llama.head(decoded.hidden)


def _in_time(tokens, times, bands):
  return tokens.reshape(len(tokens), times, bands, -1).mean(axis=2)


def _as_published(tokens, times, bands):
  # Parity: the published code takes its time-major tokens for frequency-major
  # ones, so that it averages over eight blocks of time.
  return tokens.reshape(len(tokens), bands, times, -1).mean(axis=1)


# Tokens [B, T * F, D], T and F -> [B, T, D].
ORDERS = {"time": _in_time, "reference": _as_published}
