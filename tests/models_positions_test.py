import re

import numpy as np
import pytest

from audiomosaic_jax import masking
from audiomosaic_jax.models import positions

# Frames before and after, and how PyTorch's own rounding limits agreement.
RESIZED = {
  "loader/1024_to_128": ("released", 2e-7),
  "loader/1024_to_256": ("released", 2e-7),
  "loader/1024_to_512": ("released", 2e-7),
  "loader/1024_to_1024": ("released", 0),
  "loader/512_to_1024": ("released", 2e-7),
  "probe_loader/1024_to_512": ("released", 2e-7),
  "true_grid/1024_to_128": ("paper", 2e-7),
  "true_grid/1024_to_256": ("paper", 2e-7),
  "true_grid/1024_to_512": ("paper", 2e-7),
  "true_grid/1024_to_192": ("paper", 2e-5),
}


def grid(num_frames):
  return masking.grid_shape(int(num_frames), 128, 16)


def resize(table, old, new, layout="paper", method="bilinear"):
  return positions.resize_positions(
    table, old, new, layout=layout, method=method
  )


def smooth_table(old, new):
  """Tables of both grids that hold the time and the frequency of a patch."""
  return [
    np.stack(
      np.meshgrid(
        (np.arange(t) + 0.5) / t, (np.arange(f) + 0.5) / f, indexing="ij"
      ),
      axis=-1,
    ).reshape(1, t * f, 2)
    for t, f in (old, new)
  ]


def test_sincos_tables_equal_the_published_ones(golden):
  z = golden("posembed.npz")
  names = [k for k in z.files if k.startswith("sincos/")]
  assert len(names) == 5
  for name in names:
    h, w, d = map(
      int, re.fullmatch(r"sincos/h(\d+)_w(\d+)_d(\d+)", name).groups()
    )
    # Bit for bit on some processors: others round the power differently.
    table = positions.sincos_table(h, w, d)
    np.testing.assert_allclose(table, z[name][1:], rtol=0, atol=4e-6)


def test_paper_positions_make_neighbours_in_time_and_frequency_alike():
  table = positions.sincos_table(64, 8, 768).reshape(64, 8, 768)
  table /= np.linalg.norm(table, axis=-1, keepdims=True)
  one_step_later = np.sum(table[20, 3] * table[21, 3])
  one_band_up = np.sum(table[20, 3] * table[20, 4])
  np.testing.assert_allclose(one_step_later, one_band_up, atol=1e-5)
  assert one_step_later > 0.98


@pytest.mark.parametrize("name", RESIZED)
def test_resized_positions_equal_those_of_pytorch(golden, name):
  z = golden("posembed.npz")
  old, new = re.search(r"(\d+)_to_(\d+)", name).groups()
  table = {"1024": z["pos_1024"], "512": z["loader/1024_to_512"]}[old]
  layout, atol = RESIZED[name]
  resized = resize(table, grid(old), grid(new), layout)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, z[name], atol=atol, rtol=0)


def test_every_stored_resize_is_compared(golden):
  stored = {k for k in golden("posembed.npz").files if "_to_" in k}
  special = {"loader/1024_to_512_to_128", "loader/1024_to_192"}
  assert stored == set(RESIZED) | special


def test_resizing_twice_equals_the_published_loader_run_twice(golden):
  z = golden("posembed.npz")
  half = resize(z["pos_1024"], grid(1024), grid(512), "released")
  twice = resize(half, grid(512), grid(128), "released")
  np.testing.assert_allclose(
    twice, z["loader/1024_to_512_to_128"], atol=2e-7, rtol=0
  )


def test_both_layouts_agree_where_the_new_grid_is_square(golden):
  table = golden("posembed.npz")["pos_1024"]
  np.testing.assert_array_equal(
    resize(table, grid(1024), grid(128), "paper"),
    resize(table, grid(1024), grid(128), "released"),
  )
  different = resize(table, grid(1024), grid(512), "paper") - resize(
    table, grid(1024), grid(512), "released"
  )
  assert np.abs(different).max() > 3


@pytest.mark.parametrize("method", positions.METHODS)
@pytest.mark.parametrize("layout", positions.LAYOUTS)
def test_the_same_grid_changes_nothing(golden, method, layout):
  table = golden("posembed.npz")["pos_1024"]
  np.testing.assert_array_equal(
    resize(table, (64, 8), (64, 8), layout, method), table
  )


@pytest.mark.parametrize("new", [(12, 8), (63, 8), (100, 5), (1, 1)])
def test_bilinear_is_exact_for_what_is_linear_in_time_and_frequency(new):
  old = (20, 10)
  table, expected = smooth_table(old, new)
  resized = resize(table, old, new)
  inside = (np.abs(expected - 0.5) < 0.5 - 2 / np.array(old)).all(-1)
  assert inside.any()
  np.testing.assert_allclose(resized[inside], expected[inside], atol=1e-12)


def test_bicubic_has_the_weights_of_pytorch():
  impulses = np.eye(9)[None]
  doubled = resize(impulses, (9, 1), (18, 1), method="bicubic")[0]
  weights = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
  np.testing.assert_allclose(doubled[9, 3:7], weights, atol=1e-12)
  np.testing.assert_allclose(doubled[8, 2:6], weights[::-1], atol=1e-12)
  np.testing.assert_allclose(doubled.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("new", [(12, 8), (63, 8), (100, 5)])
def test_interpolation_knows_no_direction(golden, method, new):
  table = golden("posembed.npz")["pos_1024"][:, 1:]
  backwards = resize(table[:, ::-1], (64, 8), new, method=method)
  np.testing.assert_allclose(
    backwards[:, ::-1], resize(table, (64, 8), new, method=method), atol=1e-5
  )


def test_cropping_keeps_the_first_patches_and_the_class_token(golden):
  table = golden("posembed.npz")["pos_1024"]
  cropped = resize(table, (64, 8), (20, 6), method="crop")
  np.testing.assert_array_equal(cropped[:, 0], table[:, 0])
  np.testing.assert_array_equal(
    cropped[0, 1:].reshape(20, 6, -1),
    table[0, 1:].reshape(64, 8, -1)[:20, :6],
  )


@pytest.mark.parametrize("method", positions.METHODS)
def test_a_class_token_is_kept_and_needs_no_place_in_the_grid(golden, method):
  table = golden("posembed.npz")["pos_1024"]
  with_token = resize(table, (64, 8), (30, 8), method=method)
  without = resize(table[:, 1:], (64, 8), (30, 8), method=method)
  np.testing.assert_array_equal(with_token[:, 0], table[:, 0])
  np.testing.assert_array_equal(with_token[:, 1:], without)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layout": "true"}, "layout 'true' is unknown.*'released'"),
    ({"method": "nearest"}, "method 'nearest' is unknown.*'bicubic'"),
    ({"old": (32, 8)}, r"513 rows, but grid \(32, 8\) needs 256, or 257"),
    (
      {"new": (12, 8), "layout": "released"},
      r"512 positions as rows of 12.*grid \(12, 8\); use layout 'paper'",
    ),
    (
      {"new": (65, 8), "method": "crop"},
      r"grid \(64, 8\) to the larger \(65, 8\); use method 'bilinear'",
    ),
  ],
)
def test_errors_name_both_values_and_the_fix(golden, changes, message):
  table = golden("posembed.npz")["pos_1024"]
  arguments = {"table": table, "old": (64, 8), "new": (32, 8)} | changes
  with pytest.raises(ValueError, match=message):
    resize(**arguments)
