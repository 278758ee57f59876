"""What sits on top of the encoder: the projector, and the classifiers.

Every classifier in HEADS is called as (fbank, keep_ids, train) -> logits and
holds its encoder under "encoder", so parameters of one fit another. The
reference masks tokens while it fine-tunes; here that is a choice of keep_ids,
such as mode "time_freq" of the masking module.

All but AASIST are readout(features(fbank, keep_ids, train)): what is learned
besides the encoder is in `readout`, so a probe of a frozen encoder can train
on features that were computed once.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from audiomosaic_jax.models import aasist, probes
from audiomosaic_jax.models.batch_norm import BatchNorm
from audiomosaic_jax.models.layers import DENSE_INIT
from audiomosaic_jax.models.readout import (
  POOLINGS,
  ProbeableHead,
  check_pooling,
  classify,
  encode,
)
from audiomosaic_jax.models.vit import ViT


class Projector(nn.Module):
  """Maps embeddings to the space of the contrastive loss.

    z = BN(W2 relu(BN(W1 x)))        the last BN has a frozen zero bias

  Attributes:
    hidden_features: width between the two dense layers.
    out_features: E, width of z.

  All of it is float32: next to the encoder it costs nothing, and its gradients
  are summed over devices in the type of its matrix products.

  Reference: the projector of the AudioMosaic release; equal to 2e-5.
  """

  hidden_features: int
  out_features: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "B D"], *, train: bool
  ) -> Float[Array, "B E"]:
    """Projects a batch.

    Args:
      x: embeddings.
      train: use and record batch statistics.

    Returns:
      z, before its L2 normalisation.
    """
    x = self._dense(self.hidden_features, "dense_0")(x)
    x = nn.relu(self._norm("norm_0", trainable_bias=True)(x, train=train))
    x = self._dense(self.out_features, "dense_1")(x)
    return self._norm("norm_1", trainable_bias=False)(x, train=train)

  def _dense(self, features: int, name: str) -> nn.Dense:
    return nn.Dense(
      features,
      use_bias=False,
      dtype="float32",
      kernel_init=DENSE_INIT,
      name=name,
    )

  def _norm(self, name: str, *, trainable_bias: bool) -> BatchNorm:
    return BatchNorm(
      momentum=0.9, epsilon=1e-5, trainable_bias=trainable_bias, name=name
    )


class Classifier(ProbeableHead):
  """Classifies the pooled tokens: fine-tuning and, frozen, the linear probe.

    logits = W norm(pool(ViT(fbank, keep_ids))) + b

  Attributes:
    encoder: the Vision Transformer; the published one has no final norm.
    num_classes: C.
    pooling: a name in POOLINGS; "fusion" is the class token and, beside it,
      the mean of the others.
    freeze_encoder: the encoder is in evaluation mode and gets no gradient.
      Weight decay needs no gradient: freeze "encoder/.*" in the optimiser too.

  Reference: AudioMosaicClassifier of the published code; logits equal to 5e-6.
    Differs from upstream: "fusion" normalises all 2 D features, where the
    published norm of D features fails; the norm is of the encoder's kind.
  """

  encoder: ViT
  num_classes: int
  pooling: str
  freeze_encoder: bool

  def features(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
  ) -> Float[Array, "B E"]:
    """Returns the pooled tokens; arguments as of `__call__`.

    Raises:
      ValueError: if the pooling is unknown or lacks its class token.
    """
    check_pooling(self.pooling, self.encoder)
    tokens = encode(
      self.encoder,
      fbank,
      keep_ids,
      train=train,
      freeze=self.freeze_encoder,
      return_layers=False,
    )
    return POOLINGS[self.pooling](tokens)

  @nn.compact
  def readout(self, features: Float[Array, "B E"]) -> Float[Array, "B C"]:
    """Returns the logits of pooled tokens."""
    return classify(features, self.num_classes, self.encoder.norm)


def build(
  *, head: str, grid: tuple[int, int], encoder: Any, **rest: Any
) -> nn.Module:
  """Builds a classifier from plain values, as a config holds them.

  Args:
    head: a name in HEADS.
    grid: (time, freq) patches, which follow from the spectrogram's size.
    encoder: mapping with the other attributes of ViT.
    **rest: the other attributes of the head.

  Returns:
    The model; it has no parameters until `init`.

  Raises:
    ValueError: if the head is unknown.
  """
  if head not in HEADS:
    raise ValueError(f"head {head!r} is unknown; use one of {tuple(HEADS)}")
  return HEADS[head](encoder=ViT(grid=grid, **encoder), **rest)


HEADS = {
  "linear": Classifier,
  "layer": probes.LayerProbe,
  "weighted_sum": probes.WeightedSumProbe,
  "attentive": probes.AttentiveProbe,
  "prototype": probes.PrototypeProbe,
  "aasist": aasist.Aasist,
}
