"""Batch normalisation as PyTorch does it, over the global batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class BatchNorm(nn.Module):
  """Batch normalisation with the running statistics of PyTorch.

    y = (x - mean) / sqrt(var + eps) * scale + bias
    running <- momentum * running + (1 - momentum) * batch

  The batch is normalised by its biased variance; the running variance takes
  the unbiased one, n / (n - 1) times larger. Flax's own BatchNorm keeps the
  biased one, 20 % off at batch 6. The mean is over all axes but the last: under
  `jax.jit` with a sharded batch that is the global batch, with no axis name.

  Attributes:
    momentum: share of the running statistics that stays, PyTorch's 1 - m.
    epsilon: added to the variance.
    trainable_bias: False freezes the bias where it is (initially 0).

  Reference: torch.nn.BatchNorm1d and, with the channels moved last,
    BatchNorm2d; outputs and statistics equal to 1e-6.
  """

  momentum: float
  epsilon: float
  trainable_bias: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "*B C"], *, train: bool
  ) -> Float[Array, "*B C"]:
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
      axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
      mean, var = jnp.mean(x, axes), jnp.var(x, axes)
      if not self.is_initializing():
        unbiased = var * (count / max(count - 1, 1))
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
          running.value += (1 - self.momentum) * (batch - running.value)
    return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias
