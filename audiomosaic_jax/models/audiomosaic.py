"""AudioMosaic: the encoder, its pooling, and the projector of the loss.

  tokens    = ViT(fbank, keep_ids)
  pooled    = mean over tokens, or the class token
  embedding = LayerNorm(pooled)                 what downstream tasks use
  z         = Projector(embedding)              what NT-Xent compares

Reference: AudioMosaic (arXiv 2605.14231); both views pass the same weights.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from audiomosaic_jax.models.heads import Projector
from audiomosaic_jax.models.layers import DENSE_INIT, NORMS
from audiomosaic_jax.models.readout import POOLINGS, check_pooling
from audiomosaic_jax.models.vit import ViT


class AudioMosaic(nn.Module):
  """The model that is pretrained.

  Attributes:
    encoder: the Vision Transformer.
    projector: head of the contrastive loss; None, of an encoder that was
      imported without it, compares embeddings.
    pooling: a name in POOLINGS.
    use_fc_norm: normalise the pooled tokens (then the encoder's final norm
      is usually off).
    temperature: of NT-Xent; where it starts if it is learnable.
    logit_bias: added to every logit; where it starts if it is learnable.
    learnable_temperature: hold log(1 / temperature) as param "logit_scale".
    learnable_bias: hold the bias as param "logit_bias".
    num_online_classes: classes of the linear probe trained along with the
      model on stopped gradients; 0 for no probe.
  """

  encoder: ViT
  projector: Projector | None
  pooling: str
  use_fc_norm: bool
  temperature: float
  logit_bias: float
  learnable_temperature: bool
  learnable_bias: bool
  num_online_classes: int

  def setup(self):
    check_pooling(self.pooling, self.encoder)
    if self.use_fc_norm:
      self.fc_norm = NORMS[self.encoder.norm](dtype="float32")
    if self.learnable_temperature:
      self.log_scale = self.param(
        "logit_scale", nn.initializers.constant(self._start()), ()
      )
    if self.learnable_bias:
      self.bias = self.param(
        "logit_bias", nn.initializers.constant(self.logit_bias), ()
      )
    if self.num_online_classes:
      self.online_classifier = nn.Dense(
        self.num_online_classes, kernel_init=DENSE_INIT
      )

  def __call__(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
  ) -> tuple[Float[Array, "B E"], Float[Array, "B D"]]:
    """Projects one view for the contrastive loss.

    Args:
      fbank: standardised log-mel spectrograms of one view.
      keep_ids: ids of the tokens that the encoder sees, or None for all.
      train: stochastic depth and batch statistics on; the collection
        "batch_stats" must then be mutable.

    Returns:
      z before its L2 normalisation, and the pooled tokens before fc_norm,
      whose intrinsic dimension is worth watching.
    """
    pooled = self.encode(fbank, keep_ids, train=train)
    if self.is_initializing() and self.num_online_classes:
      self.classify_online(pooled)
    return self.project(pooled, train=train), pooled

  def encode(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
    drop_keys: Key[Array, "B"] | None = None,
  ) -> Float[Array, "B D"]:
    """Returns the pooled tokens; each example on its own, as in `__call__`.

    Args:
      fbank: as in `__call__`.
      keep_ids: as in `__call__`.
      train: as in `__call__`.
      drop_keys: of the examples, as in `ViT`.
    """
    return self.pool(
      self.encoder(fbank, keep_ids, train=train, drop_keys=drop_keys)
    )

  def project(
    self, pooled: Float[Array, "B D"], *, train: bool
  ) -> Float[Array, "B E"]:
    """Returns z; batch statistics tie the examples, as in `__call__`."""
    embedding = self._normed(pooled)
    if self.projector is None:
      return embedding
    return self.projector(embedding, train=train)

  def embed(self, fbank: Float[Array, "B T F"]) -> Float[Array, "B D"]:
    """Embeds whole spectrograms, nothing masked, for downstream use.

    Args:
      fbank: standardised log-mel spectrograms.

    Returns:
      Embeddings, after fc_norm.
    """
    return self._normed(self.encode(fbank, None, train=False))

  def readouts(self, fbank: Float[Array, "B T F"]) -> dict[str, jax.Array]:
    """Embeds whole spectrograms in every way that a probe can read them.

    Args:
      fbank: standardised log-mel spectrograms.

    Returns:
      "mean": [B, D], what `embed` returns;
      "bands": [B, F/P * D], the mean over time of each row of patches, each
      of zero mean and unit variance, side by side: low and high stay apart.

    Reference: "bands" is how BYOL-A and M2D read their encoders (Niizumi et
      al. 2022, 2023).
    """
    tokens = self.encoder(fbank, None, train=False)
    patches = tokens[:, int(self.encoder.class_token) :].astype(jnp.float32)
    rows = patches.reshape(len(fbank), *self.encoder.grid, -1).mean(axis=1)
    return {
      "mean": self._normed(self.pool(tokens)),
      "bands": jax.nn.standardize(rows).reshape(len(fbank), -1),
    }

  def pool(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B E"]:
    """Reduces tokens to one float32 vector per example, as `pooling` says."""
    return POOLINGS[self.pooling](tokens.astype(jnp.float32))

  def similarity(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the two scalars behind the logits of NT-Xent.

    Returns:
      (log_scale, logit_bias), parameters if learnable, else constants.
      `losses.inverse_temperature(log_scale)` is the logit scale.
    """
    log_scale = (
      self.log_scale
      if self.learnable_temperature
      else jnp.float32(self._start())
    )
    bias = self.bias if self.learnable_bias else jnp.float32(self.logit_bias)
    return jnp.asarray(log_scale), jnp.asarray(bias)

  def classify_online(self, pooled: Float[Array, "B D"]) -> Float[Array, "B C"]:
    """Classifies pooled tokens without a gradient to the encoder."""
    return self.online_classifier(jax.lax.stop_gradient(self._normed(pooled)))

  def _start(self) -> float:
    return -math.log(self.temperature)

  def _normed(self, pooled: Float[Array, "B D"]) -> Float[Array, "B D"]:
    return self.fc_norm(pooled) if self.use_fc_norm else pooled


def build(
  *, grid: tuple[int, int], encoder: Any, projector: Any, **rest: Any
) -> AudioMosaic:
  """Builds the model from plain values, as a config holds them.

  Args:
    grid: (time, freq) patches, which follow from the spectrogram's size.
    encoder: mapping with the other attributes of ViT.
    projector: mapping with the attributes of Projector, or None.
    **rest: the other attributes of AudioMosaic.

  Returns:
    The model; it has no parameters until `init`.
  """
  return AudioMosaic(
    encoder=ViT(grid=grid, **encoder),
    projector=projector and Projector(**projector),
    **rest,
  )
