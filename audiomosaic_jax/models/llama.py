"""Decoder of the Llama family, fed with token ids or with embeddings.

  x = x + Attention(RMSNorm(x));  x = x + MLP(RMSNorm(x))     every layer
  MLP(x) = (silu(x W_gate) * x W_up) W_down
  logits = RMSNorm(x) W_head

Queries and keys are turned by RoPE before they meet; heads of keys and values
may be fewer than those of queries. The layers run in one `lax.scan` over their
stacked parameters. Names are Hugging Face's, so that the tree maps to its
files by rule.

A cache is a pytree that goes in and comes out: it is carried through the scan
whole, as XLA then writes the new keys and values in place.

Numbers: parameters of the base are `param_dtype`, adapters float32; products
and the residual stream are `dtype`; norms, RoPE, softmax and logits float32.

Reference: transformers LlamaForCausalLM; logits are equal to 2e-4.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audiomosaic_jax.models.lora import KERNEL_INIT, Projection
from audiomosaic_jax.models.remat import FOR_ANY, remat
from audiomosaic_jax.models.rope import ROPE, rope_frequencies, rotate

TARGETS = (
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj",
)


class Cache(NamedTuple):
  """Keys and values of earlier positions, [layers, B, S, heads, head_dim]."""

  keys: Float[Array, "L B S N D"]
  values: Float[Array, "L B S N D"]


class Decoded(NamedTuple):
  """What the decoder returns.

  Attributes:
    hidden: [B, T, H] after the last norm, for `Llama.head`.
    cache: with the new keys and values written; None without one.
    layers: [layers, B, T, H] after every layer; None unless asked for.
  """

  hidden: Float[Array, "B T H"]
  cache: Cache | None
  layers: Float[Array, "L B T H"] | None


def positions_of(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """Returns the number of valid tokens before each token."""
  counts = jnp.cumsum(valid.astype(jnp.int32), axis=-1)
  return jnp.maximum(counts - 1, 0)


def causal_mask(valid: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Returns True where a query (axis 1) may see a key (axis 2)."""
  length = valid.shape[-1]
  return jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, :]


class Attention(nn.Module):
  """Causal attention with grouped queries and RoPE."""

  num_heads: int
  num_key_value_heads: int
  head_dim: int
  project: Callable[..., nn.Module]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T H"],
    cache: Cache | None,
    layer: Int[Array, ""],
    angles: Float[Array, "B T half"],
    mask: Bool[Array, "B T S"],
    index: Int[Array, ""],
  ) -> tuple[Float[Array, "B T H"], Cache | None]:
    def heads(name, count):
      y = self.project(count * self.head_dim, name=name)(x)
      return y.reshape(*x.shape[:2], count, self.head_dim)

    q = rotate(heads("q_proj", self.num_heads), angles)
    k = rotate(heads("k_proj", self.num_key_value_heads), angles)
    v = heads("v_proj", self.num_key_value_heads)
    if cache is not None:
      cache = Cache(
        _write(cache.keys, k, layer, index),
        _write(cache.values, v, layer, index),
      )
      k = cache.keys[layer].astype(q.dtype)
      v = cache.values[layer].astype(q.dtype)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    y = y.reshape(*x.shape[:2], -1)
    return self.project(x.shape[-1], name="o_proj")(y), cache


class Mlp(nn.Module):
  """Two matrices up, one gating the other, and one down."""

  hidden: int
  project: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    gate = nn.silu(self.project(self.hidden, name="gate_proj")(x))
    up = self.project(self.hidden, name="up_proj")(x)
    return self.project(x.shape[-1], name="down_proj")(gate * up)


class Layer(nn.Module):
  """One pre-norm layer, shaped as the body of a scan."""

  attention: Callable[..., nn.Module]
  mlp: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  return_layers: bool

  @nn.compact
  def __call__(self, carry, layer, angles, mask, index):
    x, cache = carry
    h = self.norm(name="input_layernorm")(x)
    h, cache = self.attention(name="self_attn")(
      h, cache, layer, angles, mask, index
    )
    x = x + h
    h = self.norm(name="post_attention_layernorm")(x)
    x = x + self.mlp(name="mlp")(h)
    return (x, cache), (x if self.return_layers else None)


class Llama(nn.Module):
  """The decoder; `llama_config.from_hf_config` fills the first attributes.

  Attributes:
    vocab_size: V, tokens.
    hidden_size: H, channels of a token.
    intermediate_size: hidden width of the MLP.
    num_hidden_layers: layers.
    num_attention_heads: heads of queries.
    num_key_value_heads: heads of keys and values; divides the former.
    head_dim: channels of a head.
    rms_norm_eps: of all norms.
    rope_type: a name in ROPE.
    rope_theta: base of the wavelengths.
    rope_scaling: arguments of that entry of ROPE.
    tie_word_embeddings: the head is the table of embeddings.
    lora_rank: of the adapters; 0 is none.
    lora_alpha: adapters are scaled by alpha / rank.
    lora_dropout: share of an adapter's input that is dropped in training.
    lora_targets: which projections have one, names in TARGETS.
    remat: what the backward pass recomputes, one of `remat.FOR_ANY`.
    dtype: of products and the residual stream.
    param_dtype: of all parameters but the adapters.
    use_kernel: what is done to a matrix of the base before its use, such as
      `sharding.Everywhere(mesh)` if it is stored in parts; None is nothing.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_type: str
  rope_theta: float
  rope_scaling: tuple[float, ...]
  tie_word_embeddings: bool
  lora_rank: int
  lora_alpha: float
  lora_dropout: float
  lora_targets: tuple[str, ...]
  remat: str
  dtype: str
  param_dtype: str
  use_kernel: Callable[[jax.Array], jax.Array] | None

  def setup(self):
    self._check()
    param_dtype = jnp.dtype(self.param_dtype)
    shape = (self.vocab_size, self.hidden_size)
    self.embed_tokens = self.param(
      "embed_tokens", KERNEL_INIT, shape, param_dtype
    )
    if not self.tie_word_embeddings:
      self.lm_head = self.param(
        "lm_head", KERNEL_INIT, shape[::-1], param_dtype
      )

  def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T H"]:
    """Returns the embeddings of token ids."""
    table = self._used(self.embed_tokens)
    return jnp.take(table, ids, axis=0).astype(self.dtype)

  def head(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
    """Returns float32 logits of the next token."""
    tied = self.tie_word_embeddings
    kernel = self._used(self.embed_tokens.T if tied else self.lm_head)
    return jnp.matmul(
      hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32
    )

  @nn.compact
  def __call__(
    self,
    embeds: Float[Array, "B T H"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    *,
    train: bool,
    cache: Cache | None = None,
    index: Int[Array, ""] | int = 0,
    return_layers: bool = False,
  ) -> Decoded:
    """Decodes embeddings, of `embed` or of anything else.

    Args:
      embeds: [B, T, H].
      positions: of the tokens, for RoPE.
      mask: True where a token (axis 1) may see another (axis 2): of the T
        tokens themselves, or of the S places of the cache.
      train: dropout of adapters on; needs the rng collection "dropout".
      cache: of `empty_cache`, or that of an earlier call.
      index: place in the cache of the first of these tokens.
      return_layers: also return the output of every layer.
    """
    frequencies = rope_frequencies(
      self.head_dim, self.rope_type, self.rope_theta, self.rope_scaling
    )
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    layers = self._layers(train, return_layers)
    (x, cache), outputs = layers(
      (embeds.astype(self.dtype), cache),
      jnp.arange(self.num_hidden_layers),
      angles,
      mask,
      jnp.asarray(index, jnp.int32),
    )
    return Decoded(self._norm()(name="norm")(x), cache, outputs)

  def from_ids(
    self, ids: Int[Array, "B T"], valid: Bool[Array, "B T"], *, train: bool
  ) -> Float[Array, "B T V"]:
    """Returns the logits after every token; `valid` is False for padding."""
    decoded = self(
      self.embed(ids), positions_of(valid), causal_mask(valid), train=train
    )
    return self.head(decoded.hidden)

  def _used(self, kernel: jax.Array) -> jax.Array:
    return kernel if self.use_kernel is None else self.use_kernel(kernel)

  def _norm(self) -> Callable[..., nn.Module]:
    return functools.partial(
      nn.RMSNorm,
      epsilon=self.rms_norm_eps,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )

  def _layers(self, train: bool, return_layers: bool) -> Callable:
    """Returns all layers as one scan over their stacked parameters."""

    def project(features, name):
      return Projection(
        features,
        rank=self.lora_rank if name in self.lora_targets else 0,
        alpha=self.lora_alpha,
        dropout=self.lora_dropout,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        use_kernel=self.use_kernel,
        train=train,
        name=name,
      )

    attention = functools.partial(
      Attention,
      self.num_attention_heads,
      self.num_key_value_heads,
      self.head_dim,
      project,
    )
    stack = nn.scan(
      remat(Layer, self.remat, in_loop=True),
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=self.num_hidden_layers,
    )
    return stack(
      attention=attention,
      mlp=functools.partial(Mlp, self.intermediate_size, project),
      norm=self._norm(),
      return_layers=return_layers,
      name="layers",
    )

  def _check(self) -> None:
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"num_attention_heads {self.num_attention_heads} is not a multiple of "
        f"num_key_value_heads {self.num_key_value_heads}; use one that is"
      )
    for name, values, known in (
      ("remat", (self.remat,), FOR_ANY),
      ("rope_type", (self.rope_type,), ROPE),
      ("lora_targets", self.lora_targets, TARGETS),
    ):
      if unknown := [value for value in values if value not in known]:
        raise ValueError(
          f"{name} {unknown[0]!r} is unknown; use of {tuple(known)}"
        )


def empty_cache(model: Llama, batch: int, length: int) -> Cache:
  """Returns a cache of `length` places for `batch` rows."""
  shape = (
    model.num_hidden_layers,
    batch,
    length,
    model.num_key_value_heads,
    model.head_dim,
  )
  return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))


def abstract_params(model: Llama) -> dict:
  """Returns the shapes and types of all parameters; computes nothing."""
  one = jnp.zeros((1, 1), jnp.int32)
  init = functools.partial(model.init, train=False, method="from_ids")
  key = jax.random.key(0)
  return jax.eval_shape(init, key, one, one == 0)["params"]


def _write(cache, new, layer, index):
  """Returns [L, B, S, N, D] with [B, T, N, D] at a layer, from a place on."""
  zero = jnp.zeros_like(index)
  start = (layer.astype(index.dtype), zero, index, zero, zero)
  return jax.lax.dynamic_update_slice(
    cache, new[None].astype(cache.dtype), start
  )
