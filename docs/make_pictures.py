"""Makes the pictures of the README from the packaged audio.

  python -m docs.make_pictures

Writes docs/masks.png: what each view keeps of one clip, masked as the paper
describes and as the published code does it.
"""

import pathlib

import jax
import numpy as np
from absl import app
from matplotlib.backends import backend_agg as agg
from matplotlib.figure import Figure
from PIL import Image

from audiomosaic_jax import experiment, features, masking, report
from audiomosaic_jax.data import audio_io, datasets
from configs import pretrain

FOLDER = pathlib.Path(__file__).parent
# The first clip of its file: 13 seconds of one speaker.
CLIP = datasets.DEMO_DIR / "pretrain/speech/festvox-ru_06.opus"
SEED = 2
# Enough for one colour map and the text, and the file stays small.
NUM_COLORS = 40
TITLES = {
  ("paper", "view_time"): "Paper, view 1: time columns removed",
  ("paper", "view_freq"): "Paper, view 2: frequency rows removed",
  ("released", "view_time"): "Released, view 1: 1.28-second blocks removed",
  ("released", "view_freq"): "Released, view 2: a repeating pattern removed",
}


def main(argv: list[str]) -> None:
  """Writes every picture."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  save(masks(), FOLDER / "masks.png")


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a figure as a small PNG file with a palette of its own."""
  canvas = agg.FigureCanvasAgg(figure)
  canvas.draw()
  pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  palette = pixels.quantize(NUM_COLORS, kmeans=1, dither=Image.Dither.NONE)
  palette.save(path, optimize=True)
  print(f"wrote {path} ({path.stat().st_size / 1024:.0f} kB)")


def masks() -> Figure:
  """Returns the log-mel spectrogram of a clip under both layouts' masks."""
  config = pretrain.get_config()
  keep_ids = {
    title: _keep_ids(pretrain.get_config(layout), view)
    for (layout, view), title in TITLES.items()
  }
  figure = report.plot_masks(
    _spectrogram(config),
    keep_ids,
    patch_size=config.model.encoder.patch_size,
    frame_shift_ms=config.fbank.frame_shift_ms,
    low_freq_hz=config.fbank.low_freq_hz,
    high_freq_hz=config.fbank.high_freq_hz,
  )
  figure.set_size_inches(9.0, 7.0)
  figure.set_dpi(110)
  return figure


def _spectrogram(config) -> np.ndarray:
  """Returns log-mel energies [T, F] of the beginning of the clip."""
  rate = config.fbank.sample_rate_hz
  waveform = audio_io.load_audio(
    CLIP, sample_rate_hz=rate, start_s=None, end_s=None
  )
  fbank = features.log_mel_fbank(waveform, **config.fbank)
  return np.asarray(fbank[: config.spectrogram.num_frames])


def _keep_ids(config, view: str) -> np.ndarray:
  """Returns the tokens that one view of the config keeps."""
  ids = masking.keep_ids(
    jax.random.fold_in(jax.random.key(SEED), experiment.VIEWS.index(view)),
    1,
    grid=experiment.token_grid(config),
    layout=config.masking.layout,
    **config.masking[view],
  )
  return np.asarray(ids[0])


if __name__ == "__main__":
  app.run(main)
