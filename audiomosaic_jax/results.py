"""Results of supervised runs: one file per run, then one table for all.

A run's result.json appears when all of it is done, so it marks what need not
be done again. `write_summary` makes results.json, results.md, predictions.csv
and pictures of everything that is finished.
"""

import csv
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from audiomosaic_jax import class_plots, predict, report, scores, tables
from audiomosaic_jax.data import supervised
from audiomosaic_jax.tables import Table

ConfigDict = ml_collections.ConfigDict

RESULT_FILE, PREDICTIONS_FILE = "result.json", "predictions.npz"
# Fields that change no single run.
NOT_OF_A_RUN = (
  *("num_seeds", "layers", "runtime", "published", "log_every"),
  *("checkpoint", "cache", "fallback"),
)


class Place(NamedTuple):
  """Which run of a sweep; layer is None for heads that probe no one layer."""

  layer: int | None
  fold: int
  seed: int


def layers(config: ConfigDict) -> tuple[int | None, ...]:
  """Returns the layers to probe one by one; all of them if none is named."""
  if config.model.head != "layer":
    return (None,)
  return config.layers or tuple(range(config.model.encoder.depth))


def folder(
  config: ConfigDict, workdir: pathlib.Path, place: Place
) -> pathlib.Path:
  """Returns the folder of one run."""
  parts = [f"seed_{place.seed}"]
  if config.folds > 1:
    parts.insert(0, f"fold_{place.fold + 1}")
  if place.layer is not None:
    parts.insert(0, f"layer_{place.layer}")
  return workdir / "runs" / "_".join(parts)


def fingerprint(config: ConfigDict) -> str:
  """Returns a hash of the fields that decide the result of a run."""
  settings = json.loads(json.dumps(config.to_dict()))
  for name in NOT_OF_A_RUN:
    settings.pop(name)
  if config.model.head == "layer":
    settings["model"].pop("layer")
  settings["evaluation"].pop("num_resamples")
  text = json.dumps(settings, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_finished(place: pathlib.Path, config: ConfigDict) -> bool:
  """Whether a run has its result.

  Raises:
    ValueError: it has the result of another config.
  """
  path = place / RESULT_FILE
  if not path.exists():
    return False
  result = json.loads(path.read_text())
  if result["fingerprint"] != fingerprint(config):
    raise ValueError(
      f"{path} is the result of another config ({result['fingerprint']}, this "
      f"is {fingerprint(config)}); give another --workdir, or remove {place}"
    )
  return True


def write_run(
  config: ConfigDict,
  place_folder: pathlib.Path,
  place: Place,
  splits: supervised.Splits,
  logits: Mapping[str, predict.Windows],
  step: int,
) -> None:
  """Writes predictions and, last and in one rename, the result of a run.

  Args:
    config: the experiment.
    place_folder: folder of the run.
    place: which run it is.
    splits: clips of its fold.
    logits: test split -> logits of its windows.
    step: of the chosen state.
  """
  place_folder.mkdir(parents=True, exist_ok=True)
  arrays, measured = {}, {}
  for name, windows in logits.items():
    source = splits.tests[name]
    evaluation, found = predict.evaluation(windows, source)
    arrays |= {
      f"{name}/logits": evaluation.scores.astype(np.float32),
      f"{name}/targets": evaluation.targets.astype(np.uint8),
      f"{name}/ids": np.array([source.ids[i] for i in found]),
    }
    if source.groups is not None:
      arrays[f"{name}/groups"] = np.array([source.groups[i] for i in found])
    values = scores.measure(
      evaluation,
      config.evaluation.metrics,
      num_resamples=0,
      confidence=config.evaluation.confidence,
      seed=0,
      groups=None,
    )
    measured[name] = {
      "num_clips": len(found),
      "num_unusable": len(source) - len(found),
      "num_missing": len(source.missing),
      "absent_classes": evaluation.absent_classes(),
      "clips_sha256": _hash_ids(source.ids),
      "metrics": {metric: v["value"] for metric, v in values.items()},
    }
  temporary = place_folder / f"{PREDICTIONS_FILE}.tmp"
  with temporary.open("wb") as file:
    np.savez_compressed(file, **arrays)
  temporary.replace(place_folder / PREDICTIONS_FILE)
  result = {
    **place._asdict(),
    "fingerprint": fingerprint(config),
    "selection": config.evaluation.selection,
    "step": step,
    "class_names": list(splits.train.class_names),
    "splits": measured,
  }
  _write_text(place_folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")


def write_summary(config: ConfigDict, workdir: pathlib.Path) -> dict:
  """Writes and prints what all finished runs of the config say together.

  For every layer and test split, a metric is averaged over the folds and then
  has a mean and a standard deviation over the seeds. The interval is of a
  bootstrap of the clips of all folds, averaged over the seeds.

  Args:
    config: the experiment.
    workdir: folder of the runs.

  Returns:
    What results.json holds.
  """
  rows = []
  predictions = workdir / "predictions.csv"
  pooled = {}
  for layer in layers(config):
    runs = _read_runs(config, workdir, layer)
    for split in runs[0][1]["splits"]:
      pooled[layer, split] = _pool(config, runs, split)
      rows.append(_row(config, runs, split, layer, pooled[layer, split]))
  first = runs[0][1]
  summary = {
    "selection": config.evaluation.selection,
    "selection_note": SELECTION_NOTES[config.evaluation.selection],
    "initialised_from": config.init.run or "random",
    "head": "knn" if config.knn.k else config.model.head,
    "num_seeds": config.num_seeds,
    "folds": config.folds,
    "fingerprint": fingerprint(config),
    "published": list(config.published),
    "results": rows,
  }
  text = json.dumps(_finite(summary), indent=2, allow_nan=False)
  _write_text(workdir / "results.json", text + "\n")
  table = _table(config, rows)
  note = summary["selection_note"]
  _write_text(workdir / "results.md", f"{_markdown(table)}\n\n{note}\n")
  _write_predictions(predictions, pooled, first["class_names"])
  print(f"{tables.table_text(table)}\n{note}", flush=True)
  page = report.write_report(
    workdir,
    title=f"AudioMosaic: {config.name}",
    figures=_figures(config, rows, pooled, first["class_names"]),
    tables=[table],
    text=[f"Encoder from {summary['initialised_from']}. {note}"],
  )
  print(f"report: {page}", flush=True)
  return summary


def _read_runs(
  config: ConfigDict, workdir: pathlib.Path, layer: int | None
) -> list[tuple[pathlib.Path, dict]]:
  """Returns (folder, result) of every fold and seed."""
  runs = []
  for fold in range(config.folds):
    for seed in range(config.seed, config.seed + config.num_seeds):
      path = folder(config, workdir, Place(layer, fold, seed))
      runs.append((path, json.loads((path / RESULT_FILE).read_text())))
  return runs


def _pool(config: ConfigDict, runs: list, split: str) -> dict[int, dict]:
  """Returns seed -> logits, targets, ids and groups of all folds."""
  pooled = {}
  for place, result in runs:
    with np.load(place / PREDICTIONS_FILE) as stored:
      prefix = f"{split}/"
      arrays = {
        name.removeprefix(prefix): stored[name]
        for name in stored.files
        if name.startswith(prefix)
      }
    pooled.setdefault(result["seed"], []).append(arrays)
  return {
    seed: {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    for seed, parts in pooled.items()
  }


def _row(
  config: ConfigDict, runs: list, split: str, layer: int | None, pooled: dict
) -> dict:
  """Returns one row of the summary: a split, maybe of a layer."""
  settings = config.evaluation
  intervals = [
    scores.measure(
      _evaluation(arrays),
      settings.metrics,
      num_resamples=settings.num_resamples,
      confidence=settings.confidence,
      seed=seed,
      groups=arrays["groups"].tolist() if "groups" in arrays else None,
    )
    for seed, arrays in pooled.items()
  ]
  row = {"layer": layer, "split": split, "metrics": {}}
  details = [result["splits"][split] for _, result in runs]
  for metric in settings.metrics:
    per_seed = [
      float(
        np.mean(
          [
            result["splits"][split]["metrics"][metric]
            for _, result in runs
            if result["seed"] == seed
          ]
        )
      )
      for seed in pooled
    ]
    row["metrics"][metric] = {
      "mean": float(np.mean(per_seed)),
      "std": float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
      "per_seed": per_seed,
    }
    if "low" in intervals[0][metric]:
      row["metrics"][metric] |= {
        end: float(np.mean([i[metric][end] for i in intervals]))
        for end in ("low", "high")
      }
  for name in ("num_clips", "num_unusable", "num_missing"):
    row[name] = sum(d[name] for d in details) // len(pooled)
  row["absent_classes"] = _evaluation(
    next(iter(pooled.values()))
  ).absent_classes()
  row["clips_sha256"] = sorted({d["clips_sha256"] for d in details})
  return row


def _evaluation(arrays: Mapping[str, np.ndarray]) -> scores.Evaluation:
  logits, targets = arrays["logits"], arrays["targets"]
  return scores.Evaluation(
    logits.astype(np.float64), targets.astype(np.float64)
  )


def _table(config: ConfigDict, rows: list[dict]) -> Table:
  """Returns ours and the published numbers, in percent where they are one."""
  names = list(config.evaluation.metrics)
  head = "knn" if config.knn.k else config.model.head
  body = []
  for row in rows:
    name = head if row["layer"] is None else f"layer {row['layer']}"
    cells = [_cell(metric, row["metrics"][metric]) for metric in names]
    body.append([f"{name}, {row['split']}", *cells, str(row["num_clips"])])
  for line in config.published:
    name, _, value = line.rpartition(":")
    body.append([f"published: {name}", value.strip(), *["-"] * len(names)])
  columns = [n if n == "d_prime" else f"{n} %" for n in names]
  caption = (
    f"{config.name}: mean ± std of {config.num_seeds} seed(s)"
    f"{f', {config.folds} folds' if config.folds > 1 else ''}"
    f" [{100 * config.evaluation.confidence:g} % interval over clips]"
  )
  return Table(caption, ["result", *columns, "clips"], body)


def _cell(metric: str, value: Mapping) -> str:
  scale = 1 if metric == "d_prime" else 100
  text = f"{scale * value['mean']:.2f}"
  if value["std"] is not None:
    text += f" ± {scale * value['std']:.2f}"
  if "low" in value:
    text += f" [{scale * value['low']:.2f}, {scale * value['high']:.2f}]"
  return text


def _markdown(table: Table) -> str:
  lines = [table.columns, ["---"] * len(table.columns), *table.rows]
  body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
  return f"{table.caption}\n\n{body}"


def _figures(config, rows, pooled, class_names) -> dict:
  """Returns heading -> figure for what was measured."""
  figures = {}
  metric = config.evaluation.metrics[0]
  if len(layers(config)) > 1:
    figures["Probes of the layers"] = class_plots.plot_layers(rows, metric)
  (layer, split), by_seed = max(
    pooled.items(), key=lambda item: item[0][0] or 0
  )
  evaluation = _evaluation(next(iter(by_seed.values())))
  where = split if layer is None else f"{split}, layer {layer}"
  if (evaluation.targets.sum(1) == 1).all():
    figures[f"Confusion: {where}"] = class_plots.plot_confusion(
      evaluation.labels, evaluation.scores.argmax(1), class_names
    )
  else:
    ap = evaluation.per_class(
      scores.average_precision, np.ones(len(evaluation.labels))
    )
    figures[f"Average precision per class: {where}"] = (
      class_plots.plot_per_class(ap, class_names, "average precision")
    )
  return figures


def _write_predictions(
  path: pathlib.Path, pooled: Mapping, class_names: list[str]
) -> None:
  """Writes one line per clip, layer and seed."""
  temporary = path.with_suffix(".tmp")
  with temporary.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "split", "layer", "seed", "labels", "predicted"])
    for (layer, split), by_seed in pooled.items():
      for seed, arrays in by_seed.items():
        for name, logits, targets in zip(
          arrays["ids"], arrays["logits"], arrays["targets"], strict=True
        ):
          labels = ";".join(class_names[i] for i in np.flatnonzero(targets))
          guess = class_names[int(logits.argmax())]
          place = "" if layer is None else layer
          writer.writerow([name, split, place, seed, labels, guess])
  temporary.replace(path)


def _finite(tree: Any) -> Any:
  """Returns the tree with None for what JSON has no number for."""
  if isinstance(tree, dict):
    return {name: _finite(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_finite(value) for value in tree]
  return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def _hash_ids(ids: Iterable[str]) -> str:
  return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def _write_text(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)


SELECTION_NOTES = {
  "last": "Every number is of the last step; no split chose it.",
  "valid": "Every number is of the step that was best on the validation clips.",
  "test": (
    "Every number is of the step that was best on the test clips themselves, "
    "as the published ones are: an optimistic number."
  ),
}
