"""What supervised runs there are, and the files that each leaves.

A run's result.json appears when all of it is done, so it marks what need not
be done again. `comparison` makes one table of all.
"""

import functools
import hashlib
import json
import operator
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from audiomosaic_jax import calibration, clip_record, files, predict, scores
from audiomosaic_jax.data import supervised
from audiomosaic_jax.data.sources import Source

ConfigDict = ml_collections.ConfigDict
Predictions = dict[str, np.ndarray]

RESULT_FILE, PREDICTIONS_FILE = "result.json", "predictions.npz"
# Of the clips that chose the state and the calibration; no result is of them.
VALIDATION_FILE = "validation.npz"
# Folder of the runs in a workdir.
RUNS = "runs"
# Fields that change no single run.
NOT_OF_A_RUN = (
  *("num_seeds", "layers", "runtime", "published", "log_every", "baselines"),
  *("checkpoint", "cache", "fallback", "name"),
)
# The same of fields in blocks.
BLOCKS_NOT_OF_A_RUN = {
  "evaluation": ("num_resamples", "confidence"),
  "data.guard": ("cache_bytes",),
  "data.pipeline": ("num_threads", "prefetch_size", "num_workers"),
}

# Encoders that a run can be compared with.
BASELINES = ("random", "log_mel")


class Place(NamedTuple):
  """Which run of a sweep.

  Attributes:
    encoder: "main", or one of `BASELINES`.
    layer: None for heads that probe no one layer.
    fold: from 0.
    seed: of initialisation, order and augmentation.
  """

  encoder: str
  layer: int | None
  fold: int
  seed: int


class Method(NamedTuple):
  """One row of the table; its runs are the folds and seeds."""

  encoder: str
  layer: int | None

  def places(self, config: ConfigDict) -> list[Place]:
    """Returns the runs. Nothing is random in statistics of log-mel frames."""
    seeds = range(config.seed, config.seed + config.num_seeds)
    if self.encoder == "log_mel":
      seeds = seeds[:1]
    return [
      Place(*self, f, seed) for f in range(config.folds) for seed in seeds
    ]


def methods(config: ConfigDict) -> list[Method]:
  """Returns what is trained and compared, the config's own encoder first.

  Without a pretraining run that encoder is random itself.
  """
  found = [Method("main", layer) for layer in layers(config)]
  if "random" in config.baselines and config.init.run:
    found += [Method("random", layer) for layer in layers(config)]
  if "log_mel" in config.baselines:
    found.append(Method("log_mel", None))
  return found


def layers(config: ConfigDict) -> tuple[int | None, ...]:
  """Returns the layers to probe one by one; all of them if none is named."""
  if config.model.head != "layer":
    return (None,)
  return config.layers or tuple(range(config.model.encoder.depth))


def config_of(config: ConfigDict, place: Place) -> ConfigDict:
  """Returns the config of one run, which says what layer it probes."""
  own = config.copy_and_resolve_references()
  if place.layer is not None:
    own.model.layer = place.layer
  return own


def folder(
  config: ConfigDict, workdir: pathlib.Path, place: Place
) -> pathlib.Path:
  """Returns the folder of one run."""
  parts = [f"seed_{place.seed}"]
  if config.folds > 1:
    parts.insert(0, f"fold_{place.fold + 1}")
  if place.layer is not None:
    parts.insert(0, f"layer_{place.layer}")
  if place.encoder != "main":
    parts.insert(0, place.encoder)
  return workdir / RUNS / "_".join(parts)


def fingerprint(config: ConfigDict, place: Place) -> str:
  """Returns a hash of the fields that decide the result of a run.

  Of the states of the pretraining run only the one that this run starts from
  decides.
  """
  settings = json.loads(json.dumps(config.to_dict()))
  states = settings["init"].pop("states")
  if states and place.encoder == "main":
    index = (place.seed - config.seed) % len(states)
    settings["init"]["state"] = states[index]
  for name in NOT_OF_A_RUN:
    settings.pop(name)
  if config.model.head == "layer":
    settings["model"].pop("layer")
  for path, names in BLOCKS_NOT_OF_A_RUN.items():
    block = functools.reduce(operator.getitem, path.split("."), settings)
    for name in names:
      block.pop(name)
  text = json.dumps(settings, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_finished(
  config: ConfigDict, workdir: pathlib.Path, place: Place
) -> bool:
  """Whether a run has its result.

  Raises:
    ValueError: it has the result of another config, or of another encoder.
  """
  path = folder(config, workdir, place) / RESULT_FILE
  if not path.exists():
    return False
  result, expected = json.loads(path.read_text()), fingerprint(config, place)
  if result["fingerprint"] != expected:
    raise ValueError(
      f"{path} is the result of another config or encoder "
      f"({result['fingerprint']}, this is {expected}); give another "
      f"--workdir, or remove {path.parent}"
    )
  return True


def predictions(windows: predict.Windows, source: Source) -> Predictions:
  """Returns what is kept of the logits of a split: arrays, one row per clip.

  These are "logits" [N, C], "targets" [N, C], "ids" [N] and, if the source
  tells which clips belong together, "groups" [N].
  """
  evaluation, found = predict.evaluation(windows, source)
  arrays = {
    "logits": evaluation.scores.astype(np.float32),
    "targets": evaluation.targets.astype(np.uint8),
    "ids": np.array([source.ids[i] for i in found]),
  }
  if source.groups is not None:
    arrays["groups"] = np.array([source.groups[i] for i in found])
  return arrays


def write_run(
  config: ConfigDict,
  place_folder: pathlib.Path,
  place: Place,
  splits: supervised.Splits,
  logits: Mapping[str, predict.Windows],
  *,
  step: int,
  saved: str,
) -> None:
  """Writes predictions and, last and in one rename, the result of a run.

  With logits of the validation clips, their calibration, too. Process 0
  writes, whichever calls it.

  Args:
    config: the experiment.
    place_folder: folder of the run.
    place: which run it is.
    splits: clips of its fold.
    logits: split -> logits of its windows; the test splits, and "valid" if
      there is one and logits are no votes.
    step: of the chosen state.
    saved: what its checkpoints hold: "all", the "head" or "nothing".
  """
  if jax.process_index() != 0:
    return
  place_folder.mkdir(parents=True, exist_ok=True)
  sources = splits.named()
  kept = {
    name: predictions(rows, sources[name]) for name, rows in logits.items()
  }
  tested = {name: kept[name] for name in splits.tests}
  class_names = list(splits.train.class_names)
  link = link_of(config, place, splits.train.multi_hot)
  # Of a run that was stopped before its result.
  for name in (calibration.FILE, VALIDATION_FILE):
    (place_folder / name).unlink(missing_ok=True)
  if "valid" in kept:
    valid = kept["valid"]
    files.write_arrays(place_folder / VALIDATION_FILE, valid, compress=True)
    fitted = calibration.fit(
      valid["logits"],
      valid["targets"],
      link,
      multi_label=splits.train.multi_hot,
    )
    calibration.write(place_folder, fitted, class_names, kept)
  files.write_arrays(
    place_folder / PREDICTIONS_FILE,
    {
      f"{name}/{k}": a
      for name, arrays in tested.items()
      for k, a in arrays.items()
    },
    compress=True,
  )
  result = {
    **place._asdict(),
    "fingerprint": fingerprint(config, place),
    "selection": config.evaluation.selection,
    "step": step,
    "saved": saved,
    "link": link,
    "class_names": class_names,
    "multi_label": splits.train.multi_hot,
    "splits": {
      name: _describe(config, splits.tests[name], arrays)
      for name, arrays in tested.items()
    },
  }
  files.write_text(
    place_folder / RESULT_FILE, json.dumps(result, indent=2) + "\n"
  )


def link_of(config: ConfigDict, place: Place, multi_label: bool) -> str | None:
  """Returns what makes probabilities of the logits of a run; None of votes."""
  if place.encoder == "log_mel":
    return calibration.SIGMOID if multi_label else calibration.SOFTMAX
  return None if config.knn.k else config.loss.name


def _describe(config: ConfigDict, source: Source, kept: Predictions) -> dict:
  """Returns what the result says of a test split."""
  count = len(kept["ids"])
  values = scores.measure(
    evaluation(kept),
    config.evaluation.metrics,
    num_resamples=0,
    confidence=config.evaluation.confidence,
    seed=0,
    groups=None,
  )
  return {
    "num_clips": count,
    "num_unusable": len(source) - count,
    "num_missing": len(source.missing),
    "clips_sha256": clip_record.digest(source.ids),
    "metrics": {metric: v["value"] for metric, v in values.items()},
  }


def evaluation(arrays: Predictions) -> scores.Evaluation:
  """Returns predictions as they are measured."""
  logits, targets = arrays["logits"], arrays["targets"]
  return scores.Evaluation(
    logits.astype(np.float64), targets.astype(np.float64)
  )


def read_result(
  config: ConfigDict, workdir: pathlib.Path, place: Place
) -> dict:
  """Returns the result of a finished run.

  Raises:
    FileNotFoundError: it has not finished.
  """
  path = folder(config, workdir, place)
  if not (path / RESULT_FILE).exists():
    raise FileNotFoundError(
      f"{path} has no {RESULT_FILE}; finish the run with the command that "
      "began it"
    )
  return json.loads((path / RESULT_FILE).read_text())


def read_run(
  config: ConfigDict, workdir: pathlib.Path, place: Place
) -> tuple[dict, dict[str, Predictions]]:
  """Returns (result, test split -> predictions) of a finished run.

  Raises:
    FileNotFoundError: it has not finished.
  """
  result = read_result(config, workdir, place)
  path = folder(config, workdir, place)
  splits = {name: {} for name in result["splits"]}
  with np.load(path / PREDICTIONS_FILE) as stored:
    for name in stored.files:
      split, _, key = name.rpartition("/")
      splits[split][key] = stored[name]
  return result, splits
