"""A finished classifier, loaded as its result chose it."""

import pathlib
from typing import Any, NamedTuple

import ml_collections

from audiomosaic_jax import (
  calibration,
  checkpoint,
  classifier_setup,
  encoder_source,
  results,
)

ConfigDict = ml_collections.ConfigDict


class Classifier(NamedTuple):
  """What a run of `finetune` has left.

  Attributes:
    config: of the run.
    model: a module of `models.heads`.
    variables: of the model, encoder and head.
    class_names: in the order of the logits.
    calibration: of its probabilities; None without validation clips.
  """

  config: ConfigDict
  model: Any
  variables: dict[str, Any]
  class_names: tuple[str, ...]
  calibration: calibration.Calibration | None


def load(
  config: ConfigDict, workdir: pathlib.Path, place: results.Place
) -> Classifier:
  """Reads a classifier; a frozen encoder comes from its pretraining run.

  Args:
    config: of the experiment, completed.
    workdir: of the experiment.
    place: which of its runs.

  Raises:
    FileNotFoundError: it has not finished.
    ValueError: its encoder was trained on since.
  """
  result = results.read_result(config, workdir, place)
  own = results.config_of(config, place)
  class_names = tuple(result["class_names"])
  model = classifier_setup.build_model(own, len(class_names))
  source = None
  if result["saved"] == "head" and place.encoder == "main":
    source = encoder_source.find_run(config.init.run)
    if source is not None:
      encoder_source.check_states(source, config.init.states, str(workdir))
  variables = classifier_setup.start_variables(model, own, source, place.seed)
  wanted = dict(variables)
  if result["saved"] == "head":
    head = classifier_setup.without_encoder(variables["params"])
    wanted = {"params": head}
  last = config.evaluation.selection == "last"
  folder = results.folder(config, workdir, place)
  saved = checkpoint.load_params(
    folder / ("checkpoints" if last else "best"), wanted
  )
  variables |= saved | {"params": variables["params"] | saved["params"]}
  fitted = calibration.read(folder)
  return Classifier(own, model, variables, class_names, fitted)
