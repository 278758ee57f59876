"""What an encoder knows: embeddings of labelled clips, probed two ways.

The protocol is the same for every row of a table. Features of the training
clips are standardised; a cosine k-nearest-neighbour classifier and a logistic
regression are fitted to them; k and C are chosen on the validation clips; the
test clips give balanced accuracy. The rows to beat are the mean and standard
deviation of log-mel frames, and the same encoder before training.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from sklearn import metrics as sklearn_metrics
from sklearn import neighbors, pipeline, preprocessing

from audiomosaic_jax import (
  baseline,
  checkpoint,
  experiment,
  features,
  files,
  metrics,
  per_device,
  predict,
  sharding,
  tables,
)
from audiomosaic_jax.data import clip_windows, datasets

ConfigDict = ml_collections.ConfigDict
SPLITS = ("train", "valid", "test")
PROBES = ("knn", "linear")
# How tokens become one vector, and what a table calls it; see
# `AudioMosaic.readouts`.
READOUTS = {"mean": "mean of the tokens", "bands": "mean of each band"}


@dataclasses.dataclass(frozen=True)
class Task:
  """A labelled task whose clips are cut to windows and held in memory.

  Attributes:
    name: for tables.
    class_names: in the order of the labels.
    labels: split -> [N] class of each clip.
    batches: split -> batches of `clip_windows.batches`, int16 windows.
    sources: split -> the source itself, for whole clips.
  """

  name: str
  class_names: Sequence[str]
  labels: Mapping[str, np.ndarray]
  batches: Mapping[str, list[dict[str, np.ndarray]]]
  sources: Mapping[str, object]


def load_task(name: str, config: ConfigDict) -> Task:
  """Reads a labelled task and cuts its clips to windows.

  Args:
    name: "demo" for the packaged notes, or a folder with a labels.csv of
      columns path, label and split (train, valid, test).
    config: the encoder's experiment; `data.pipeline` gives the window.
  """
  sources = {
    split: datasets.make_dataset(
      "task",
      split,
      data_dir=name,
      sample_rate_hz=config.fbank.sample_rate_hz,
    )
    for split in SPLITS
  }
  window = config.data.pipeline.clip_samples
  batches = {
    split: list(
      clip_windows.batches(
        source,
        batch_size=predict.for_all_devices(config.probe.batch_size),
        clip_samples=window,
        hop_samples=window,
        max_windows=config.probe.max_windows,
        pad=config.data.pipeline.pad,
      )
    )
    for split, source in sources.items()
  }
  return Task(
    name=pathlib.Path(name).name,
    class_names=sources["train"].class_names,
    labels={split: source.labels for split, source in sources.items()},
    batches=batches,
    sources=sources,
  )


def make_embed_fn(model, config: ConfigDict) -> Callable:
  """Returns `(variables, batches of int16 [B, S]) -> list of readouts`.

  A readout is name -> float32 [B, E], see `AudioMosaic.readouts`. Each batch
  is split over the local devices; nothing is masked.
  """
  mesh = sharding.make_mesh(jax.local_devices())
  rows = sharding.batch_sharded(mesh)
  spectrogram = predict.spectrogram_fn(config)

  @jax.jit
  def embed(variables, pcm):
    waveform = features.pcm_to_float(pcm)
    fbank = per_device.map_examples(spectrogram, mesh)(waveform)
    return model.apply(variables, fbank, method=model.readouts)

  def embed_batches(variables, batches):
    # Of a training state over several hosts, each takes its own copy, once.
    variables = jax.device_put(
      jax.device_get(variables), sharding.replicated(mesh)
    )
    # Dispatch everything, then fetch: the device never waits for the host.
    outputs = [embed(variables, jax.device_put(pcm, rows)) for pcm in batches]
    return jax.device_get(outputs)

  return embed_batches


def embed_task(
  embed: Callable, variables, task: Task, splits: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
  """Returns readout -> split -> [N, E]: the mean over each clip's windows."""
  embeddings = {name: {} for name in READOUTS}
  for split in splits:
    batches = task.batches[split]
    outputs = embed(variables, [batch["waveform"] for batch in batches])
    valid = np.concatenate([batch["valid"] for batch in batches])
    clips = np.concatenate([batch["clip"] for batch in batches])[valid]
    for name in READOUTS:
      rows = np.concatenate([output[name] for output in outputs])[valid]
      windows = predict.Windows(rows, clips)
      means, _ = predict.clip_means(windows, len(task.labels[split]))
      embeddings[name][split] = means.astype(np.float32)
  return embeddings


def probe_scores(
  embeddings: Mapping[str, np.ndarray],
  labels: Mapping[str, np.ndarray],
  config: ConfigDict,
) -> dict[str, float]:
  """Returns the test balanced accuracy of both probes, in [0, 1].

  Args:
    embeddings: split -> [N, D].
    labels: split -> [N].
    config: `config.probe`: the values of k and C to choose from. A k above the
      number of training clips is left out.
  """

  def knn(k):
    return pipeline.make_pipeline(
      preprocessing.StandardScaler(),
      neighbors.KNeighborsClassifier(k, metric="cosine"),
    )

  def linear(c):
    return baseline.logistic_regression(c, multi_label=False)

  def score(model, split):
    return float(
      sklearn_metrics.balanced_accuracy_score(
        labels[split], model.predict(embeddings[split])
      )
    )

  count = len(labels["train"])
  neighbours = [k for k in config.knn_neighbours if k <= count] or [count]
  scores = {}
  for name, make, values in (
    ("knn", knn, neighbours),
    ("linear", linear, config.linear_c),
  ):
    chosen = baseline.best(
      lambda value, make=make: make(value).fit(
        embeddings["train"], labels["train"]
      ),
      values,
      lambda model: score(model, "valid"),
    )
    scores[name] = score(chosen, "test")
  return scores


def make_online_probe(model, config: ConfigDict, task: Task) -> Callable:
  """Returns `variables -> {"knn", "ridge"}`, cheap enough for training.

  Scores are balanced accuracies on the validation clips: the test clips stay
  unseen until the table at the end.
  """
  embed = make_embed_fn(model, config)
  num_classes = len(task.class_names)
  train, valid = task.labels["train"], task.labels["valid"]

  def probe(variables) -> dict[str, float]:
    readouts = embed_task(embed, variables, task, ("train", "valid"))
    x = readouts[config.probe.readout]
    knn = metrics.knn_predict(
      x["train"],
      train,
      x["valid"],
      k=config.probe.online_k,
      num_classes=num_classes,
      temperature=config.probe.online_temperature,
    )
    ridge = metrics.ridge_probe(
      x["train"],
      train,
      x["valid"],
      num_classes=num_classes,
      l2=config.probe.online_l2,
      class_balanced=True,
    ).argmax(1)
    return {
      name: float(
        metrics.balanced_accuracy(guess, valid, num_classes=num_classes)
      )
      for name, guess in (("knn", knn), ("ridge", ridge))
    }

  return probe


def load_variables(config: ConfigDict, folder: pathlib.Path):
  """Returns the newest `params` and `batch_stats` of one seed's folder."""
  model = experiment.build_model(config)
  abstract = jax.eval_shape(
    functools.partial(experiment.init_variables, model, config),
    jax.random.key(0),
  )
  return checkpoint.load_params(folder, abstract)


def compare(
  config: ConfigDict, workdir: pathlib.Path, task: Task
) -> dict[str, dict[str, list[float]]]:
  """Probes log-mel statistics, random encoders and the trained ones.

  Prints the table and writes it to `workdir/probes/<task>.json`. Call it on
  every process; process 0 prints and writes.

  Args:
    config: the pretraining experiment of `workdir`.
    workdir: a finished run, of one seed or several.
    task: what to tell apart.

  Returns:
    method -> probe -> balanced test accuracy per seed.
  """
  model = experiment.build_model(config)
  embed = make_embed_fn(model, config)
  init = functools.partial(experiment.init_variables, model, config)

  folders = experiment.seed_folders(config, workdir)
  encoders = {
    "random encoder": lambda seed: jax.jit(init)(jax.random.key(seed)),
    "pretrained encoder": lambda seed: load_variables(config, folders[seed]),
  }

  def scores(embeddings):
    return probe_scores(embeddings, task.labels, config.probe)

  statistics = {
    split: baseline.log_mel_statistics(source, config.fbank).rows
    for split, source in task.sources.items()
  }
  rows = {"log-mel mean and std": [scores(statistics)]}
  for encoder, variables in encoders.items():
    readouts = [embed_task(embed, variables(s), task, SPLITS) for s in folders]
    for name, words in READOUTS.items():
      rows[f"{encoder}, {words}"] = [scores(seed[name]) for seed in readouts]
  results = {
    method: {probe: [score[probe] for score in row] for probe in PROBES}
    for method, row in rows.items()
  }
  if jax.process_index() != 0:
    return results
  path = workdir / "probes" / f"{task.name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, json.dumps(results, indent=2) + "\n")
  print(tables.table_text(results_table(task.name, results)), flush=True)
  return results


def results_table(
  task_name: str, results: Mapping[str, Mapping[str, Sequence[float]]]
) -> tables.Table:
  """Returns the table of `compare`, for the terminal and the report."""
  num_seeds = max(len(v) for row in results.values() for v in row.values())
  return tables.comparison_table(
    f"{task_name}: balanced test accuracy, mean ± std of {num_seeds} seeds",
    results,
  )
