"""Fingerprints see every bit, and do not see where an array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import fingerprint, sharding

DTYPES = ("float32", "float16", "bfloat16", "int32", "uint8", "int8", "bool")


def of(leaf) -> str:
  return fingerprint.of_leaves({"leaf": leaf})["leaf"]


def random_array(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns random bits, for floats also NaNs and denormal numbers."""
  rng = np.random.default_rng(0)
  if dtype == "bool":
    return rng.integers(0, 2, shape).astype(bool)
  kind = jnp.dtype(dtype)
  content = rng.bytes(int(np.prod(shape)) * kind.itemsize)
  return np.frombuffer(content, kind).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_flipped_bit_changes_the_fingerprint(dtype):
  array = random_array(dtype, (3, 2))
  bits = 1 if dtype == "bool" else 8
  seen = {of(array)}
  for byte in range(array.nbytes):
    for bit in range(bits):
      flipped = array.copy()
      flipped.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
      seen.add(of(flipped))
  assert len(seen) == 1 + array.nbytes * bits


def test_a_flipped_bit_of_a_large_array_changes_both_sums():
  array = random_array("float32", (7, 11, 13))
  before = of(array).partition(":")[2]
  for position in range(0, array.size, 97):
    for bit in (0, 15, 31):
      flipped = array.copy()
      flipped.reshape(-1).view(np.uint32)[position] ^= np.uint32(1 << bit)
      after = of(flipped).partition(":")[2]
      assert after[:8] != before[:8] and after[8:] != before[8:]


def test_signs_that_turn_together_are_seen():
  array = random_array("float32", (4, 4))
  seen = {of(array)}
  for turned in range(1, 2**8):
    signs = [-1 if turned >> i & 1 else 1 for i in range(8)] * 2
    seen.add(of(array * np.reshape(signs, (4, 4)).astype(np.float32)))
  assert len(seen) == 2**8


def test_no_two_elements_can_be_swapped():
  array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  seen = {of(array)}
  pairs = [(i, j) for i in range(24) for j in range(i)]
  for i, j in pairs:
    swapped = array.copy().reshape(-1)
    swapped[[i, j]] = swapped[[j, i]]
    seen.add(of(swapped.reshape(array.shape)))
  assert len(seen) == 1 + len(pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_devices_finds_what_one_finds(dtype):
  array = random_array(dtype, (16, 3))
  found = {of(array), of(jnp.asarray(array))}
  for num_devices in (1, 2, 8):
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    for layout in (sharding.replicated, sharding.batch_sharded):
      found.add(of(jax.device_put(array, layout(mesh))))
  assert len(found) == 1


def test_a_fingerprint_is_the_sum_that_the_definition_says():
  def mix(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16

  array = random_array("float32", (5, 7))
  words = [int(word) for word in array.reshape(-1).view(np.uint32)]
  sums = [
    sum(mix(word ^ mix(i ^ seed)) for i, word in enumerate(words)) % 2**32
    for seed in (0x9E3779B9, 0x7F4A7C15)
  ]
  # Written down, as what is saved must be understood by later versions.
  assert of(array) == f"float32[5,7]:{sums[0]:08x}{sums[1]:08x}"


def test_the_same_bits_in_another_type_or_shape_are_something_else():
  zeros = [
    jnp.zeros(shape, dtype)
    for shape in ((), (1,), (4,), (2, 2), (0,))
    for dtype in ("float32", "int32", "bfloat16", "bool")
  ]
  assert len({of(leaf) for leaf in zeros}) == len(zeros)


def test_keys_have_the_fingerprint_of_their_bits():
  keys = jax.random.split(jax.random.key(3), 4)
  assert of(keys).startswith("key<fry>[4]:")
  data = of(jax.random.key_data(keys))
  assert of(keys).partition(":")[2] == data.partition(":")[2]
  seen = {of(keys)}
  for bit in range(32):
    flipped = (
      jax.random.key_data(keys)
      .at[2, 1]
      .set(jax.random.key_data(keys)[2, 1] ^ np.uint32(1 << bit))
    )
    seen.add(of(jax.random.wrap_key_data(flipped)))
  assert len(seen) == 33


def test_leaves_on_different_devices_are_read_together():
  first, second = jax.devices()[:2]
  array = random_array("float32", (4, 3))
  found = fingerprint.of_leaves(
    {"a": jax.device_put(array, first), "b": jax.device_put(array, second)}
  )
  assert found["a"] == found["b"] == of(array)


def test_what_has_no_words_is_refused():
  with pytest.raises(ValueError, match=r"complex64 of shape \(2,\).*32"):
    of(jnp.zeros(2, jnp.complex64))
