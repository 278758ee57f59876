"""Rotary position embeddings: channel pairs turn with the position.

  pair i of a head turns by  position * theta ** (-2 i / D)

The variants for long texts slow the turning. Angles are float32, frequencies
computed in float64.

Reference: Su et al. 2021 (arXiv 2104.09864); channels are paired (i, i + D/2)
as in transformers.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rotate(
  x: Float[Array, "B T N D"], angles: Float[Array, "B T half"]
) -> Float[Array, "B T N D"]:
  """Turns channel pairs (i, i + D/2) by their angles, in float32."""
  sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)


def rope_frequencies(
  head_dim: int, kind: str, theta: float, scaling: tuple[float, ...]
) -> Float[np.ndarray, "half"]:
  """Returns radians per position of each channel pair, computed in float64."""
  exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  return ROPE[kind](theta**-exponents, *scaling).astype(np.float32)


def _llama3(frequencies, factor, low, high, original_length):
  """Slows what turns rarely by `factor`, with a ramp to what turns often."""
  turns = original_length * frequencies / (2 * math.pi)
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return (1 - keep) * frequencies / factor + keep * frequencies


ROPE = {
  "default": lambda frequencies: frequencies,
  "linear": lambda frequencies, factor: frequencies / factor,
  "llama3": _llama3,
}
