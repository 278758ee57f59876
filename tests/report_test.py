"""The report is one file that stands alone and says what the numbers say."""

import html.parser
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from audiomosaic_jax import report, tables

RUNS = {
  "seed 0": [{"step": 10, "loss": 4.0, "knn": 0.2}, {"step": 20, "loss": 2.0}],
  "seed 1": [{"step": 10, "loss": 2.0, "knn": 0.4}, {"step": 30, "loss": 1.0}],
}


def fbank(*, frames=64, bins=32):
  return np.random.default_rng(0).normal(size=(frames, bins)).astype("float32")


def texts(ax):
  return [text.get_text() for text in ax.texts]


def test_curves_show_the_mean_of_the_steps_that_all_runs_have():
  figure = report.plot_curves(
    RUNS, panels={"loss": "NT-Xent loss", "knn": "kNN"}, baselines={}
  )
  loss, knn = figure.axes
  assert loss.get_ylabel() == "NT-Xent loss"
  np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[10, 3.0]])
  np.testing.assert_allclose(knn.lines[0].get_xydata(), [[10, 0.3]])


def test_curves_of_a_metric_that_was_never_written_are_empty():
  for runs in (RUNS, {}):
    figure = report.plot_curves(runs, panels={"lid": "LID"}, baselines={})
    assert not figure.axes[0].lines


def test_probes_are_compared_with_labelled_baselines():
  figure = report.plot_probes(
    RUNS,
    metrics={"knn": "kNN", "ridge": "ridge"},
    baselines={"chance": 0.1},
    ylabel="balanced accuracy",
  )
  (ax,) = figure.axes
  assert texts(ax) == ["chance 0.100"]
  assert ax.lines[-1].get_ydata() == [0.1, 0.1]
  assert [t.get_text() for t in ax.get_legend().get_texts()] == ["kNN"]


def test_masks_hide_exactly_the_tokens_that_are_removed():
  spectrogram = fbank()
  # A grid of 4 time x 2 freq patches: token n = 2 t + f.
  figure = report.plot_masks(
    spectrogram,
    {"Time masking": np.array([2, 3]), "Frequency masking": np.arange(0, 8, 2)},
    patch_size=16,
    frame_shift_ms=10,
    low_freq_hz=20,
    high_freq_hz=8000,
  )
  whole, time, freq = (ax.images[0].get_array() for ax in figure.axes)
  assert whole.shape == (32, 64)
  assert not np.ma.getmaskarray(whole).any()
  wanted = np.ones((32, 64), bool)
  wanted[:, 16:32] = False
  np.testing.assert_array_equal(np.ma.getmaskarray(time), wanted)
  wanted = np.ones((32, 64), bool)
  wanted[:16] = False
  np.testing.assert_array_equal(np.ma.getmaskarray(freq), wanted)
  assert "2 of 8 tokens stay" in figure.axes[1].get_title(loc="left")
  assert figure.axes[-1].get_xlim() == (0, 0.64)
  assert figure.axes[-1].get_xlabel() == "time (s)"


def test_frequency_labels_sit_at_the_centres_of_the_mel_bins():
  figure = report.plot_masks(
    fbank(bins=128, frames=128),
    {},
    patch_size=16,
    frame_shift_ms=10,
    low_freq_hz=0,
    high_freq_hz=8000,
  )
  (ax,) = figure.axes
  labels = [label.get_text() for label in ax.get_yticklabels()]
  assert labels == ["250 Hz", "500 Hz", "1 kHz", "2 kHz", "4 kHz"]
  # HTK's mel scale: 1 kHz is mel 1000 of 2840 up to 8 kHz.
  one_khz = ax.get_yticks()[labels.index("1 kHz")]
  np.testing.assert_allclose((one_khz + 0.5) / 129, 1000 / 2840, atol=1e-4)


def test_neighbours_are_the_most_similar_other_clips():
  embeddings = np.array([[2.0, 0], [1, 0.1], [0, 3], [0.1, 1]])
  ids, cosine = report.nearest_neighbours(embeddings, [0, 3], 2)
  np.testing.assert_array_equal(ids, [[1, 3], [2, 1]])
  np.testing.assert_allclose(cosine[0, 0], 1 / np.hypot(1, 0.1))


def test_neighbours_of_the_same_label_are_ticked():
  embeddings = np.array([[2.0, 0], [1, 0.1], [0, 3], [0.1, 1]])
  clips = np.stack([fbank()] * 4)
  clips[1, 40:] = 0.5  # padding
  figure = report.plot_neighbours(
    clips,
    embeddings,
    ["piano", "piano", "harp", "bass"],
    queries=[0],
    k=2,
    frame_shift_ms=10,
  )
  titles = [ax.get_title() for ax in figure.axes]
  assert titles == ["piano", "✓ piano", "✗ bass"]
  hidden = np.ma.getmaskarray(figure.axes[1].images[0].get_array())
  assert hidden[:, 40:].all()
  assert not hidden[:, :40].any()


def test_a_silent_spectrogram_can_be_drawn():
  figure = report.plot_neighbours(
    np.zeros((2, 64, 32), "float32"),
    np.ones((2, 3)),
    ["a", "b"],
    queries=[0],
    k=1,
    frame_shift_ms=10.0,
  )
  figure.canvas.draw()
  images = [image for axes in figure.axes for image in axes.images]
  assert len(images) == 2
  assert all(np.isfinite(image.get_clim()).all() for image in images)


def test_the_table_shows_mean_and_sample_deviation():
  table = tables.comparison_table(
    "scores",
    {"ours": {"kNN": [0.4, 0.6], "ridge": [0.5]}, "log-mel": {"ridge": [1]}},
  )
  assert table.columns == ["method", "kNN", "ridge"]
  assert table.rows == [
    ["ours", "0.500 ± 0.141", "0.500"],
    ["log-mel", "-", "1.000"],
  ]


class Page(html.parser.HTMLParser):
  """Collects tags, their attributes and the text."""

  def __init__(self, source):
    super().__init__()
    self.tags, self.words = [], []
    self.feed(source)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_data(self, data):
    self.words.append(data)


@pytest.fixture
def page(tmp_path):
  path = report.write_report(
    tmp_path / "report.html",
    title="<script>alert(1)</script>",
    figures={'Loss & "accuracy"': Figure(figsize=(1, 1))},
    tables=[tables.Table("<b>", ["<i>"], [["<u>"]])],
    text=["a < b"],
  )
  assert path == tmp_path / "report.html"
  return path.read_text()


def test_inserted_text_is_escaped(page):
  parsed = Page(page)
  tags = {tag for tag, _ in parsed.tags}
  assert not tags & {"script", "b", "i", "u"}
  words = "".join(parsed.words)
  for text in ("<script>", "<b>", "<i>", "<u>", "a < b", 'Loss & "accuracy"'):
    assert text in words


def test_the_page_needs_no_other_file(page, tmp_path):
  (image,) = [a for tag, a in Page(page).tags if tag == "img"]
  assert image["src"].startswith("data:image/png;base64,")
  assert image["alt"] == 'Loss & "accuracy"'
  assert not re.search(r"https?://|url\(|<link", page)
  written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
  assert written == ["loss_accuracy.png", "report.html"]


def test_plotting_opens_no_pyplot_figure():
  from matplotlib import pyplot

  before = pyplot.get_fignums()
  report.plot_curves(RUNS, panels={"loss": "loss"}, baselines={})
  assert pyplot.get_fignums() == before
