"""The report of a pretraining run: what it learned, in pictures."""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from audiomosaic_jax import (
  encoder_probe,
  experiment,
  features,
  masking,
  metric_writer,
  report,
)

ConfigDict = ml_collections.ConfigDict
NUM_QUERIES = 5
NUM_NEIGHBOURS = 5


def write_pretraining_report(
  config: ConfigDict,
  workdir: pathlib.Path,
  task: encoder_probe.Task | None,
  results: Mapping[str, Mapping[str, Sequence[float]]] | None,
) -> None:
  """Writes report.html: curves, masks, neighbours and the probe table.

  Call it on every process, as all read the checkpoints; process 0 writes.

  Args:
    config: the experiment.
    workdir: the finished run.
    task: the labelled task of the run, or None.
    results: of `encoder_probe.compare` for that task, or None without one.
  """
  folders = experiment.seed_folders(config, workdir)
  # Process 0 has the metrics of all.
  runs = {
    f"seed {seed}": metric_writer.read_metrics(folder)
    for seed, folder in folders.items()
    if jax.process_index() == 0
  }
  figures = {
    "Loss and health of the embeddings": report.plot_curves(
      runs,
      panels={
        "loss": "NT-Xent loss",
        "accuracy": "contrastive accuracy",
        "effective_rank": "effective rank",
      },
      baselines={},
    )
  }
  tables = []
  if task:
    tables.append(encoder_probe.results_table(task.name, results))
    figures["Probes of the frozen encoder"] = report.plot_probes(
      runs,
      metrics={"knn": "k-nearest neighbours", "ridge": "linear"},
      baselines={},
      ylabel="balanced accuracy, validation clips",
    )
    figures["The two masks"] = _plot_masks(config, task)
    figures["Nearest neighbours"] = _plot_neighbours(config, folders, task)
  if jax.process_index() != 0:
    return
  page = report.write_report(
    workdir / "report.html",
    title="AudioMosaic pretraining",
    figures=figures,
    tables=tables,
    text=[
      f"{config.num_seeds} run(s) of batch {config.batch_size} in {workdir}.",
      "The shaded range spans the seeds.",
    ],
  )
  print(f"report: {page}", flush=True)


def _spectrograms(config: ConfigDict, pcm: np.ndarray) -> np.ndarray:
  """Returns the log-mel energies [N, T, F] that the encoder sees of windows."""
  fbank = features.log_mel_fbank(features.pcm_to_float(pcm), **config.fbank)
  # Zero mean and a half: cut to length, values left as they are.
  cut = {**config.spectrogram, "mean": 0.0, "std": 0.5}
  return np.asarray(features.standardize(fbank, **cut))


def _first_windows(task: encoder_probe.Task, split: str) -> np.ndarray:
  """Returns the first window [N, S] of every clip of a split."""
  batches = task.batches[split]
  pcm = np.concatenate([b["waveform"][b["valid"]] for b in batches])
  clip = np.concatenate([b["clip"][b["valid"]] for b in batches])
  return pcm[np.unique(clip, return_index=True)[1]]


def _plot_masks(config: ConfigDict, task: encoder_probe.Task) -> Figure:
  fbank = _spectrograms(config, _first_windows(task, "valid")[:1])[0]
  keys = jax.random.split(jax.random.key(config.seed), len(experiment.VIEWS))
  keep_ids = {}
  for key, view in zip(keys, experiment.VIEWS, strict=True):
    mask = config.masking[view]
    ids = masking.keep_ids(
      key,
      1,
      grid=experiment.token_grid(config),
      layout=config.masking.layout,
      **mask,
    )
    name = f"{view.replace('_', ' ')}: {mask.mode} mask, ratio {mask.ratio:g}"
    keep_ids[name] = np.asarray(ids[0])
  return report.plot_masks(
    fbank,
    keep_ids,
    patch_size=config.model.encoder.patch_size,
    frame_shift_ms=config.fbank.frame_shift_ms,
    low_freq_hz=config.fbank.low_freq_hz,
    high_freq_hz=config.fbank.high_freq_hz,
  )


def _plot_neighbours(
  config: ConfigDict,
  folders: Mapping[int, pathlib.Path],
  task: encoder_probe.Task,
) -> Figure:
  """Shows test clips and their neighbours for the first seed's encoder."""
  variables = encoder_probe.load_variables(config, folders[config.seed])
  embed = encoder_probe.make_embed_fn(experiment.build_model(config), config)
  readouts = encoder_probe.embed_task(embed, variables, task, ("test",))
  labels = task.labels["test"]
  queries = np.unique(labels, return_index=True)[1][:NUM_QUERIES]
  return report.plot_neighbours(
    _spectrograms(config, _first_windows(task, "test")),
    readouts["mean"]["test"],
    [task.class_names[label] for label in labels],
    queries=queries.tolist(),
    k=NUM_NEIGHBOURS,
    frame_shift_ms=config.fbank.frame_shift_ms,
  )
