"""One page that shows what a run learned: report.html and its pictures.

Plot functions take numbers and return a matplotlib `Figure`; `write_report`
puts figures, tables and text into one self-contained file. Figures are made
without pyplot, so nothing here has global state or needs a display.
"""

import base64
import html
import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from audiomosaic_jax import files
from audiomosaic_jax.tables import Table

# Okabe and Ito's palette: told apart with any common colour blindness.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
COLORS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, FAINT = "#222222", "#767676", "#E4E4E4"
SPECTRUM = "magma"

Number = int | float | np.number
Runs = Mapping[str, Sequence[Mapping[str, Number]]]


def plot_curves(
  runs: Runs, *, panels: Mapping[str, str], baselines: Mapping[str, Number]
) -> Figure:
  """Plots metrics over steps, one panel each.

  Several runs (seeds) become their mean and their range.

  Args:
    runs: run name -> lines of `metric_writer.read_metrics`.
    panels: metric -> label of its vertical axis, in order.
    baselines: label -> value, drawn as a horizontal line in every panel.
  """
  figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for i, (metric, label) in enumerate(panels.items()):
    ax, color = axes[i], COLORS[i % len(COLORS)]
    _plot_runs(ax, runs, metric, color)
    _plot_baselines(ax, baselines)
    _style(ax, xlabel="step", ylabel=label)
  return figure


def plot_probes(
  runs: Runs,
  *,
  metrics: Mapping[str, str],
  baselines: Mapping[str, Number],
  ylabel: str,
) -> Figure:
  """Plots several scores of a frozen encoder over steps in one panel.

  Args:
    runs: run name -> lines of `metric_writer.read_metrics`.
    metrics: metric -> legend label, in order; all on the scale of the axis.
    baselines: label -> value, such as chance or log-mel statistics.
    ylabel: what the scores measure.
  """
  figure = Figure(figsize=(7.2, 4.0), layout="constrained")
  ax = figure.subplots()
  for i, (metric, label) in enumerate(metrics.items()):
    color = COLORS[i % len(COLORS)]
    _plot_runs(ax, runs, metric, color, label=label, marker="o")
  _plot_baselines(ax, baselines)
  _style(ax, xlabel="step", ylabel=ylabel)
  if ax.get_legend_handles_labels()[0]:
    ax.legend(frameon=False, loc="best", labelcolor=INK)
  return figure


def plot_masks(
  fbank: Float[np.ndarray, "T F"],
  keep_ids: Mapping[str, Int[np.ndarray, "..."]],
  *,
  patch_size: int,
  frame_shift_ms: Number,
  low_freq_hz: Number,
  high_freq_hz: Number,
) -> Figure:
  """Shows a spectrogram and what each view keeps of it.

  Args:
    fbank: log-mel energies of one clip.
    keep_ids: view -> [K] tokens that stay, row-major over (time, freq).
    patch_size: frames and mel bins per patch.
    frame_shift_ms: distance of two frames.
    low_freq_hz, high_freq_hz: edges of the mel filter bank.
  """
  num_frames, num_mel_bins = fbank.shape
  grid = num_frames // patch_size, num_mel_bins // patch_size
  num_tokens = grid[0] * grid[1]
  figure = Figure(
    figsize=(8.4, 1.9 * (1 + len(keep_ids))), layout="constrained"
  )
  axes = figure.subplots(1 + len(keep_ids), 1, sharex=True, squeeze=False)[:, 0]
  views = {"Log-mel spectrogram": np.arange(num_tokens)} | dict(keep_ids)
  for ax, (name, ids) in zip(axes, views.items(), strict=True):
    removed = np.ones(num_tokens, bool)
    removed[ids] = False
    pixels = removed.reshape(grid).repeat(patch_size, 0).repeat(patch_size, 1)
    draw_spectrogram(ax, fbank, removed=pixels, frame_shift_ms=frame_shift_ms)
    draw_mel_axis(ax, num_mel_bins, low_freq_hz, high_freq_hz)
    kept = (
      f": {len(ids)} of {num_tokens} tokens stay" if name in keep_ids else ""
    )
    ax.set_title(name + kept, loc="left", fontsize=10, color=INK)
  axes[-1].set_xlabel("time (s)", color=INK)
  return figure


def nearest_neighbours(
  embeddings: Float[np.ndarray, "N D"], queries: Sequence[int], k: int
) -> tuple[Int[np.ndarray, "Q K"], Float[np.ndarray, "Q K"]]:
  """Returns the k most similar other clips of each query, and the cosines.

  Args:
    embeddings: one row per clip.
    queries: rows to look up.
    k: neighbours per query.
  """
  norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
  unit = embeddings / np.maximum(norms, 1e-12)
  cosine = unit[list(queries)] @ unit.T
  cosine[np.arange(len(queries)), list(queries)] = -np.inf
  ids = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
  return ids, np.take_along_axis(cosine, ids, axis=1)


def plot_neighbours(
  fbanks: Float[np.ndarray, "N T F"],
  embeddings: Float[np.ndarray, "N D"],
  labels: Sequence[str],
  *,
  queries: Sequence[int],
  k: int,
  frame_shift_ms: Number,
) -> Figure:
  """Shows clips and the clips the encoder places nearest to them.

  Green, ticked: same label as the query; vermilion, crossed: another.

  Args:
    fbanks: log-mel energies per clip.
    embeddings: one row per clip.
    labels: one name per clip.
    queries: clips to look up, one row of the picture each.
    k: neighbours per query.
    frame_shift_ms: distance of two frames.
  """
  ids, cosine = nearest_neighbours(embeddings, queries, k)
  size = (1.75 * (k + 1), 1.75 * len(queries) + 0.4)
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(len(queries), k + 1, squeeze=False)
  for row, query in enumerate(queries):
    for column, clip in enumerate([query, *ids[row]]):
      ax, color, title = axes[row, column], INK, labels[clip]
      if column:
        same = labels[clip] == labels[query]
        color = GREEN if same else VERMILION
        title = f"{'✓' if same else '✗'} {title}"
        ax.set_xlabel(f"cos {cosine[row, column - 1]:.3f}", fontsize=8)
      draw_spectrogram(
        ax, fbanks[clip], removed=None, frame_shift_ms=frame_shift_ms
      )
      ax.set(xticks=[], yticks=[])
      ax.set_title(title, fontsize=8.5, color=color)
      for spine in ax.spines.values():
        spine.set(visible=True, edgecolor=color, linewidth=2.0)
  for ax, text in zip(axes[0], ("query", "nearest first"), strict=False):
    ax.text(0, 1.2, text, transform=ax.transAxes, fontsize=9, color=GREY)
  return figure


def write_report(
  page: pathlib.Path,
  *,
  title: str,
  figures: Mapping[str, Figure],
  tables: Sequence[Table],
  text: Sequence[str],
) -> pathlib.Path:
  """Writes a page, and its pictures in a folder of the same name beside it.

  The page needs no other file, and is replaced in one rename.

  Args:
    page: file of the page, such as `workdir / "report.html"`.
    title: heading of the page.
    figures: heading -> figure, in order; the heading also names the file.
    tables: shown above the figures.
    text: paragraphs under the title.

  Returns:
    The page.
  """
  folder = page.with_suffix("")
  folder.mkdir(parents=True, exist_ok=True)
  body = [f"<h1>{html.escape(title)}</h1>"]
  body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in text]
  body += [_table_html(table) for table in tables]
  for heading, figure in figures.items():
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    name = re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_")
    files.write_bytes(folder / f"{name}.png", buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    body.append(
      f"<figure><h2>{html.escape(heading)}</h2>"
      f'<img alt="{html.escape(heading)}" '
      f'src="data:image/png;base64,{data}"></figure>'
    )
  document = _PAGE.format(title=html.escape(title), body="\n".join(body))
  files.write_bytes(page, document.encode())
  return page


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem;
  font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; }} h2 {{ font-size: 1.1rem; }}
figure {{ margin: 2.2rem 0; }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; margin: 1.6rem 0; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .5rem; }}
th, td {{ padding: .4rem 1.1rem .4rem 0; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ border-bottom: 2px solid; }} td {{ border-bottom: 1px solid #e4e4e4; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _table_html(table: Table) -> str:
  """Returns a table element; every text is escaped."""

  def row(cells: Sequence[str], tag: str) -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"

  body = "\n".join(row(cells, "td") for cells in table.rows)
  head = row(table.columns, "th")
  caption = f"<caption>{html.escape(table.caption)}</caption>"
  return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


def _plot_runs(
  ax: Axes, runs: Runs, metric: str, color: str, **line: Any
) -> None:
  """Draws the mean of the runs, and their range if there are several."""
  series = [
    {r["step"]: r[metric] for r in records if metric in r}
    for records in runs.values()
  ]
  steps = sorted(set.intersection(*map(set, series))) if series else []
  if not steps:
    return
  values = np.array([[s[step] for step in steps] for s in series], float)
  if len(steps) == 1:
    line["marker"] = "o"
  ax.plot(
    steps, values.mean(0), color=color, linewidth=1.8, markersize=4, **line
  )
  if len(series) > 1:
    low, high = values.min(0), values.max(0)
    ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def _plot_baselines(ax: Axes, baselines: Mapping[str, Number]) -> None:
  """Draws labelled horizontal lines."""
  for label, value in baselines.items():
    ax.axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    text = ax.text(0.995, value, f"{label} {value:.3f}", va="bottom")
    text.set(transform=ax.get_yaxis_transform(), ha="right")
    text.set(fontsize=8.5, color=GREY)


def _style(ax: Axes, *, xlabel: str, ylabel: str) -> None:
  ax.set_xlabel(xlabel, color=INK)
  ax.set_ylabel(ylabel, color=INK)
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(GREY)
  ax.tick_params(colors=INK, labelsize=9)
  ax.grid(axis="y", color=FAINT, linewidth=0.8, zorder=0)
  ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def draw_spectrogram(
  ax: Axes,
  fbank: Float[np.ndarray, "T F"],
  *,
  removed: np.ndarray | None,
  frame_shift_ms: Number,
) -> None:
  """Draws time to the right; what is removed or padding is grey."""
  # Frames that pad a short clip are one value in all bins; not a sound.
  sounding = np.flatnonzero(np.ptp(fbank, axis=1))
  length = sounding[-1] + 1 if len(sounding) else 0
  hidden = np.zeros(fbank.shape, bool) if removed is None else removed.copy()
  hidden[length:] = True
  low, high = np.percentile(fbank[: max(length, 1)], (2, 99.5))
  seconds = len(fbank) * frame_shift_ms / 1000
  ax.set_facecolor(FAINT)
  ax.imshow(
    np.ma.masked_array(fbank, hidden).T,
    origin="lower",
    aspect="auto",
    interpolation="nearest",
    cmap=SPECTRUM,
    vmin=low,
    vmax=high,
    extent=(0, seconds, 0, fbank.shape[1]),
  )
  ax.spines[:].set_visible(False)


def draw_mel_axis(
  ax: Axes, num_mel_bins: int, low_hz: Number, high_hz: Number
) -> None:
  """Labels mel bins with the frequencies at their centres."""
  ticks = np.array([250, 500, 1000, 2000, 4000, 8000, 16000])
  ticks = ticks[(ticks > low_hz) & (ticks < high_hz)]
  mel, low, high = (np.log1p(f / 700) for f in (ticks, low_hz, high_hz))
  # Bin i is centred i + 1 of (num_mel_bins + 1) parts up the mel scale, and
  # drawn from i to i + 1.
  part = (mel - low) / (high - low)
  ax.set_yticks(
    part * (num_mel_bins + 1) - 0.5,
    [f"{hz} Hz" if hz < 1000 else f"{hz // 1000} kHz" for hz in ticks],
  )
  ax.set_ylim(0, num_mel_bins)
  ax.tick_params(colors=INK, labelsize=8.5, length=2)
