"""Probes: small readouts that tell what an encoder and its layers hold.

To probe is to set freeze_encoder; without it the same heads fine-tune. Those
over all layers have a `parity`: "paper" counts every block once, "released" as
the published code does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audiomosaic_jax.models.layers import NORMS
from audiomosaic_jax.models.readout import (
  POOLINGS,
  TORCH_INIT,
  ProbeableHead,
  check_pooling,
  classify,
  encode,
)
from audiomosaic_jax.models.vit import ViT

PARITIES = ("paper", "released")
# Arguments of a norm that learns nothing.
PLAIN = {
  "layernorm": {"use_scale": False, "use_bias": False},
  "rmsnorm": {"use_scale": False},
}


class LayerProbe(ProbeableHead):
  """Classifies the pooled output of one block.

    logits = W norm(pool(x_layer)) + b

  Attributes:
    encoder: the Vision Transformer. All of its blocks run.
    num_classes: C.
    pooling: a name in POOLINGS.
    layer: of the block, 0 .. depth - 1.
    freeze_encoder: see `heads.Classifier`.

  Reference: AudioMosaicLayerProbe of the published code; equal to 5e-6.
  """

  encoder: ViT
  num_classes: int
  pooling: str
  layer: int
  freeze_encoder: bool

  def features(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
  ) -> Float[Array, "B depth E"]:
    """Returns the pooled output of every block, whichever is probed."""
    check_pooling(self.pooling, self.encoder)
    layers = block_outputs(
      self.encoder,
      fbank,
      keep_ids,
      train=train,
      freeze=self.freeze_encoder,
      parity="paper",
    )
    return jax.vmap(POOLINGS[self.pooling], out_axes=1)(layers)

  @nn.compact
  def readout(self, features: Float[Array, "B depth E"]) -> Float[Array, "B C"]:
    """Returns the logits of pooled block outputs.

    Raises:
      ValueError: if there is no such block.
    """
    if not 0 <= self.layer < self.encoder.depth:
      raise ValueError(
        f"layer {self.layer} is not a block of an encoder of depth "
        f"{self.encoder.depth}; use 0 to {self.encoder.depth - 1}"
      )
    pooled = features[:, self.layer]
    return classify(pooled, self.num_classes, self.encoder.norm)


class WeightedSumProbe(ProbeableHead):
  """Classifies a learned mixture of the outputs of all blocks.

    a = softmax(w)                     one weight per layer, equal at first
    logits = W norm(pool(sum over l of  a_l x_l)) + b

  Attributes:
    encoder: the Vision Transformer.
    num_classes: C.
    pooling: a name in POOLINGS.
    parity: which outputs count, see `block_outputs`.
    freeze_encoder: see `heads.Classifier`.

  Reference: SUPERB (Yang et al. 2021); AudioMosaicWeightedSumProbe of the
    published code, equal to 5e-6.
  """

  encoder: ViT
  num_classes: int
  pooling: str
  parity: str
  freeze_encoder: bool

  def features(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
  ) -> Float[Array, "B L E"]:
    """Returns the pooled layers.

    A pooling is linear: to mix what is pooled is the same and far less work.
    """
    check_pooling(self.pooling, self.encoder)
    layers = block_outputs(
      self.encoder,
      fbank,
      keep_ids,
      train=train,
      freeze=self.freeze_encoder,
      parity=self.parity,
    )
    return jax.vmap(POOLINGS[self.pooling], out_axes=1)(layers)

  @nn.compact
  def readout(self, features: Float[Array, "B L E"]) -> Float[Array, "B C"]:
    """Returns the logits of pooled layers."""
    count = features.shape[1]
    weights = self.param("layer_weights", nn.initializers.zeros, (count,))
    mixed = jnp.einsum("l,ble->be", jax.nn.softmax(weights), features)
    return classify(mixed, self.num_classes, self.encoder.norm)


class LayerScales(nn.Module):
  """The learned part of a norm per layer: scale_l x_l + bias_l.

  Attributes:
    width: D; wider features repeat the scales, as pooling "fusion" does.
    use_bias: whether the norm has a bias.
  """

  width: int
  use_bias: bool

  @nn.compact
  def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    shape, repeats = (x.shape[1], self.width), (1, x.shape[2] // self.width)
    x = x * jnp.tile(self.param("scale", nn.initializers.ones, shape), repeats)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, shape)
      x = x + jnp.tile(bias, repeats)
    return x


class AttentiveProbe(ProbeableHead):
  """Classifies what learned queries gather from the outputs of all blocks.

    p_l = pool(norm_l(x_l))            a norm of its own for every layer
    y_h = sum over l of  softmax_l(q_h . K_h p_l / sqrt(d)) V_h p_l
    logits = W norm([y_1 .. y_H]) + b

  Attributes:
    encoder: the Vision Transformer.
    num_classes: C.
    pooling: a name in POOLINGS.
    num_queries: H, heads of the attention over layers with d channels each.
    parity: which outputs count, see `block_outputs`.
    freeze_encoder: see `heads.Classifier`.

  Reference: AudioMosaicAttentiveProbe of the published code; equal to 6e-6.
  """

  encoder: ViT
  num_classes: int
  pooling: str
  num_queries: int
  parity: str
  freeze_encoder: bool

  def features(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
  ) -> Float[Array, "B L E"]:
    """Returns the layers, normed token by token and then pooled.

    Without the learned scale and bias of the norms: both are the same for all
    tokens, so `readout` applies them to what is pooled.
    """
    check_pooling(self.pooling, self.encoder)
    layers = block_outputs(
      self.encoder,
      fbank,
      keep_ids,
      train=train,
      freeze=self.freeze_encoder,
      parity=self.parity,
    )
    norm = NORMS[self.encoder.norm](
      dtype="float32", parent=None, **PLAIN[self.encoder.norm]
    )
    return jax.vmap(POOLINGS[self.pooling], out_axes=1)(norm.apply({}, layers))

  @nn.compact
  def readout(self, features: Float[Array, "B L E"]) -> Float[Array, "B C"]:
    """Returns the logits of normed and pooled layers.

    Raises:
      ValueError: if num_queries does not divide the pooled width.
    """
    norms = LayerScales(
      width=self.encoder.width,
      use_bias=self.encoder.norm == "layernorm",
      name="layer_norms",
    )
    gathered = self._attend(norms(features))
    return classify(gathered, self.num_classes, self.encoder.norm)

  def _attend(self, pooled: Float[Array, "B L E"]) -> Float[Array, "B E"]:
    """Returns what the queries gather over the layers."""
    width = pooled.shape[-1]
    if width % self.num_queries:
      raise ValueError(
        f"pooled width {width} is not divisible by num_queries "
        f"{self.num_queries}; use a divisor of the width"
      )
    query = self.param(
      "attn_query",
      nn.initializers.normal(0.02),
      (1, self.num_queries, 1, width // self.num_queries),
    )
    key, value = (
      nn.Dense(width, use_bias=False, kernel_init=TORCH_INIT, name=name)(
        pooled
      ).reshape(*pooled.shape[:2], self.num_queries, -1)
      for name in ("attn_key", "attn_value")
    )
    scores = jnp.einsum("hd,blhd->bhl", query[0, :, 0], key)
    weights = jax.nn.softmax(scores * key.shape[-1] ** -0.5)
    return jnp.einsum("bhl,blhd->bhd", weights, value).reshape(-1, width)


class PrototypeProbe(ProbeableHead):
  """Scores every class by the patches that look most like its prototypes.

    s_cj = max over n of  cos(norm(x_n), p_cj)     patches n, prototypes j
    logit_c = sum over j of  w_cj s_cj + b_c

  A pooled vector loses a short sound in a long clip; the maximum finds it, and
  the patch that gives it says where the class is heard. Prototypes belong to
  one class, so no class is scored by what was learned for another. At first
  the weights are 1 and the prototypes random. The class token is no place in
  the spectrogram and is left out.

  Attributes:
    encoder: the Vision Transformer.
    num_classes: C.
    num_prototypes: J, per class. The similarities need B N C J floats.
    freeze_encoder: see `heads.Classifier`.

  Reference: not in the published code; in the spirit of prototypical probing
    for multi-label audio, Heinrich et al. 2025 (AudioProtoPNet) and Rauch et
    al. 2025. Tested against the equations to 1e-5.
  """

  encoder: ViT
  num_classes: int
  num_prototypes: int
  freeze_encoder: bool

  def features(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
  ) -> Float[Array, "B N D"]:
    """Returns the patches of the spectrogram."""
    tokens = encode(
      self.encoder,
      fbank,
      keep_ids,
      train=train,
      freeze=self.freeze_encoder,
      return_layers=False,
    )
    return tokens[:, int(self.encoder.class_token) :]

  @nn.compact
  def readout(self, features: Float[Array, "B N D"]) -> Float[Array, "B C"]:
    """Returns the logits of patches."""
    norm = NORMS[self.encoder.norm](dtype="float32", name="fc_norm")
    patches = norm(features)
    shape = (self.num_classes, self.num_prototypes)
    prototypes = self.param(
      "prototypes", nn.initializers.normal(1.0), (*shape, patches.shape[-1])
    )
    similarity = jnp.einsum(
      "bnd,cjd->bncj", unit_length(patches), unit_length(prototypes)
    )
    weights = self.param("weights", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
    return jnp.einsum("bcj,cj->bc", similarity.max(axis=1), weights) + bias


def unit_length(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
  """Returns vectors divided by their length, which is at least 1e-6."""
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))


def block_outputs(
  encoder: ViT,
  fbank: Float[Array, "B T F"],
  keep_ids: Int[Array, "B K"] | None,
  *,
  train: bool,
  freeze: bool,
  parity: str,
) -> Float[Array, "L B N D"]:
  """Returns the layers that a probe over all layers reads.

  Args:
    encoder: the Vision Transformer.
    fbank: standardised log-mel spectrograms.
    keep_ids: ids of the tokens to encode, or None for all.
    train: stochastic depth on, unless frozen.
    freeze: see `readout.encode`.
    parity: "paper" for the outputs of the blocks, "released" for these and
      the encoder's output.

  Returns:
    One layer per row, depth or depth + 1 of them.

  Raises:
    ValueError: if the parity is unknown.
  """
  if parity not in PARITIES:
    raise ValueError(f"parity {parity!r} is unknown; use one of {PARITIES}")
  tokens, layers = encode(
    encoder, fbank, keep_ids, train=train, freeze=freeze, return_layers=True
  )
  if parity == "paper":
    return layers
  # Parity: the published probes append the output of the encoder. It has no
  # final norm there, so the last block counts twice.
  return jnp.concatenate([layers, tokens[None]])
