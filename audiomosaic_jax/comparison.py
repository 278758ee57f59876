"""What all runs of a supervised experiment say together.

`write_summary` makes results.json, results.md, predictions.csv and a page of
pictures of everything that is finished.
"""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from scipy import special

from audiomosaic_jax import (
  class_plots,
  files,
  report,
  results,
  scores,
  tables,
)
from audiomosaic_jax.results import Method
from audiomosaic_jax.tables import Table

ConfigDict = ml_collections.ConfigDict


def write_summary(config: ConfigDict, workdir: pathlib.Path) -> dict:
  """Writes and prints what all finished runs of the config say together.

  There is a row for every method and test split, see `metric_summary`.

  Args:
    config: the experiment.
    workdir: folder of the runs.

  Returns:
    What results.json holds.
  """
  rows, pooled = [], {}
  for method in results.methods(config):
    runs = [
      results.read_run(config, workdir, place)
      for place in method.places(config)
    ]
    for split in runs[0][1]:
      parts: dict[int, list] = {}
      for result, predictions in runs:
        parts.setdefault(result["seed"], []).append(predictions[split])
      details = [result["splits"][split] for result, _ in runs]
      pooled[method, split] = {s: pool(folds) for s, folds in parts.items()}
      rows.append(
        {
          **method._asdict(),
          "split": split,
          "metrics": metric_summary(parts, config.evaluation),
          **_clips(details, pooled[method, split]),
        }
      )
  class_names = runs[0][0]["class_names"]
  summary = {
    "selection": config.evaluation.selection,
    "selection_note": SELECTION_NOTES[config.evaluation.selection],
    "initialised_from": config.init.run or "random",
    "head": "knn" if config.knn.k else config.model.head,
    "num_seeds": config.num_seeds,
    "folds": config.folds,
    "encoder_states": list(config.init.states),
    "published": list(config.published),
    "results": rows,
  }
  files.write_text(workdir / "results.json", json_text(summary))
  table = _table(config, rows)
  note = summary["selection_note"]
  files.write_text(workdir / "results.md", f"{markdown(table)}\n\n{note}\n")
  _write_predictions(workdir / "predictions.csv", pooled, class_names)
  print(f"{tables.table_text(table)}\n{note}", flush=True)
  page = report.write_report(
    workdir / "report.html",
    title=f"AudioMosaic: {config.name}",
    figures=_figures(config, rows, pooled, class_names),
    tables=[table],
    text=[f"Encoder from {summary['initialised_from']}. {note}"],
  )
  print(f"report: {page}", flush=True)
  return summary


def metric_summary(
  parts: Mapping[int, Sequence[results.Predictions]], settings: ConfigDict
) -> dict[str, dict]:
  """Returns metric -> mean, spread over seeds, and interval over clips.

  A metric is averaged over the folds and then has a mean and a standard
  deviation over the seeds. The interval is of a bootstrap of the clips of all
  folds, averaged over the seeds; clips of a group are drawn together.

  Args:
    parts: seed -> predictions of each fold.
    settings: `config.evaluation`.
  """
  options = {"confidence": settings.confidence, "names": settings.metrics}
  summary = {metric: {"per_seed": []} for metric in settings.metrics}
  intervals = []
  for seed, folds in parts.items():
    values = [
      scores.measure(
        evaluation(fold), num_resamples=0, seed=seed, groups=None, **options
      )
      for fold in folds
    ]
    for metric in settings.metrics:
      mean = np.mean([value[metric]["value"] for value in values])
      summary[metric]["per_seed"].append(float(mean))
    pooled = pool(folds)
    intervals.append(
      scores.measure(
        evaluation(pooled),
        num_resamples=settings.num_resamples,
        seed=seed,
        # A clip that several folds were tested on is one clip.
        groups=pooled.get("groups", pooled["ids"]).tolist(),
        **options,
      )
    )
  for metric, row in summary.items():
    values = row["per_seed"]
    row["mean"] = float(np.mean(values))
    row["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    if "low" in intervals[0][metric]:
      row |= {
        end: float(np.mean([i[metric][end] for i in intervals]))
        for end in ("low", "high")
      }
  return summary


def _clips(details: list[dict], pooled: Mapping) -> dict:
  """Returns how many clips a row is of, and which."""
  first = evaluation(next(iter(pooled.values())))
  names = ("num_clips", "num_unusable", "num_missing")
  counts = {k: sum(d[k] for d in details) // len(pooled) for k in names}
  return {
    **counts,
    "absent_classes": first.absent_classes(),
    "clips_sha256": sorted({d["clips_sha256"] for d in details}),
  }


def pool(folds: Sequence[results.Predictions]) -> results.Predictions:
  """Returns the predictions of all folds as of one split."""
  return {k: np.concatenate([fold[k] for fold in folds]) for k in folds[0]}


def evaluation(arrays: results.Predictions) -> scores.Evaluation:
  """Returns predictions as they are measured."""
  logits, targets = arrays["logits"], arrays["targets"]
  return scores.Evaluation(
    logits.astype(np.float64), targets.astype(np.float64)
  )


def _table(config: ConfigDict, rows: list[dict]) -> Table:
  """Returns ours and the published numbers, in percent where they are one."""
  names = list(config.evaluation.metrics)
  body = []
  for row in rows:
    cells = [cell(metric, row["metrics"][metric]) for metric in names]
    name = f"{method_name(config, row)}, {row['split']}"
    body.append([name, *cells, str(row["num_clips"])])
  for line in config.published:
    name, _, value = line.rpartition(":")
    body.append([f"published: {name}", value.strip(), *["-"] * len(names)])
  caption = (
    f"{config.name}: mean ± std of {config.num_seeds} seed(s)"
    f"{f', {config.folds} folds' if config.folds > 1 else ''}"
    f" [{100 * config.evaluation.confidence:g} % interval over clips]"
  )
  return Table(caption, ["result", *map(column, names), "clips"], body)


def method_name(config: ConfigDict, row: Mapping) -> str:
  """Returns what tables call a row, by its encoder and layer."""
  if row["encoder"] == "log_mel":
    return "log-mel mean and std, logistic regression"
  trained = row["encoder"] == "main" and config.init.run
  encoder = "pretrained encoder" if trained else "random encoder"
  if row["layer"] is not None:
    return f"{encoder}, layer {row['layer']}"
  return f"{encoder}, {'knn' if config.knn.k else config.model.head}"


def column(metric: str) -> str:
  """Returns the heading of a metric, which `cell` gives in percent or not."""
  return metric if metric == "d_prime" else f"{metric} %"


def cell(metric: str, value: Mapping) -> str:
  """Returns "81.20 ± 0.90 [78.10, 84.30]" of a `metric_summary`."""
  scale = 1 if metric == "d_prime" else 100
  text = f"{scale * value['mean']:.2f}"
  if value["std"] is not None:
    text += f" ± {scale * value['std']:.2f}"
  if "low" in value:
    text += f" [{scale * value['low']:.2f}, {scale * value['high']:.2f}]"
  return text


def markdown(table: Table) -> str:
  """Returns a table as Markdown, its caption above."""
  lines = [table.columns, ["---"] * len(table.columns), *table.rows]
  body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
  return f"{table.caption}\n\n{body}"


def _figures(config, rows, pooled, class_names) -> dict:
  """Returns heading -> figure for what was measured."""
  figures = {}
  metric = config.evaluation.metrics[0]
  if len(results.layers(config)) > 1:
    own = [row for row in rows if row["encoder"] == "main"]
    figures["Probes of the layers"] = class_plots.plot_layers(own, metric)
  # The last layer; of one split.
  method = Method("main", results.layers(config)[-1])
  split = rows[0]["split"]
  chosen = evaluation(next(iter(pooled[method, split].values())))
  where = split if method.layer is None else f"{split}, layer {method.layer}"
  if (chosen.targets.sum(1) == 1).all():
    figures[f"Confusion: {where}"] = class_plots.plot_confusion(
      chosen.labels, chosen.scores.argmax(1), class_names
    )
  else:
    ap = chosen.per_class(scores.average_precision, np.ones(len(chosen.labels)))
    figures[f"Average precision per class: {where}"] = (
      class_plots.plot_per_class(ap, class_names, "average precision")
    )
  if not config.knn.k:  # Votes are no probabilities.
    figures[f"Reliability: {where}"] = class_plots.plot_reliability(
      *_guesses(chosen, config.loss.name)
    )
  return figures


def _guesses(
  evaluation: scores.Evaluation, loss: str
) -> tuple[np.ndarray, ...]:
  """Returns the probability of each guess, and 1 where it is right.

  A softmax guesses one class per clip, a sigmoid answers for every class.
  """
  logits, targets = evaluation.scores, evaluation.targets
  if loss == "sigmoid":
    probability = special.expit(logits)
    right = (probability > 0.5) == (targets > 0.5)
    confidence = np.maximum(probability, 1 - probability)
    return confidence.ravel(), right.ravel().astype(float)
  guess = logits.argmax(1)[:, None]
  probability = special.softmax(logits, axis=1)
  return tuple(
    np.take_along_axis(values, guess, 1)[:, 0].astype(float)
    for values in (probability, targets)
  )


def _write_predictions(
  path: pathlib.Path, pooled: Mapping, class_names: list[str]
) -> None:
  """Writes one line per clip, method and seed."""
  temporary = path.with_suffix(".tmp")
  with temporary.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
      ["id", "split", *Method._fields, "seed", "labels", "predicted"]
    )
    for (method, split), by_seed in pooled.items():
      for seed, arrays in by_seed.items():
        for name, logits, targets in zip(
          arrays["ids"], arrays["logits"], arrays["targets"], strict=True
        ):
          labels = ";".join(class_names[i] for i in np.flatnonzero(targets))
          guess = class_names[int(logits.argmax())]
          # The writer leaves the cell of a None empty.
          writer.writerow([name, split, *method, seed, labels, guess])
  temporary.replace(path)


def json_text(tree: Any) -> str:
  """Returns JSON, with null for what it has no number for."""
  text = json.dumps(_finite(tree), indent=2, allow_nan=False, default=list)
  return text + "\n"


def _finite(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {name: _finite(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_finite(value) for value in tree]
  return None if isinstance(tree, float) and not np.isfinite(tree) else tree


SELECTION_NOTES = {
  "last": "Every number is of the last step; no split chose it.",
  "valid": "Every number is of the step that was best on the validation clips.",
  "test": (
    "Every number is of the step that was best on the test clips themselves, "
    "as the published ones are: an optimistic number."
  ),
}
