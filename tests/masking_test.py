import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiomosaic_jax import masking

GRID = (64, 8)
ENCODERS = ("encoder_a", "encoder_b", "encoder_c", "encoder_d")
# mode, ratio, tokens kept on the 64 x 8 grid by each layout
KEPT = (
  ("time", 0.6, {"paper": 25 * 8, "released": 3 * 64}),
  ("freq", 0.4, {"paper": 4 * 64, "released": 38 * 8}),
  ("random", 0.75, {"paper": 128, "released": 128}),
  ("time_freq", (0.5, 0.25), {"paper": 32 * 6, "released": 32 * 6}),
  ("none", 0.0, {"paper": 512, "released": 512}),
)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("mode", ["time", "freq", "random"])
def test_released_ids_order_and_mask_are_the_reference_ones(golden, name, mode):
  z = golden(f"{name}.npz")
  config = json.loads(str(z["cfg_json"]))
  ratio = {
    "time": config["mask_ratio_time"],
    "freq": config["mask_ratio_freq"],
    "random": config["mask_ratio"],
  }[mode]
  noise = jnp.asarray(z[f"{mode}/noise"])
  ids = masking.keep_ids_from_noise(
    (noise,),
    noise.shape[0],
    mode=mode,
    ratio=ratio,
    grid=tuple(config["true_grid_time_freq"]),
    layout="released",
  )
  np.testing.assert_array_equal(ids, z[f"{mode}/ids_keep"])
  assert ids.dtype == jnp.int32
  expected = z[f"{mode}/mask"]
  mask = masking.mask_from_keep_ids(ids, expected.shape[1])
  np.testing.assert_array_equal(mask, expected == 1)


@pytest.mark.parametrize("layout", masking.LAYOUTS)
@pytest.mark.parametrize(("mode", "ratio", "kept"), KEPT)
def test_every_mode_keeps_its_exact_number_of_distinct_tokens(
  layout, mode, ratio, kept
):
  ids = masking.keep_ids(
    jax.random.key(0), 3, mode=mode, ratio=ratio, grid=GRID, layout=layout
  )
  assert ids.shape == (3, kept[layout])
  for row in np.asarray(ids):
    assert len(set(row.tolist())) == len(row)
    assert row.min() >= 0
    assert row.max() < 512


def test_paper_time_mask_removes_whole_columns_of_the_spectrogram():
  ids = masking.keep_ids(
    jax.random.key(1), 4, mode="time", ratio=0.6, grid=GRID, layout="paper"
  )
  removed = np.asarray(masking.mask_from_keep_ids(ids, 512)).reshape(4, *GRID)
  assert (removed.all(2) | ~removed.any(2)).all()
  np.testing.assert_array_equal(removed.all(2).sum(1), 64 - 25)


def test_paper_freq_mask_removes_whole_bands_of_the_spectrogram():
  ids = masking.keep_ids(
    jax.random.key(1), 4, mode="freq", ratio=0.4, grid=GRID, layout="paper"
  )
  removed = np.asarray(masking.mask_from_keep_ids(ids, 512)).reshape(4, *GRID)
  assert (removed.all(1) | ~removed.any(1)).all()
  np.testing.assert_array_equal(removed.all(1).sum(1), 8 - 4)


def test_released_freq_mask_repeats_every_eight_time_patches():
  ids = masking.keep_ids(
    jax.random.key(1), 1, mode="freq", ratio=0.4, grid=GRID, layout="released"
  )
  mask = np.asarray(masking.mask_from_keep_ids(ids, 512)).reshape(8, 64)
  assert (mask == mask[0]).all()
  assert not mask.reshape(GRID).all(0).any(), "no band is removed as such"


def test_two_axis_mask_is_the_crossing_in_the_order_of_its_noise():
  noise = (jnp.array([[0.9, 0.1, 0.5, 0.3]]), jnp.array([[0.2, 0.8, 0.1]]))
  ids = masking.keep_ids_from_noise(
    noise, 1, mode="time_freq", ratio=(0.5, 0.3), grid=(4, 3), layout="released"
  )
  # rows 1 and 3 by noise, bands 2 and 0 by noise; three bands keep two.
  np.testing.assert_array_equal(ids[0], [5, 3, 11, 9])


@pytest.mark.parametrize(("mode", "ratio", "kept"), KEPT)
def test_jitted_ids_equal_plain_ids(mode, ratio, kept):
  def draw(key):
    return masking.keep_ids(
      key, 2, mode=mode, ratio=ratio, grid=GRID, layout="paper"
    )

  key = jax.random.key(5)
  np.testing.assert_array_equal(draw(key), jax.jit(draw)(key))


def test_examples_and_keys_get_masks_of_their_own():
  def draw(seed):
    return masking.keep_ids(
      jax.random.key(seed),
      8,
      mode="time",
      ratio=0.6,
      grid=GRID,
      layout="paper",
    )

  rows = {
    tuple(sorted(r)) for s in (0, 1) for r in np.asarray(draw(s)).tolist()
  }
  assert len(rows) == 16


def test_keep_counts_round_as_python_doubles_do():
  assert masking.num_kept(160, 0.9) == 15
  assert masking.num_kept(64, 0.6) == 25
  assert masking.num_kept(8, 0.4) == 4
  assert masking.num_kept(8, 0.6) == 3
  assert masking.num_kept(64, 0.4) == 38


def test_grid_is_time_by_frequency():
  assert masking.grid_shape(1024, 128, 16) == (64, 8)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: masking.grid_shape(1000, 128, 16), "1000.*16.*992 or 1008"),
    (lambda: masking.grid_shape(64, 8, 16), "8.*16.*16 or 32"),
    (lambda: masking.num_kept(8, 1.0), r"1\.0 is outside"),
    (
      lambda: masking.num_kept(8, 0.95),
      "0.95 keeps none of 8 positions; use at most 0.875",
    ),
    (
      lambda: masking.noise_shapes(2, mode="band", grid=GRID, layout="paper"),
      "'band' is unknown.*'freq'",
    ),
    (
      lambda: masking.noise_shapes(2, mode="time", grid=GRID, layout="true"),
      "'true' is unknown.*'released'",
    ),
    (
      lambda: masking.keep_ids_from_noise(
        (jnp.zeros((2, 8)),),
        2,
        mode="time",
        ratio=0.5,
        grid=GRID,
        layout="paper",
      ),
      r"\(\(2, 64\),\), got \(\(2, 8\),\)",
    ),
  ],
)
def test_errors_name_both_values_and_the_fix(call, message):
  with pytest.raises(ValueError, match=message):
    call()
