"""An encoder as others use it: embeddings of windows that may end early.

  tokens    = ViT(fbank)             attention among the valid tokens only
  embedding = norm(pool(tokens))     what AudioMosaic.embed returns
  frames[t] = norm(mean over the bands of column t)
  z         = Projector(embedding)
  logits    = W embedding + b

Its parameters are those of a pretrained model or of a linear classifier, under
the same names.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audiomosaic_jax.models.heads import Projector
from audiomosaic_jax.models.layers import NORMS
from audiomosaic_jax.models.readout import HEAD_INIT, POOLINGS, check_pooling
from audiomosaic_jax.models.vit import ViT


class Embedder(nn.Module):
  """Reads an encoder in every way that is used downstream.

  Attributes:
    encoder: the Vision Transformer.
    projector: of the contrastive loss, or None.
    pooling: a name in POOLINGS.
    use_fc_norm: normalise pooled tokens.
    num_classes: of the linear classifier on the embedding; 0 for none.
  """

  encoder: ViT
  projector: Projector | None
  pooling: str
  use_fc_norm: bool
  num_classes: int

  def setup(self):
    check_pooling(self.pooling, self.encoder)
    if self.use_fc_norm:
      self.fc_norm = NORMS[self.encoder.norm](dtype="float32")
    if self.num_classes:
      self.head = nn.Dense(self.num_classes, kernel_init=HEAD_INIT)

  def __call__(
    self,
    fbank: Float[Array, "B T F"],
    num_columns: Int[Array, "B"],
    *,
    max_columns: int,
    return_layers: bool,
  ) -> dict[str, jax.Array]:
    """Embeds windows whose first columns of patches hold sound.

    Args:
      fbank: standardised log-mel spectrograms, as long as the grid.
      num_columns: how many columns of patches hold sound; the others are
        seen by nothing.
      max_columns: C, the largest of them; no column beyond is computed.
      return_layers: also return what every block makes of each column.

    Returns:
      "embedding": [B, E];
      "frames": [B, C, D], one per column; those beyond `num_columns` mean
        nothing;
      "layers": [B, depth, C, D], the mean over the bands after every block;
      "z": [B, Z] if there is a projector;
      "logits": [B, classes] if there is a classifier.
    """
    bands, batch = self.encoder.grid[1], fbank.shape[0]
    ids = jnp.arange(max_columns * bands)
    valid = ids[None] < num_columns[:, None] * bands
    tokens = self.encoder(
      fbank,
      jnp.broadcast_to(ids, (batch, len(ids))),
      train=False,
      return_layers=return_layers,
      valid=valid,
    )
    tokens, layers = tokens if return_layers else (tokens, None)
    tokens = tokens.astype(jnp.float32)
    extra = int(self.encoder.class_token)
    always = jnp.ones_like(valid[:, :extra])
    counted = jnp.concatenate([always, valid], axis=1)
    embedding = self._normed(POOLINGS[self.pooling](tokens, counted))

    def columns(tokens):
      patches = tokens[:, extra:].astype(jnp.float32)
      return patches.reshape(batch, max_columns, bands, -1).mean(axis=2)

    frames = columns(tokens)
    if self.pooling != "fusion":  # Its norm is of twice as many channels.
      frames = self._normed(frames)
    out = {"embedding": embedding, "frames": frames}
    if return_layers:
      out["layers"] = jax.vmap(columns, out_axes=1)(layers)
    if self.projector is not None:
      out["z"] = self.projector(embedding, train=False)
    if self.num_classes:
      out["logits"] = self.head(embedding)
    return out

  def _normed(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return self.fc_norm(x) if self.use_fc_norm else x
