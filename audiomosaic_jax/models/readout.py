"""What heads share: encoding, poolings, and the normed linear classifier."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audiomosaic_jax.models.layers import NORMS
from audiomosaic_jax.models.vit import ViT

HEAD_INIT = nn.initializers.normal(2.5e-5)
# How PyTorch draws the weights of a linear layer: U(-1, 1) / sqrt(inputs).
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def encode(
  encoder: ViT,
  fbank: Float[Array, "B T F"],
  keep_ids: Int[Array, "B K"] | None,
  *,
  train: bool,
  freeze: bool,
  return_layers: bool,
) -> Any:
  """Runs the encoder, to train it along or to read it as it is.

  Args:
    encoder: the Vision Transformer.
    fbank: standardised log-mel spectrograms.
    keep_ids: ids of the tokens to encode, or None for all.
    train: stochastic depth on, unless frozen.
    freeze: stochastic depth off, and no gradient to the encoder.
    return_layers: also return the output of every block.

  Returns:
    What the encoder returns, in float32.
  """
  out = encoder(
    fbank, keep_ids, train=train and not freeze, return_layers=return_layers
  )
  out = jax.tree.map(lambda x: x.astype(jnp.float32), out)
  return jax.lax.stop_gradient(out) if freeze else out


class ProbeableHead(nn.Module):
  """A head whose learned part, `readout`, takes features of the encoder.

  Subclasses define `features(fbank, keep_ids, train)`, what the encoder gives,
  and `readout(features)`, the logits. A probe of a frozen encoder can so train
  on features that were computed once.
  """

  def __call__(
    self,
    fbank: Float[Array, "B T F"],
    keep_ids: Int[Array, "B K"] | None,
    *,
    train: bool,
  ) -> Float[Array, "B C"]:
    """Classifies a batch.

    Args:
      fbank: standardised log-mel spectrograms.
      keep_ids: ids of the tokens that the encoder sees, or None for all.
      train: stochastic depth on; needs the rng collection "drop_path".

    Returns:
      Logits.

    Raises:
      ValueError: if an attribute of the head has no such value.
    """
    return self.readout(self.features(fbank, keep_ids, train=train))


def check_pooling(pooling: str, encoder: ViT) -> None:
  """Raises ValueError if the pooling is unknown or lacks its class token."""
  if pooling not in POOLINGS:
    raise ValueError(
      f"pooling {pooling!r} is unknown; use one of {tuple(POOLINGS)}"
    )
  if pooling != "mean" and not encoder.class_token:
    raise ValueError(
      f"pooling {pooling!r} needs class_token=True, got False; "
      "use pooling 'mean'"
    )


def classify(
  features: Float[Array, "B E"], num_classes: int, norm: str
) -> Float[Array, "B C"]:
  """Returns head(fc_norm(features)); both belong to the calling module.

  Args:
    features: one vector per example.
    num_classes: C.
    norm: a name in NORMS, that of the encoder.

  Returns:
    Logits. They start near zero: a first prediction of all classes alike.
  """
  features = NORMS[norm](dtype="float32", name="fc_norm")(features)
  return nn.Dense(num_classes, kernel_init=HEAD_INIT, name="head")(features)


def _mean(
  tokens: Float[Array, "B N D"], valid: Bool[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
  where = None if valid is None else valid[:, :, None]
  return tokens.mean(axis=1, where=where)


def _mean_no_cls(
  tokens: Float[Array, "B N D"], valid: Bool[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
  return _mean(tokens[:, 1:], None if valid is None else valid[:, 1:])


# (tokens, which are valid or None for all) -> one vector per example.
POOLINGS = {
  # The published mean takes the class token in as one more token.
  "mean": _mean,
  "mean_no_cls": _mean_no_cls,
  "cls": lambda tokens, valid=None: tokens[:, 0],
  "fusion": lambda tokens, valid=None: jnp.concatenate(
    [tokens[:, 0], _mean_no_cls(tokens, valid)], axis=1
  ),
}
