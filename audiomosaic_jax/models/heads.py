"""What sits on top of the encoder: the projector of the contrastive loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from audiomosaic_jax.models.vit import DENSE_INIT


class BatchNorm(nn.Module):
  """Batch normalisation with the running statistics of PyTorch.

    y = (x - mean) / sqrt(var + eps) * scale + bias
    running <- momentum * running + (1 - momentum) * batch

  The batch is normalised by its biased variance; the running variance takes
  the unbiased one, B / (B - 1) times larger. Flax's own BatchNorm keeps the
  biased one, 20 % off at batch 6. The mean is over the whole axis: under
  `jax.jit` with a sharded batch that is the global batch, with no axis name.

  Attributes:
    momentum: share of the running statistics that stays, PyTorch's 1 - m.
    epsilon: added to the variance.
    trainable_bias: False freezes the bias where it is (initially 0).

  Reference: torch.nn.BatchNorm1d; outputs and statistics equal to 1e-6.
  """

  momentum: float
  epsilon: float
  trainable_bias: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "B C"], *, train: bool
  ) -> Float[Array, "B C"]:
    """Normalises by the batch when training, else by running statistics.

    Args:
      x: features, any float type; statistics and result are float32.
      train: use and record the statistics of this batch.

    Returns:
      Normalised features.
    """
    shape = x.shape[-1:]
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    running_var = self.variable("batch_stats", "var", jnp.ones, shape)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    if not self.trainable_bias:
      bias = jax.lax.stop_gradient(bias)

    x = x.astype(jnp.float32)
    mean, var = running_mean.value, running_var.value
    if train:
      mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)
      if not self.is_initializing():
        unbiased = var * (x.shape[0] / max(x.shape[0] - 1, 1))
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
          running.value += (1 - self.momentum) * (batch - running.value)
    return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias


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
