"""Loads an encoder from what a run or an import has left on disk."""

import json
import os
import pathlib

import jax

from audiomosaic_jax import (
  checkpoint,
  embed_program,
  experiment,
  import_torch,
  results,
  torch_files,
  trained_classifier,
)
from audiomosaic_jax.adapters import huggingface
from audiomosaic_jax.encoder import Encoder
from audiomosaic_jax.models import heads


def load_encoder(
  path: str | os.PathLike, *, dtype: str = "float32", batch_size: int = 16
) -> Encoder:
  """Loads an encoder; nothing that is stored there is executed.

  Args:
    path: workdir of a pretraining run, or the folder of one of its seeds;
      workdir of a fine-tuning run, or the folder of one of its classifiers;
      a folder that `import_torch` or `adapters.huggingface` wrote; or a
      checkpoint that `import_torch` reads, of which nothing is told then.
      Without a seed it is the first.
    dtype: of matrix products; "bfloat16" is faster on accelerators and
      differs in the third digit.
    batch_size: windows computed at once.

  Raises:
    FileNotFoundError: there is no run, or it has saved nothing yet.
    ValueError: what is there does not fit its config.
  """
  folder = pathlib.Path(path).expanduser()
  if _model_type(folder) == huggingface.MODEL_TYPE:
    return huggingface.from_pretrained(
      folder, dtype=dtype, batch_size=batch_size
    )
  if _is_published(folder):
    imported = import_torch.read(folder)
    return _imported(imported.config, imported.variables, dtype, batch_size)
  for workdir in (folder, *folder.parents[:2]):
    if (workdir / experiment.CONFIG_FILE).exists():
      break
  else:
    raise FileNotFoundError(
      f"{folder} is not a run: neither it nor the two folders above have a "
      f"{experiment.CONFIG_FILE}; give a workdir"
    )
  config = experiment.load_config(workdir)
  if "mode" not in config:
    raise ValueError(
      f"{workdir / experiment.CONFIG_FILE} is not that of a run; give the "
      "workdir that this was made from"
    )
  if config.mode == "instruct":
    raise ValueError(
      f"{folder} holds a model that answers, not an encoder; give the run that "
      f"it started from, {config.init.run!r}, or python -m audiomosaic_jax.ask"
    )
  if config.mode == "finetune" and (workdir / results.RUNS).is_dir():
    place = _find_place(config, workdir, folder)
    found = trained_classifier.load(config, workdir, place)
    return Encoder(
      found.config,
      jax.device_get(found.variables),
      found.class_names,
      dtype=dtype,
      batch_size=batch_size,
      classifier=found,
    )
  if config.mode == "finetune":
    if "num_classes" not in config:
      raise FileNotFoundError(
        f"{workdir} has no {results.RUNS}; has its training begun?"
      )
    abstract = import_torch.abstract_variables(config)
    variables = jax.device_get(checkpoint.load_params(folder, abstract))
    return _imported(config, variables, dtype, batch_size)
  if folder == workdir:
    folder = next(iter(experiment.seed_folders(config, workdir).values()))
  model = embed_program.build_embedder(config, 0, dtype)
  abstract = embed_program.abstract_variables(model, config)
  variables = jax.device_get(checkpoint.load_params(folder, abstract))
  return Encoder(config, variables, (), dtype=dtype, batch_size=batch_size)


def _imported(config, variables, dtype: str, batch_size: int) -> Encoder:
  """Returns an encoder of the published code, with its classifier if any."""
  classifier, names = None, ()
  if config.mode == "finetune":
    names = config.class_names or tuple(map(str, range(config.num_classes)))
    with config.unlocked():
      config.evaluation = {"batch_size": batch_size, "max_windows": None}
    model = heads.build(
      grid=experiment.token_grid(config),
      num_classes=config.num_classes,
      **config.model,
    )
    classifier = trained_classifier.Classifier(
      config, model, variables, names, None
    )
  return Encoder(
    config,
    variables,
    names,
    dtype=dtype,
    batch_size=batch_size,
    classifier=classifier,
  )


def _is_published(path: pathlib.Path) -> bool:
  """Whether a path is a checkpoint of the published code, not a run."""
  if path.suffix in torch_files.SUFFIXES:
    return True
  return any((path / name).exists() for name in torch_files.WEIGHT_FILES)


def _model_type(path: pathlib.Path) -> str | None:
  """Returns what a folder of the Hugging Face Hub says it holds, if it does."""
  described = path / torch_files.SETTINGS_FILE
  if not described.exists():
    return None
  return json.loads(described.read_text()).get("model_type")


def _find_place(
  config, workdir: pathlib.Path, folder: pathlib.Path
) -> results.Place:
  """Returns the run that a folder belongs to, or the first of a workdir."""
  places = [p for m in results.methods(config) for p in m.places(config)]
  for place in places:
    if folder in (workdir, results.folder(config, workdir, place)):
      return place
  raise FileNotFoundError(
    f"{folder} is not one of the runs of {workdir}; give one of "
    f"{workdir / results.RUNS}"
  )
