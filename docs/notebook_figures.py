"""Makes the pictures of what a trained encoder does, as the notebooks do.

  python -m docs.notebook_figures --encoder=runs/demo

Writes embedding_map.png, self_similarity.png and attention.png to docs/.
"""

import pathlib

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from sklearn import decomposition

import audiomosaic_jax as am
from audiomosaic_jax import (
  attention,
  encoder_plots,
  experiment,
  features,
)
from audiomosaic_jax.data import audio_io, datasets
from audiomosaic_jax.encoder import Encoder
from docs import make_pictures

ENCODER = flags.DEFINE_string(
  "encoder", None, "workdir of a pretraining run", required=True
)
OUTPUT = flags.DEFINE_string(
  "output", str(pathlib.Path(__file__).parent), "folder of the pictures"
)

DEMO = datasets.DEMO_DIR
# The beginning of a loop whose parts come back.
LOOP = DEMO / "pretrain/music/supersonic-scsynth-samples_02.opus"
LOOP_END_S = 11.0
# file, where its window begins in seconds.
ATTENDED = {
  "speech": (DEMO / "pretrain/speech/festvox-ru_06.opus", 1.0),
  "piano": (DEMO / "instruments/test/piano/00765.opus", 0.0),
  "organ": (DEMO / "instruments/test/organ/00714.opus", 0.0),
}
MAP_SPLIT = "test"


def main(argv: list[str]) -> None:
  """Writes every picture."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  encoder = am.load_encoder(ENCODER.value)
  folder = pathlib.Path(OUTPUT.value)
  figures = {
    "self_similarity": self_similarity(encoder),
    "attention": attention_maps(encoder),
    "embedding_map": embedding_map(encoder),
  }
  for name, figure in figures.items():
    figure.set_dpi(110)
    make_pictures.save(figure, folder / f"{name}.png")


def notes(split: str, encoder: Encoder):
  """Returns the packaged notes of a split."""
  return datasets.make_dataset(
    "task", split, data_dir="demo", sample_rate_hz=encoder.sample_rate_hz
  )


def mel_axis(encoder: Encoder) -> dict[str, float]:
  """Returns what the pictures of a spectrogram have to know of it."""
  names = ("frame_shift_ms", "low_freq_hz", "high_freq_hz")
  return {name: encoder.config.fbank[name] for name in names}


def embedding_map(encoder: Encoder) -> Figure:
  """Returns the packaged notes on two principal components."""
  source = notes(MAP_SPLIT, encoder)
  found = encoder.embed_batch([source.path(i) for i in range(len(source))])
  pca = decomposition.PCA(2)
  points = pca.fit_transform(np.stack([out.embedding for out in found]))
  first, second = (f"{part:.0%}" for part in pca.explained_variance_ratio_)
  return encoder_plots.plot_map(
    points,
    source.labels,
    source.class_names,
    xlabel=f"first principal component ({first} of the variance)",
    ylabel=f"second ({second})",
  )


def self_similarity(encoder: Encoder) -> Figure:
  """Returns a loop compared with itself, every 40 ms."""
  waveform = audio_io.load_audio(
    LOOP, sample_rate_hz=encoder.sample_rate_hz, end_s=LOOP_END_S
  )
  out = encoder.embed(
    waveform, encoder.sample_rate_hz, hop_ms=encoder.hop_ms / 4, overlap=0.5
  )
  fbank = features.log_mel_fbank(waveform, **encoder.config.fbank)
  return encoder_plots.plot_self_similarity(
    np.asarray(fbank), out.frames, out.timestamps_s, **mel_axis(encoder)
  )


def attention_maps(encoder: Encoder) -> Figure:
  """Returns what the heads of the last block attend to, over all queries."""
  fbanks, weights = {}, {}
  for name, (path, start_s) in ATTENDED.items():
    waveform = audio_io.load_audio(
      path,
      sample_rate_hz=encoder.sample_rate_hz,
      start_s=start_s,
      end_s=start_s + encoder.window_s,
    )
    fbank = features.log_mel_fbank(waveform, **encoder.config.fbank)
    fbanks[name] = np.asarray(fbank)
    paid = attention.attention_weights(
      encoder.model.encoder,
      encoder.variables["params"]["encoder"],
      features.standardize(fbank, **encoder.config.spectrogram),
    )
    grid = experiment.token_grid(encoder.config)
    received = attention.over_patches(paid[-1].mean(axis=1), grid)
    weights[name] = np.asarray(received)
  return encoder_plots.plot_attention(fbanks, weights, **mel_axis(encoder))


if __name__ == "__main__":
  app.run(main)
