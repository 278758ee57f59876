"""Imports a published PyTorch checkpoint as the folder of a run.

  python -m audiomosaic_jax.import_torch --input=PATH --output=runs/imported

PATH is a .safetensors file, a .pt, .pth or .bin file where PyTorch is
installed, or a folder that `huggingface_hub.snapshot_download` returned.
Nothing in it is executed. The architecture follows from names and shapes of
the tensors; each has its place or is refused by name. What no tensor tells is
printed with its source, and has a flag.

The folder then serves as a run: --config.init.run=runs/imported in
configs/finetune.py and configs/linear_eval.py, --workdir=runs/imported in
configs/evaluate.py, `audiomosaic_jax.load_encoder("runs/imported")`.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging

from audiomosaic_jax import (
  checkpoint,
  experiment,
  files,
  torch_config,
  torch_files,
  torch_heads,
  torch_params,
  torch_report,
  torch_settings,
)
from audiomosaic_jax.data import tables
from audiomosaic_jax.models import heads, positions

ConfigDict = ml_collections.ConfigDict
Tensors = dict[str, np.ndarray]

REPORT_FILE, REPORT_TEXT = "import_report.json", "import_report.md"
IGNORED_FILE = "ignored.safetensors"
POSITIONS = "pos_embed"


@dataclasses.dataclass(frozen=True)
class Imported:
  """A checkpoint as this project has it.

  Attributes:
    config: of a pretraining run, or with mode "finetune" of a classifier.
    variables: "params" and maybe "batch_stats", float32.
    ignored: tensors that have no place in the model, by bare name, and the
      positions as they were if they were resized.
    report: what became of every tensor, and where values come from.
  """

  config: ConfigDict
  variables: dict[str, Any]
  ignored: Tensors
  report: dict[str, Any]


def read(
  path: str | os.PathLike,
  choices: torch_settings.Choices = torch_settings.NO_CHOICES,
  *,
  num_frames: int | None = None,
) -> Imported:
  """Reads a published checkpoint.

  Args:
    path: see `torch_files.read`.
    choices: what a person knows of it.
    num_frames: resize the positions to spectrograms of this length; None
      keeps them.

  Raises:
    FileNotFoundError: there are no tensors.
    ValueError: a tensor is missing, too many or of another shape, or the
      architecture cannot be told.
    ImportError: a file of torch.save, and PyTorch is not installed or too old.
  """
  found = torch_files.read(path)
  stored = torch_params.bare_names(found.tensors)
  source = {bare: found.tensors[name] for bare, name in stored.items()}
  shapes = {name: tensor.shape for name, tensor in source.items()}
  derived = torch_config.derive(shapes, found.settings, choices)
  config = derived.config
  tensors = {
    name: tensor.astype(np.float32)
    if tensor.dtype.name in torch_report.HALF
    else tensor
    for name, tensor in source.items()
  }
  if num_frames is not None:
    tensors[POSITIONS] = _resize(tensors[POSITIONS], config, num_frames)
  target = abstract_variables(config)
  variables, unused = torch_params.from_torch(
    tensors, target, ignore=derived.ignore
  )
  ignored = {name: source[name] for name in unused}
  _check_finite(tensors, ignored)
  if num_frames is not None:
    ignored[POSITIONS] = source[POSITIONS]
  places = {
    name: "/".join(entry.path)
    for entry in torch_params.rename_table(target)
    for name in entry.names
  }
  report = {
    "input": pathlib.Path(os.path.abspath(path)).name,
    "files": [torch_report.describe(file) for file in found.files],
    "head": derived.head,
    "num_parameters": sum(
      leaf.size for leaf in jax.tree.leaves(variables["params"])
    ),
    "notes": list(derived.notes),
    "normalization": config.normalization,
    "tensors": [
      torch_report.row(name, stored[name], source[name], tensors[name], places)
      for name in source
    ],
  }
  return Imported(config, variables, ignored, report)


def write(imported: Imported, output: str | os.PathLike) -> None:
  """Writes the folder of a run, which appears when it is complete.

  Args:
    imported: from `read`.
    output: a folder that does not exist yet, or is empty.

  Raises:
    ValueError: something is there.
  """
  output = pathlib.Path(output).expanduser()
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"output {output} exists; give a new folder, or remove it")
  output.parent.mkdir(parents=True, exist_ok=True)
  folder = output.with_name(f"{output.name}.{os.getpid()}.tmp")
  try:
    with checkpoint.Checkpointer(
      folder / "checkpoints", keep_last=1, keep_every=0
    ) as saved:
      meta = {"config": imported.config.to_dict(), "imported": True}
      state = jax.tree.map(jnp.asarray, imported.variables)
      saved.save(0, state, meta)
    torch_files.write_tensors(imported.ignored, folder / IGNORED_FILE)
    text = json.dumps(imported.report, indent=1) + "\n"
    files.write_text(folder / REPORT_FILE, text)
    files.write_text(folder / REPORT_TEXT, torch_report.text(imported.report))
    experiment.save_config(imported.config, folder)
    folder.replace(output)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def abstract_variables(config: ConfigDict) -> dict[str, Any]:
  """Returns the shapes of the variables of an imported model.

  Args:
    config: of `read`, or read from a folder that `write` left.

  Returns:
    A tree for `checkpoint.load_params`.
  """
  if config.mode == "finetune":
    grid = experiment.token_grid(config)
    model = heads.build(
      grid=grid, num_classes=config.num_classes, **config.model
    )
  else:
    model = experiment.build_model(config)
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  return jax.eval_shape(
    lambda key: model.init(
      key, jnp.zeros((2, frames, bins)), None, train=False
    ),
    jax.random.key(0),
  )


def export_safetensors(
  variables: Any, ignored: Mapping[str, np.ndarray], path: str | os.PathLike
) -> None:
  """Writes variables under the names and in the layouts of PyTorch.

  Args:
    variables: collections "params" and maybe "batch_stats".
    ignored: tensors to add as they are, such as `Imported.ignored`.
    path: of the .safetensors file.
  """
  tensors = torch_params.to_torch(variables, ignored=dict(ignored))
  torch_files.write_tensors(tensors, path)


def export_folder(folder: str | os.PathLike, path: str | os.PathLike) -> None:
  """Writes the tensors of an imported folder as they were imported.

  Names with their prefixes, precision, and every byte: undoes the command.

  Args:
    folder: that `write` left.
    path: of the .safetensors file.
  """
  folder = pathlib.Path(folder).expanduser()
  config = experiment.load_config(folder)
  variables = jax.device_get(
    checkpoint.load_params(folder, abstract_variables(config))
  )
  tensors = torch_params.to_torch(variables, ignored={})
  tensors |= torch_files.read_tensors(folder / IGNORED_FILE)
  rows = json.loads((folder / REPORT_FILE).read_text())["tensors"]
  torch_files.write_tensors(
    {
      row["stored_as"]: tensors[row["name"]].astype(jnp.dtype(row["dtype"]))
      for row in rows
    },
    path,
  )


def _resize(
  table: np.ndarray, config: ConfigDict, num_frames: int
) -> np.ndarray:
  """Returns positions for another length, which the config then has."""
  old_grid = experiment.token_grid(config)
  config.spectrogram.num_frames = num_frames
  config.data.pipeline.clip_samples = torch_settings.clip_samples(
    config.fbank.to_dict(), num_frames
  )
  return positions.resize_positions(
    table,
    old_grid,
    experiment.token_grid(config),
    layout="paper",
    method="bilinear",
  )


def _check_finite(tensors: Tensors, ignored: Tensors) -> None:
  for name, tensor in tensors.items():
    if name not in ignored and not np.isfinite(tensor).all():
      raise ValueError(
        f"{name} holds NaN or infinite values; the checkpoint is damaged"
      )


def read_class_names(path: str) -> tuple[str, ...]:
  """Returns the lines of a text, or the display names of a published .csv."""
  if path.endswith(".csv"):
    return tables.read_label_csv(path)[1]
  return tuple(pathlib.Path(path).read_text().splitlines())


def define_flags() -> Callable[[], tuple]:
  """Defines the flags; returns what gives the arguments of `run`."""
  text, integer = flags.DEFINE_string, flags.DEFINE_integer
  source = text("input", None, "Checkpoint: file or folder.")
  output = text("output", None, "Folder to write; a new one.")
  stats = text(
    "stats", None, "Normalisation that the encoder was trained with: "
    f"{', '.join(torch_settings.STATISTICS)}, or MEAN,STD. Default: "
    "config.json, or that of the task with spectrograms of this length.",
  )  # fmt: skip
  normalization = flags.DEFINE_enum(
    "normalization", "training", list(torch_settings.NORMALIZATIONS),
    "training divides by 2 std, as the published training does; huggingface "
    "by std, for what was fine-tuned with the preprocess() of the published "
    "Hugging Face folders.",
  )  # fmt: skip
  head = flags.DEFINE_enum(
    "head", None, list(torch_heads.HEADS),
    "What follows the encoder; the tensors tell, but for layer, which looks "
    "like linear. none imports the encoder alone, for --config.init.run.",
  )  # fmt: skip
  layer = integer("layer", None, "Block that head layer reads, from 0.")
  pooling = flags.DEFINE_enum(
    "pooling", None, ["mean", "cls"], "Default: config.json, or mean."
  )
  num_heads = integer(
    "num_heads", None, "Default: config.json, or one per 64 channels."
  )
  activation = flags.DEFINE_enum(
    "activation", None, ["gelu", "silu"], "Default: config.json, or gelu."
  )
  bins = integer("num_mel_bins", None, "Default: config.json, or 128.")
  num_frames = integer(
    "num_frames", None, "Resize the positions to spectrograms so long."
  )
  layout = flags.DEFINE_enum(
    "layout", "released", list(torch_config.LAYOUTS),
    "Grid of the table that positions started from; only recorded.",
  )  # fmt: skip
  names = text(
    "class_names", None, "Of a classifier: a text with one per line, or a "
    ".csv of index, mid, display_name.",
  )  # fmt: skip
  flags.mark_flags_as_required(["input", "output"])

  def values():
    choices = torch_settings.Choices(
      head=head.value,
      layer=layer.value,
      pooling=pooling.value,
      num_heads=num_heads.value,
      activation=activation.value,
      num_mel_bins=bins.value,
      statistics=stats.value and torch_settings.parse_statistics(stats.value),
      class_names=read_class_names(names.value) if names.value else (),
      layout=layout.value,
      normalization=normalization.value,
    )
    return source.value, output.value, choices, num_frames.value

  return values


def run(
  path: str,
  output: str,
  choices: torch_settings.Choices,
  num_frames: int | None,
) -> None:
  """Imports a checkpoint, and prints what was not in its tensors."""
  imported = read(path, choices, num_frames=num_frames)
  write(imported, output)
  summary = torch_report.text(imported.report).partition("\n## Tensors")[0]
  print(f"{summary}\nall tensors: {pathlib.Path(output) / REPORT_TEXT}")


def main(argv: list[str], arguments: Callable[[], tuple]) -> None:
  """Runs the command; what a person can mend is told in one message."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  try:
    run(*arguments())
  except (OSError, ValueError, ImportError) as error:
    raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
  ARGUMENTS = define_flags()
  app.run(lambda argv: main(argv, ARGUMENTS))
