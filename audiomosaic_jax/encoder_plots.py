"""Pictures of what an encoder makes of sound: maps, similarity, attention.

Like those of `report.py`, they take numbers and return a `Figure` that needs
no display.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from audiomosaic_jax import report
from audiomosaic_jax.report import COLORS, GREY, INK

Number = report.Number
# Points that a panel of a map is not about.
OTHERS = "#D4D4D4"
COLUMNS = 5


def plot_map(
  points: Float[np.ndarray, "N 2"],
  labels: Int[np.ndarray, " N"],
  class_names: Sequence[str],
  *,
  xlabel: str,
  ylabel: str,
) -> Figure:
  """Shows where the clips of each class lie among all others.

  A panel for each class: ten colours on one map are told apart by nobody.

  Args:
    points: place of each clip on the map, such as two principal components.
    labels: class of each clip.
    class_names: name of each class.
    xlabel, ylabel: what the two coordinates are.
  """
  rows = -(-len(class_names) // COLUMNS)
  figure = Figure(figsize=(9.0, 0.5 + 2.0 * rows), layout="constrained")
  axes = figure.subplots(
    rows, COLUMNS, sharex=True, sharey=True, squeeze=False
  ).ravel()
  for ax in axes[len(class_names) :]:
    ax.set_axis_off()
  for index, name in enumerate(class_names):
    ax, own = axes[index], labels == index
    ax.scatter(*points[~own].T, s=6, color=OTHERS, linewidth=0)
    color = COLORS[index % len(COLORS)]
    ax.scatter(
      *points[own].T, s=20, color=color, edgecolor="white", linewidth=0.5
    )
    ax.set_title(f"{name} ({own.sum()})", fontsize=10, loc="left", color=INK)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color(OTHERS)
  figure.supxlabel(xlabel, fontsize=9, color=GREY)
  figure.supylabel(ylabel, fontsize=9, color=GREY)
  return figure


def self_similarity(
  frames: Float[np.ndarray, "N D"],
) -> Float[np.ndarray, "N N"]:
  """Returns the cosine of every two frames, after the mean is taken off.

  What all frames share says nothing of how they differ.
  """
  centred = frames - frames.mean(axis=0)
  norms = np.linalg.norm(centred, axis=1, keepdims=True)
  unit = centred / np.maximum(norms, 1e-12)
  return unit @ unit.T


def plot_self_similarity(
  fbank: Float[np.ndarray, "T F"],
  frames: Float[np.ndarray, "N D"],
  timestamps_s: Float[np.ndarray, " N"],
  *,
  frame_shift_ms: Number,
  low_freq_hz: Number,
  high_freq_hz: Number,
) -> Figure:
  """Shows which moments of a recording sound alike to the encoder.

  Args:
    fbank: log-mel energies of the recording.
    frames: of `Encoder.embed`.
    timestamps_s: their times, equally far apart.
    frame_shift_ms: distance of two rows of `fbank`.
    low_freq_hz, high_freq_hz: edges of the mel filter bank.
  """
  figure = Figure(figsize=(6.0, 7.2), layout="constrained")
  top, ax = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3.8))
  report.draw_spectrogram(
    top, fbank, removed=None, frame_shift_ms=frame_shift_ms
  )
  report.draw_mel_axis(top, fbank.shape[1], low_freq_hz, high_freq_hz)
  half = (timestamps_s[1] - timestamps_s[0]) / 2
  start, stop = timestamps_s[0] - half, timestamps_s[-1] + half
  image = ax.imshow(
    self_similarity(frames),
    extent=(start, stop, stop, start),
    aspect="auto",
    interpolation="nearest",
    cmap="viridis",
    vmin=-1,
    vmax=1,
  )
  seconds = len(fbank) * frame_shift_ms / 1000
  ax.set_xlim(0, seconds)
  ax.set_ylim(seconds, 0)
  ax.set_xlabel("time (s)", color=INK)
  ax.set_ylabel("time (s)", color=INK)
  ax.tick_params(colors=INK, labelsize=9)
  bar = figure.colorbar(
    image, ax=ax, orientation="horizontal", shrink=0.5, aspect=30, pad=0.02
  )
  bar.set_label("cosine of two frames, their mean taken off", color=INK)
  bar.outline.set_visible(False)
  return figure


def plot_attention(
  fbanks: Mapping[str, Float[np.ndarray, "T F"]],
  weights: Mapping[str, Float[np.ndarray, "H t f"]],
  *,
  frame_shift_ms: Number,
  low_freq_hz: Number,
  high_freq_hz: Number,
) -> Figure:
  """Shows the sound that each head looks at: the less, the greyer.

  Args:
    fbanks: clip -> log-mel energies of a window.
    weights: clip -> attention that each head pays to each patch; the largest
      of a head is drawn in full colour.
    frame_shift_ms: distance of two rows of a spectrogram.
    low_freq_hz, high_freq_hz: edges of the mel filter bank.
  """
  heads = len(next(iter(weights.values())))
  panel = min(1.7, 13 / (1 + heads))
  size = (1.2 + panel * (1 + heads), 0.5 + 1.7 * len(fbanks))
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(
    len(fbanks), 1 + heads, sharex=True, sharey=True, squeeze=False
  )
  for row, (name, fbank) in enumerate(fbanks.items()):
    for column, ax in enumerate(axes[row]):
      report.draw_spectrogram(
        ax, fbank, removed=None, frame_shift_ms=frame_shift_ms
      )
      if column:
        paid = weights[name][column - 1]
        repeats = (n // m for n, m in zip(fbank.shape, paid.shape, strict=True))
        for axis, times in enumerate(repeats):
          paid = paid.repeat(times, axis)
        ax.images[0].set_alpha(paid.T / paid.max())
      report.draw_mel_axis(ax, fbank.shape[1], low_freq_hz, high_freq_hz)
      if column:
        ax.tick_params(left=False)
    axes[row, 0].set_ylabel(name, color=INK)
  titles = ["log-mel spectrogram", *(f"head {h + 1}" for h in range(heads))]
  for ax, title in zip(axes[0], titles, strict=True):
    ax.set_title(title, fontsize=10, color=INK)
  figure.supxlabel("time (s)", fontsize=10, color=INK)
  return figure
