"""Fingerprints of arrays: equal for equal bits, wherever the array lies.

The words x_i of an array, 32 bits each, are mixed with their place and added:

  sum_i mix(x_i ^ mix(i ^ seed))  mod 2**32

`mix` is a permutation of the 32-bit words that looks random. So a change of a
single element changes the sum for certain, and any other change, a swap or a
sign turned everywhere, leaves it with a probability of 2**-32. Two seeds make
64 bits. Integers add up to the same sum in any order: one device, eight
devices and two hosts agree to the bit, and only sums leave the devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Any two different numbers do; saved fingerprints depend on them.
_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def of_leaves(leaves: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
  """Returns the fingerprint of every array, waiting for the device once.

  Args:
    leaves: name -> array of any shape. An array of JAX is read where it lies,
      on any devices; every process that holds a part of it calls this with the
      same names. One of NumPy is read by the host, which compiles nothing.

  Returns:
    name -> dtype, shape and 64 bits, such as "float32[2,3]:00c0ffee12345678".

  Raises:
    ValueError: an element has other than 8, 16, 32 or 64 bits.
  """
  sums = jax.device_get({name: _sums(leaf) for name, leaf in leaves.items()})
  return {
    name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]:"
    + "".join(f"{int(part):08x}" for part in sums[name])
    for name, leaf in leaves.items()
  }


def _sums(leaf: jax.Array | np.ndarray) -> tuple:
  """Returns the sum of the mixed words for each seed."""
  if isinstance(leaf, np.ndarray):
    return _mixed_sums(np, _words_on_host(leaf))
  return _sums_on_device(leaf)


@jax.jit
def _sums_on_device(leaf: jax.Array) -> tuple[jax.Array, ...]:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == bool:
    leaf = leaf.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(leaf, _word_type(leaf))
  return _mixed_sums(jnp, words.astype(jnp.uint32))


def _words_on_host(leaf: np.ndarray) -> np.ndarray:
  word = np.uint8 if leaf.dtype == bool else _word_type(leaf)
  # Of 64 bits two words, as on the device.
  parts = leaf.dtype.itemsize // np.dtype(word).itemsize
  shape = leaf.shape if parts == 1 else (*leaf.shape, parts)
  return np.ascontiguousarray(leaf).view(word).reshape(shape).astype(np.uint32)


def _word_type(leaf: jax.Array | np.ndarray) -> type:
  """Returns what an element is read as, once or twice."""
  types = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint32}
  bits = jax.dtypes.itemsize_bits(leaf.dtype)
  if bits not in types or jnp.iscomplexobj(leaf):
    raise ValueError(
      f"no fingerprint for {leaf.dtype} of shape {leaf.shape}; use real "
      "numbers of 8, 16, 32 or 64 bits"
    )
  return types[bits]


def _mixed_sums(xp: Any, words: jax.Array | np.ndarray) -> tuple:
  """Returns the sums of NumPy or of JAX, whose arithmetic is the same here."""
  # An axis at least: NumPy warns of scalars that overflow, as these shall.
  words, index = words.reshape(words.shape or (1,)), xp.zeros((), xp.uint32)
  for axis, size in enumerate(words.shape):
    along = [1] * words.ndim
    along[axis] = size
    place = xp.arange(size, dtype=xp.uint32).reshape(along)
    index = index * xp.asarray(size % 2**32, xp.uint32) + place
  return tuple(
    xp.sum(
      _mix(words ^ _mix(index ^ xp.asarray(seed, xp.uint32))), dtype=xp.uint32
    )
    for seed in _SEEDS
  )


def _mix(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """Returns another word for every word: the finaliser of MurmurHash3."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
