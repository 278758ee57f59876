"""AASIST: graph attention over frequency and time, to tell fakes from real.

  map      = Conv(maxpool(tokens W))        [B, S, T, C], an image of the tokens
  spectral = sum over T of  softmax_T(a) * map + positions          S nodes
  temporal = sum over S of  softmax_S(a) * map                      T nodes
  both graphs: attention between nodes, then the best half of the nodes
  two branches: attention between the two graphs and a master node
  logits   = W [max |temporal|; mean temporal; the same of spectral; master] + b

The image is made of tokens in the order they come in, so order matters here,
unlike in the encoder. Give keep_ids in order, or None.

Parity: the published fine-tuning shuffles the tokens of every training example
and evaluates on ordered ones. To train so, give keep_ids of mode "time_freq"
with ratios of zero, which are all ids in random order.

Reference: Jung et al. 2022 (AASIST) as the back end of Tak et al. 2022, in the
published code as AudioMosaicAASIST.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audiomosaic_jax.models.graphs import (
  NODE_INIT,
  Branch,
  GraphAttention,
  GraphPool,
  batch_norm,
  dense,
  symmetric,
)
from audiomosaic_jax.models.readout import TORCH_INIT, encode
from audiomosaic_jax.models.vit import ViT

WINDOW = 3  # of the first max-pool, along channels and along tokens


class ResidualBlock(nn.Module):
  """Two convolutions around a norm, added to the input.

    y = Conv(selu(norm(Conv(x)))) + shortcut(x)

  The kernels are 2 x 3; the first makes the image one row higher and the
  second takes the row away. The shortcut is a convolution where the channels
  change, else the identity.

  Parity: the published block first normalises x, then overwrites the result.
  Those norms change no output and get no gradient, and are not here.
  """

  channels: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "B S T C"], *, train: bool
  ) -> Float[Array, "B S T D"]:
    y = _conv(x, self.channels, (2, 3), (1, 1), "conv_0")
    y = nn.selu(batch_norm("norm")(y, train=train))
    y = _conv(y, self.channels, (2, 3), (0, 1), "conv_1")
    if x.shape[-1] != self.channels:
      x = _conv(x, self.channels, (1, 3), (0, 1), "shortcut")
    return y + x


class Aasist(nn.Module):
  """The encoder with the AASIST back end.

  Attributes:
    encoder: the Vision Transformer; the published one has no final norm.
    num_classes: C.
    width: channels that tokens are reduced to; S is a third of it.
    filters: channels of the residual blocks.
    graph_width: channels of a node of the two graphs.
    branch_width: channels of a node in the two branches.
    pool_ratio: share of nodes that stay, each time.
    temperatures: of attention in the spectral graph, in the temporal graph,
      and in the branches.
    input_dropout: of the nodes that attend.
    pool_dropout: of the nodes that are scored.
    branch_dropout: of the nodes that leave the branches.
    readout_dropout: of the features that are classified.
    freeze_encoder: see `heads.Classifier`.

  Reference: AudioMosaicAASIST of the published code; logits equal to 8e-5,
    where its own rounding is 9e-6. Differs from upstream: parameters that it
    builds and never trains are not here (`torch_params.AASIST_UNUSED`).
  """

  encoder: ViT
  num_classes: int
  width: int
  filters: tuple[int, ...]
  graph_width: int
  branch_width: int
  pool_ratio: float
  temperatures: tuple[float, float, float]
  input_dropout: float
  pool_dropout: float
  branch_dropout: float
  readout_dropout: float
  freeze_encoder: bool

  @nn.compact
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
      keep_ids: ids of the tokens that the encoder sees, whose order is that
        of the image, or None for all in order.
      train: stochastic depth, dropout and batch statistics on; needs the rng
        collections "drop_path" and "dropout", and "batch_stats" mutable.

    Returns:
      Logits.

    Raises:
      ValueError: if there are too few tokens or channels for an image.
    """
    tokens = encode(
      self.encoder,
      fbank,
      keep_ids,
      train=train,
      freeze=self.freeze_encoder,
      return_layers=False,
    )
    temporal, spectral = self._graphs(self._image(tokens, train), train)
    branches = [
      Branch(
        self.branch_width,
        self.temperatures[2],
        self.pool_ratio,
        self.input_dropout,
        self.pool_dropout,
        name=f"branch_{i}",
      )(temporal, spectral, train=train)
      for i in range(2)
    ]
    drop = nn.Dropout(self.branch_dropout, deterministic=not train)
    temporal, spectral, master = (
      jnp.maximum(drop(x), drop(y)) for x, y in zip(*branches, strict=True)
    )
    parts = [f(x) for x in (temporal, spectral) for f in (_largest, _mean)]
    features = jnp.concatenate([*parts, master[:, 0]], axis=1)
    features = nn.Dropout(self.readout_dropout)(
      features, deterministic=not train
    )
    return dense(features, self.num_classes, "out")

  def _image(
    self, tokens: Float[Array, "B N D"], train: bool
  ) -> Float[Array, "B S T C"]:
    """Returns the tokens as an image of channel groups by token groups."""
    if min(self.width, tokens.shape[1]) < WINDOW:
      raise ValueError(
        f"width {self.width} and {tokens.shape[1]} tokens are pooled by "
        f"{WINDOW} x {WINDOW}; give at least {WINDOW} of both"
      )
    x = dense(tokens, self.width, "reduce").swapaxes(1, 2)[..., None]
    x = nn.max_pool(x, (WINDOW, WINDOW), strides=(WINDOW, WINDOW))
    x = nn.selu(batch_norm("norm_in")(x, train=train))
    for i, channels in enumerate(self.filters):
      x = ResidualBlock(channels, name=f"residual_{i}")(x, train=train)
    return nn.selu(batch_norm("norm_out")(x, train=train))

  def _graphs(
    self, image: Float[Array, "B S T C"], train: bool
  ) -> tuple[Float[Array, "B _ E"], Float[Array, "B _ E"]]:
    """Returns the nodes of the temporal and of the spectral graph."""
    channels = image.shape[-1]
    w = nn.selu(_conv(image, 2 * channels, (1, 1), (0, 0), "attention_0"))
    w = batch_norm("attention_norm")(w, train=train)
    w = _conv(w, channels, (1, 1), (0, 0), "attention_1")
    spectral = jnp.sum(image * jax.nn.softmax(w, axis=2), axis=2)
    temporal = jnp.sum(image * jax.nn.softmax(w, axis=1), axis=1)
    spectral = spectral + self.param(
      "pos_spectral", NODE_INIT, (1, *spectral.shape[1:])
    )
    pooled = []
    for name, nodes, temperature in (
      ("temporal", temporal, self.temperatures[1]),
      ("spectral", spectral, self.temperatures[0]),
    ):
      graph = GraphAttention(
        self.graph_width, temperature, self.input_dropout, name=f"graph_{name}"
      )
      pool = GraphPool(self.pool_ratio, self.pool_dropout, name=f"pool_{name}")
      pooled.append(pool(graph(nodes, train=train), train=train))
    return pooled[0], pooled[1]


def _largest(x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
  return jnp.max(jnp.abs(x), axis=1)


def _mean(x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
  return jnp.mean(x, axis=1)


def _conv(
  x: Float[Array, "B S T C"],
  features: int,
  kernel: tuple[int, int],
  padding: tuple[int, int],
  name: str,
) -> jax.Array:
  fan_in = kernel[0] * kernel[1] * x.shape[-1]
  return nn.Conv(
    features,
    kernel,
    padding=[(p, p) for p in padding],
    kernel_init=TORCH_INIT,
    bias_init=symmetric(fan_in**-0.5),
    name=name,
  )(x)
