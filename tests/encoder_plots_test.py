"""Pictures of an encoder show the numbers they were given."""

import numpy as np
import pytest

from audiomosaic_jax import encoder_plots

MEL = {"frame_shift_ms": 10.0, "low_freq_hz": 20.0, "high_freq_hz": 8000.0}


def fbank(*, frames=64, bins=32):
  return np.random.default_rng(0).normal(size=(frames, bins)).astype("float32")


@pytest.mark.parametrize("count", [3, 7])
def test_each_class_has_a_panel_with_its_points_among_the_others(count):
  rng = np.random.default_rng(0)
  points, labels = rng.normal(size=(40, 2)), np.arange(40) % count
  figure = encoder_plots.plot_map(
    points,
    labels,
    [f"class {i}" for i in range(count)],
    xlabel="first",
    ylabel="second",
  )
  for i, ax in enumerate(figure.axes[:count]):
    others, own = (dots.get_offsets() for dots in ax.collections)
    np.testing.assert_array_equal(own, points[labels == i])
    np.testing.assert_array_equal(others, points[labels != i])
    assert ax.get_title(loc="left") == f"class {i} ({(labels == i).sum()})"
  assert not any(ax.axison for ax in figure.axes[count:])
  assert figure.get_supxlabel() == "first"


def test_self_similarity_is_the_cosine_about_the_mean():
  frames = np.array([[2.0, 0.0], [0.0, 2.0], [4.0, 4.0]], np.float32)
  found = encoder_plots.self_similarity(frames)
  # Their mean is (2, 2): the three point to (0, -2), (-2, 0) and (2, 2).
  half = -np.sqrt(0.5)
  expected = [[1, 0, half], [0, 1, half], [half, half, 1]]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  again = encoder_plots.self_similarity(3 * frames + 7)
  np.testing.assert_allclose(again, found, atol=1e-6)


def test_frames_that_are_all_alike_have_no_similarity():
  found = encoder_plots.self_similarity(np.ones((4, 3), np.float32))
  np.testing.assert_array_equal(found, np.zeros((4, 4)))


def test_a_moment_is_drawn_at_its_time_in_both_panels():
  frames = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
  times = np.array([0.08, 0.24, 0.40, 0.56])
  figure = encoder_plots.plot_self_similarity(fbank(), frames, times, **MEL)
  top, ax = figure.axes[:2]
  assert top.get_xlim() == ax.get_xlim() == (0, 0.64)
  assert ax.get_ylim() == (0.64, 0)  # Time goes down, as it goes right.
  (image,) = ax.images
  np.testing.assert_allclose(image.get_extent(), (0, 0.64, 0.64, 0), atol=1e-9)
  expected = encoder_plots.self_similarity(frames)
  np.testing.assert_array_equal(image.get_array(), expected)


def test_what_a_head_looks_at_most_has_full_colour():
  weights = np.zeros((2, 4, 2))  # Two heads, 4 x 2 patches of 16.
  weights[0, 3, 1] = 0.5
  weights[0, 0, 0] = 0.25
  weights[1] = 1 / 8
  figure = encoder_plots.plot_attention(
    {"clip": fbank()}, {"clip": weights}, **MEL
  )
  sound, first, second = figure.axes
  assert sound.images[0].get_alpha() is None
  alpha = first.images[0].get_alpha()
  assert alpha.shape == (32, 64)  # Frequency, then time.
  assert (alpha[16:, 48:] == 1).all() and (alpha[:16, :16] == 0.5).all()
  assert alpha.sum() == 256 * 1.5
  assert (second.images[0].get_alpha() == 1).all()
  titles = [ax.get_title() for ax in figure.axes]
  assert titles == ["log-mel spectrogram", "head 1", "head 2"]
  figure.canvas.draw()


def test_many_heads_fit_the_width_of_a_page():
  weights = np.ones((12, 4, 2))
  figure = encoder_plots.plot_attention(
    {"clip": fbank()}, {"clip": weights}, **MEL
  )
  assert len(figure.axes) == 13
  assert figure.get_size_inches()[0] < 15
