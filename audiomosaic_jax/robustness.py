"""Tests finished classifiers again: other clips, noise, rooms, codecs, rates.

The claim of a representation is that it carries over; this measures it. What
was trained by `finetune` in a workdir is loaded as its result chose it, and
every classifier hears the same degraded clips.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np
import tqdm

from audiomosaic_jax import (
  class_plots,
  classifier_setup,
  comparison,
  encoder_source,
  experiment,
  files,
  predict,
  report,
  results,
  tables,
  trained_classifier,
)
from audiomosaic_jax.data import (
  datasets,
  degrade,
  own_clips,
  supervised,
  wrappers,
)
from audiomosaic_jax.data.sources import Source
from audiomosaic_jax.results import Method, Place, Predictions

ConfigDict = ml_collections.ConfigDict
# (method, split, degradation) -> seed -> predictions of each fold.
Found = dict[tuple[Method, str, str], dict[int, list[Predictions]]]


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Prints and writes how well each finished classifier does, degraded.

  Writes `evaluations/<name>.json`, `.md` and `.html` in the workdir.

  Args:
    config: of `configs/evaluate.py`; `classifier` says on what.
    workdir: of a finished `finetune` experiment.

  Raises:
    FileNotFoundError: a run has not finished.
    ValueError: nothing was trained, or the clips have classes that the
      classifiers do not know.
  """
  settings = config.classifier
  trained = experiment.load_config(workdir)
  degradations = degrade.degradations(
    **settings.degradations, sample_rate_hz=trained.fbank.sample_rate_hz
  )
  methods = [m for m in results.methods(trained) if m.encoder != "log_mel"]
  if trained.knn.k:
    raise ValueError(
      f"{workdir} holds votes of neighbours, which leave nothing to load; "
      "evaluate a probe that is trained, such as probe=linear"
    )
  found: Found = {}
  # Fold by fold, because each has its clips.
  places = sorted(
    ((m, place) for m in methods for place in m.places(trained)),
    key=lambda item: item[1].fold,
  )
  check_encoder(trained, workdir, [place for _, place in places])
  # Only now: the results are of the config as it was.
  if settings.max_windows is not None:
    trained.evaluation.max_windows = settings.max_windows

  @functools.lru_cache(1)
  def clips_of(fold: int) -> dict[tuple[str, str], Source]:
    """Returns (split, degradation) -> clips, kept as far as memory is given."""
    splits = test_clips(settings, trained, workdir, fold)
    share = len(splits) * len(degradations)
    limit_bytes = trained.data.guard.cache_bytes // share
    return {
      (split, name): wrappers.CachedSource(
        degrade.DegradedSource(source, degradation, seed=settings.seed),
        limit_bytes=limit_bytes,
      )
      for split, source in splits.items()
      for name, degradation in degradations.items()
    }

  bar = tqdm.tqdm(
    total=len(places) * len(clips_of(places[0][1].fold)),
    unit="test",
    disable=jax.process_index() != 0,
  )
  with bar:
    for method, place in places:
      classifier = trained_classifier.load(trained, workdir, place)
      classify = predict.make_window_fn(
        classifier.model, classifier.config, "__call__"
      )
      for (split, name), source in clips_of(place.fold).items():
        clips = wrappers.ReclassedSource(source, classifier.class_names)
        windows = classify(classifier.variables, clips)
        arrays = results.predictions(windows, clips)
        by_seed = found.setdefault((method, split, name), {})
        by_seed.setdefault(place.seed, []).append(arrays)
        bar.update()
  if jax.process_index() == 0:
    write(config, trained, workdir, found)


def test_clips(
  settings: ConfigDict, trained: ConfigDict, workdir: pathlib.Path, fold: int
) -> Mapping[str, Source]:
  """Returns split -> clips: of another data set, or what a fold tested on."""
  if not settings.source:
    return classifier_setup.load_splits(trained, workdir, fold).tests
  source, known = own_clips.find(settings.source.to_dict())
  # Where nothing is cut into splits, nothing was trained on either.
  splits = (None,) if known == {} else settings.splits or (None,)
  found = {}
  for split in splits:
    name = split or "all"
    clips = datasets.make_dataset(
      split=(known or {}).get(split, split),
      sample_rate_hz=trained.fbank.sample_rate_hz,
      **source,
    )
    supervised.check_labelled(name, clips)
    found[name] = datasets.guard(
      clips,
      **trained.data.guard,
      report_path=workdir / f"bad_clips_{settings.name}_{name}.jsonl",
    )
  return found


def check_encoder(
  trained: ConfigDict, workdir: pathlib.Path, places: Sequence[Place]
) -> None:
  """Raises ValueError if heads were trained on another encoder than is there.

  Also if a result is of another config than the one in the workdir.
  """
  heads = False
  for place in places:
    result = results.read_result(trained, workdir, place)
    results.is_finished(trained, workdir, place)
    heads |= result["saved"] == "head" and place.encoder == "main"
  run = encoder_source.find_run(trained.init.run) if heads else None
  if run is not None:
    encoder_source.check_states(run, trained.init.states, str(workdir))


def write(
  config: ConfigDict,
  trained: ConfigDict,
  workdir: pathlib.Path,
  found: Found,
) -> None:
  """Writes the files of `run` and prints the table of the first metric."""
  name = config.classifier.name
  rows = [
    {
      **method._asdict(),
      "method": comparison.method_name(trained, method._asdict()),
      "split": split,
      "degradation": degradation,
      "num_clips": len(
        np.unique(comparison.pool(next(iter(parts.values())))["ids"])
      ),
      "metrics": comparison.metric_summary(parts, trained.evaluation),
    }
    for (method, split, degradation), parts in found.items()
  ]
  folder = workdir / "evaluations"
  folder.mkdir(exist_ok=True)
  summary = {"of": trained.name, "settings": config.classifier.to_dict()}
  text = comparison.json_text(summary | {"results": rows})
  files.write_text(folder / f"{name}.json", text)
  table = degradation_table(trained, rows)
  files.write_text(folder / f"{name}.md", tables.markdown(table) + "\n")
  print(tables.table_text(table), flush=True)
  metric = trained.evaluation.metrics[0]
  page = report.write_report(
    folder / f"{name}.html",
    title=f"AudioMosaic: {trained.name}, {name}",
    figures={
      f"{metric} of degraded clips: {split}": class_plots.plot_degradations(
        chosen, metric
      )
      for split, chosen in _by_split(rows)
    },
    tables=[table],
    text=["Every classifier hears the same degraded clips."],
  )
  print(f"report: {page}", flush=True)


def _by_split(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
  for split in dict.fromkeys(row["split"] for row in rows):
    yield split, [row for row in rows if row["split"] == split]


def degradation_table(trained: ConfigDict, rows: list[dict]) -> tables.Table:
  """Returns degradations by classifiers, of the first metric."""
  metric = trained.evaluation.metrics[0]
  methods = list(dict.fromkeys(row["method"] for row in rows))
  body: dict[str, dict[str, str]] = {}
  for row in rows:
    name = f"{row['split']}, {row['degradation']}"
    cell = comparison.cell(metric, row["metrics"][metric])
    body.setdefault(name, {})[row["method"]] = cell
  confidence = 100 * trained.evaluation.confidence
  caption = (
    f"{trained.name}: {comparison.column(metric)}, mean ± std of "
    f"{trained.num_seeds} seed(s) [{confidence:g} % interval over clips]"
  )
  lines = [[name, *(cells[m] for m in methods)] for name, cells in body.items()]
  return tables.Table(caption, ["clips", *methods], lines)
