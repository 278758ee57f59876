"""Graphs whose nodes attend to one another, as the AASIST back end has them.

Nodes are rows of [B, N, D]; every graph is complete. Attention between two
nodes follows from their elementwise product, so it is symmetric before the
softmax, and costs N x N x D floats.

Reference: Jung et al. 2022 (AASIST); equal to the published code as stated at
`aasist.Aasist`. Linear layers start as PyTorch's do.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from audiomosaic_jax.models.batch_norm import BatchNorm
from audiomosaic_jax.models.readout import TORCH_INIT

WEIGHT_INIT = nn.initializers.xavier_normal()
NODE_INIT = nn.initializers.normal(1.0)


class GraphAttention(nn.Module):
  """Attention between the nodes of one graph.

    a_ij = softmax_j(w . tanh(A (x_i * x_j)) / temperature)
    y_i  = selu(norm(P sum over j of a_ij x_j + Q x_i))

  Dropout in training is that of x, before all else.
  """

  width: int
  temperature: float
  dropout: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], *, train: bool
  ) -> Float[Array, "B N E"]:
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    pairs = x[:, :, None] * x[:, None]
    weight = self.param("att_weight", WEIGHT_INIT, (self.width, 1))
    scores = jnp.tanh(dense(pairs, self.width, "att_proj")) @ weight
    attention = jax.nn.softmax(scores[..., 0] / self.temperature)
    y = dense(attention @ x, self.width, "proj_with_att")
    y = y + dense(x, self.width, "proj_without_att")
    return nn.selu(batch_norm("norm")(y, train=train))


class HeteroAttention(nn.Module):
  """Attention within and between two graphs, and from both to a master node.

    x    = [P_1 temporal; P_2 spectral]
    a_ij = softmax_j(w_kind(i,j) . tanh(A (x_i * x_j)) / temperature)
    y_i  = selu(norm(P sum over j of a_ij x_j + Q x_i))
    m'   = M sum over i of b_i x_i + N m,
    b_i  = softmax_i(w_m . tanh(B (x_i * m)) / temperature)

  The weights w differ between pairs within a graph and pairs across.
  """

  width: int
  temperature: float
  dropout: float

  @nn.compact
  def __call__(
    self,
    temporal: Float[Array, "B T D"],
    spectral: Float[Array, "B S D"],
    master: Float[Array, "B 1 D"],
    *,
    train: bool,
  ) -> tuple[
    Float[Array, "B T E"], Float[Array, "B S E"], Float[Array, "B 1 E"]
  ]:
    num_temporal, depth = temporal.shape[1:]
    temporal = dense(temporal, depth, "proj_temporal")
    spectral = dense(spectral, depth, "proj_spectral")
    x = jnp.concatenate([temporal, spectral], axis=1)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    master = self._update_master(x, master)

    shape = (self.width, 1)
    weights = jnp.stack(
      [
        self.param(f"att_weight_{kind}", WEIGHT_INIT, shape)[:, 0]
        for kind in ("temporal", "across", "spectral")
      ]
    )
    is_spectral = (jnp.arange(x.shape[1]) >= num_temporal).astype(int)
    weights = weights[is_spectral[:, None] + is_spectral]
    pairs = jnp.tanh(dense(x[:, :, None] * x[:, None], self.width, "att_proj"))
    scores = jnp.einsum("bijd,ijd->bij", pairs, weights)
    attention = jax.nn.softmax(scores / self.temperature)
    y = dense(attention @ x, self.width, "proj_with_att")
    y = y + dense(x, self.width, "proj_without_att")
    y = nn.selu(batch_norm("norm")(y, train=train))
    return y[:, :num_temporal], y[:, num_temporal:], master

  def _update_master(
    self, x: Float[Array, "B N D"], master: Float[Array, "B 1 D"]
  ) -> Float[Array, "B 1 E"]:
    weight = self.param("att_weight_master", WEIGHT_INIT, (self.width, 1))
    hidden = jnp.tanh(dense(x * master, self.width, "att_proj_master"))
    attention = jax.nn.softmax(hidden @ weight / self.temperature, axis=1)
    gathered = attention.swapaxes(1, 2) @ x
    return dense(gathered, self.width, "proj_with_att_master") + dense(
      master, self.width, "proj_without_att_master"
    )


class GraphPool(nn.Module):
  """Keeps the nodes with the highest scores, highest first.

    s_i = sigmoid(w . x_i + b);   y = s_i x_i of the int(N ratio) best nodes

  The order counts: the branches are later compared node by node. Dropout in
  training changes the scores alone.
  """

  ratio: float
  dropout: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "B N D"], *, train: bool
  ) -> Float[Array, "B M D"]:
    dropped = nn.Dropout(self.dropout)(x, deterministic=not train)
    scores = jax.nn.sigmoid(dense(dropped, 1, "proj"))
    kept = max(int(x.shape[1] * self.ratio), 1)
    _, ids = jax.lax.top_k(scores[..., 0], kept)
    return jnp.take_along_axis(x * scores, ids[:, :, None], axis=1)


class Branch(nn.Module):
  """Attention between the graphs, pooling, and attention again, added on."""

  width: int
  temperature: float
  pool_ratio: float
  input_dropout: float
  pool_dropout: float

  @nn.compact
  def __call__(
    self,
    temporal: Float[Array, "B T D"],
    spectral: Float[Array, "B S D"],
    *,
    train: bool,
  ) -> tuple[
    Float[Array, "B _ E"], Float[Array, "B _ E"], Float[Array, "B 1 E"]
  ]:
    batch, _, depth = temporal.shape
    master = self.param("master", NODE_INIT, (1, 1, depth))
    master = jnp.broadcast_to(master, (batch, 1, depth))
    graphs = [
      HeteroAttention(
        self.width, self.temperature, self.input_dropout, name=f"graph_{i}"
      )
      for i in range(2)
    ]
    nodes = graphs[0](temporal, spectral, master, train=train)
    temporal, spectral = (
      GraphPool(self.pool_ratio, self.pool_dropout, name=f"pool_{name}")(
        x, train=train
      )
      for name, x in zip(("temporal", "spectral"), nodes[:2], strict=True)
    )
    nodes = (temporal, spectral, nodes[2])
    added = graphs[1](*nodes, train=train)
    return tuple(x + y for x, y in zip(nodes, added, strict=True))


def batch_norm(name: str) -> BatchNorm:
  """Returns a batch normalisation with the settings of PyTorch."""
  return BatchNorm(momentum=0.9, epsilon=1e-5, trainable_bias=True, name=name)


def dense(x: Float[Array, "*B C"], features: int, name: str) -> jax.Array:
  """Applies a linear layer of the calling module, drawn as in PyTorch."""
  bias_init = symmetric(x.shape[-1] ** -0.5)
  return nn.Dense(
    features, kernel_init=TORCH_INIT, bias_init=bias_init, name=name
  )(x)


def symmetric(bound: float) -> nn.initializers.Initializer:
  """Draws from U(-bound, bound)."""
  return lambda key, shape, dtype: jax.random.uniform(
    key, shape, dtype, -bound, bound
  )
