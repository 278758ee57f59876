"""Mixup: a clip becomes a mixture of two, and so do its labels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def mixup(
  key: Key[Array, ""],
  waveform: Float[Array, "B S"],
  targets: Float[Array, "B C"],
  *,
  p: float,
  alpha: float,
  beta: float,
) -> tuple[Float[Array, "B S"], Float[Array, "B C"]]:
  """Mixes clips with others of the batch, each with probability p.

    x_i' = l x_i + (1 - l) x_j,   t_i' = l t_i + (1 - l) t_j

  with l drawn from Beta(alpha, beta) for every clip. Targets of a class that
  both clips have add up; they are not the larger of the two.

  Differs from upstream: the partner j is another clip of the global batch, not
  of the whole data set, so nothing is decoded twice. All clips draw the same
  distance j - i: the partners are the batch, rotated, and every clip is the
  partner of one other.

  Args:
    key: random key.
    waveform: samples, each clip already augmented.
    targets: one row per clip.
    p: probability.
    alpha: first parameter of the Beta distribution.
    beta: its second parameter.

  Returns:
    (waveform, targets) of the same shapes.

  Reference: the mixup of the released fine-tuning, Beta(10, 10) with p 0.8.
  """
  batch = waveform.shape[0]
  if batch < 2 or not p:
    return waveform, targets
  key_apply, key_partner, key_share = jax.random.split(key, 3)
  distance = jax.random.randint(key_partner, (), 1, batch)
  share = jax.random.beta(key_share, alpha, beta, (batch, 1))
  share = jnp.where(jax.random.bernoulli(key_apply, p, (batch, 1)), share, 1.0)

  def mix(x):
    return share * x + (1 - share) * jnp.roll(x, distance, axis=0)

  return mix(waveform), mix(targets)
