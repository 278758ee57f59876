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

from audiomosaic_jax import (
  calibration,
  class_plots,
  files,
  report,
  results,
  scores,
  tables,
)
from audiomosaic_jax.calibration import Calibration
from audiomosaic_jax.results import Method, evaluation
from audiomosaic_jax.tables import Table

ConfigDict = ml_collections.ConfigDict

# With more classes, predictions.csv has no column for each.
MAX_PROBABILITIES = 100


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
    runs = [read_run(config, workdir, p) for p in method.places(config)]
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
          "calibration": _calibration(runs, pooled[method, split]),
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
  shown = [_table(config, rows), *_calibration_tables(config, rows)]
  note = summary["selection_note"]
  text = "\n\n".join([*map(tables.markdown, shown), note])
  files.write_text(workdir / "results.md", f"{text}\n")
  _write_predictions(workdir / "predictions.csv", pooled, class_names)
  for table in shown:
    print(tables.table_text(table), flush=True)
  print(note, flush=True)
  page = report.write_report(
    workdir / "report.html",
    title=f"AudioMosaic: {config.name}",
    figures=_figures(config, rows, pooled, class_names),
    tables=shown,
    text=[f"Encoder from {summary['initialised_from']}. {note}"],
  )
  print(f"report: {page}", flush=True)
  return summary


def read_run(
  config: ConfigDict, workdir: pathlib.Path, place: results.Place
) -> tuple[dict, dict[str, results.Predictions]]:
  """Returns (result, test split -> predictions), calibrated where they can be.

  The result has the run's "calibration", None without one. Predictions have
  "decisions" [N, C] and, unless they are votes, "probabilities" [N, C].
  """
  result, predictions = results.read_run(config, workdir, place)
  fitted = calibration.read(results.folder(config, workdir, place))
  link = result["link"]
  state = fitted or calibration.untouched(
    link or calibration.SOFTMAX,
    len(result["class_names"]),
    result.get("multi_label", False),
  )
  for arrays in predictions.values():
    arrays["decisions"] = state.decisions(arrays["logits"])
    if link is not None:
      arrays["probabilities"] = state.probabilities(arrays["logits"])
  return result | {"calibration": fitted}, predictions


def _calibration(runs: list, pooled: Mapping) -> dict | None:
  """Returns how far probabilities of a split are off; None of votes.

  "before" is as trained, "after" is calibrated, None without validation clips;
  both are means over the seeds. "temperatures" has one for every run.
  """
  link = runs[0][0]["link"]
  if link is None:
    return None
  fitted = [result["calibration"] for result, _ in runs]
  before, after = [], []
  for arrays in pooled.values():
    plain = Calibration(link, 1.0, None).probabilities(arrays["logits"])
    for errors, values in ((before, plain), (after, arrays["probabilities"])):
      pairs = calibration.guesses(values, arrays["targets"], link)
      errors.append(calibration.reliability(*pairs).error)
  known = None not in fitted
  return {
    "link": link,
    "temperatures": [state.temperature for state in fitted] if known else None,
    "before": float(np.mean(before)),
    "after": float(np.mean(after)) if known else None,
  }


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


def _calibration_tables(config: ConfigDict, rows: list[dict]) -> list[Table]:
  """Returns the table of calibration errors; none of votes of neighbours."""
  body, known = [], False
  for row in rows:
    found = row["calibration"]
    if found is None:
      continue
    cells = ["-", f"{100 * found['before']:.1f}", "-"]
    if found["temperatures"]:
      known = True
      cells[0] = f"{np.mean(found['temperatures']):.2f}"
      cells[2] = f"{100 * found['after']:.1f}"
    body.append([f"{method_name(config, row)}, {row['split']}", *cells])
  caption = "Calibration: how far the probability of a guess is off on average"
  caption += (
    ", as trained and after the temperature that fits the validation clips"
    if known
    else "; without validation clips probabilities are as they were trained"
  )
  columns = ["result", "temperature", "error % before", "error % after"]
  return [Table(caption, columns, body)] if body else []


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
  arrays = next(iter(pooled[method, split].values()))
  chosen = evaluation(arrays)
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
  row = {"split": split, **method._asdict()}
  (row,) = (r for r in rows if row.items() <= r.items())
  if row["calibration"] is not None:  # Votes are no probabilities.
    figures[f"Reliability: {where}"] = _plot_reliability(
      arrays, row["calibration"]
    )
  return figures


def _plot_reliability(arrays: results.Predictions, found: dict):
  """Returns the picture of the guesses of one seed, before and after."""
  link = found["link"]
  plain = Calibration(link, 1.0, None).probabilities(arrays["logits"])
  sure, right = calibration.guesses(plain, arrays["targets"], link)
  after = None
  if found["temperatures"]:
    after, _ = calibration.guesses(
      arrays["probabilities"], arrays["targets"], link
    )
  return class_plots.plot_reliability(sure, right, after)


def _write_predictions(
  path: pathlib.Path, pooled: Mapping, class_names: list[str]
) -> None:
  """Writes one line per clip, method and seed.

  Several labels of a clip are separated by ";". Of up to MAX_PROBABILITIES
  classes each has a column with its probability, empty where the method gives
  votes.
  """
  each = class_names if len(class_names) <= MAX_PROBABILITIES else []
  temporary = files.temporary_path(path)
  with temporary.open(
    "w", newline="", encoding="utf-8", errors="surrogateescape"
  ) as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
      ["clip", "split", *Method._fields, "seed", "true", "predicted"]
      + [f"p({name})" for name in each]
    )

    def names(chosen):
      return ";".join(class_names[i] for i in np.flatnonzero(chosen))

    for (method, split), by_seed in pooled.items():
      for seed, arrays in by_seed.items():
        for i, clip in enumerate(arrays["ids"]):
          labels = [names(arrays[k][i]) for k in ("targets", "decisions")]
          # The writer leaves the cell of a None empty.
          row = [clip, split, *method, seed, *labels]
          if each and "probabilities" in arrays:
            row += [f"{p:.4f}" for p in arrays["probabilities"][i]]
          writer.writerow(row)
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
    "those of the first test split if there are several, as the published ones "
    "are: an optimistic number."
  ),
}
