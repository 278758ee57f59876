"""Where an encoder comes from: a pretraining run, fitted to another task.

A field of the config that is None is filled in from the run whose encoder is
used, or without one from `config.fallback`; what was set stays as it is.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from audiomosaic_jax import checkpoint, experiment, masking
from audiomosaic_jax.models import positions

ConfigDict = ml_collections.ConfigDict
Params = dict[str, Any]

# Fields that decide what the parameters are.
SHAPING = (
  *("patch_size", "width", "depth", "num_heads", "mlp_ratio", "norm"),
  *("activation", "qk_norm", "qkv_bias", "proj_bias", "class_token"),
  "final_norm",
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A pretraining run.

  Attributes:
    config: what it was run with.
    folders: one per seed.
  """

  config: ConfigDict
  folders: tuple[pathlib.Path, ...]


def find_run(path: str) -> Run | None:
  """Returns the run in a workdir, or of one seed's folder in it; None for "".

  Raises:
    FileNotFoundError: not the folder of a run.
    ValueError: a run of an audio-language model.
  """
  if not path:
    return None
  workdir = pathlib.Path(path).expanduser()
  if (workdir / experiment.CONFIG_FILE).exists():
    config = experiment.load_config(workdir)
    if config.mode == "instruct":
      raise ValueError(
        f"init.run={path} holds a model that answers; give the pretraining run "
        f"that it started from, {config.init.run!r}"
      )
    folders = tuple(experiment.seed_folders(config, workdir).values())
    return Run(config, folders)
  if (workdir.parent / experiment.CONFIG_FILE).exists():
    return Run(experiment.load_config(workdir.parent), (workdir,))
  raise FileNotFoundError(
    f"init.run={path} is not a pretraining run: neither it nor the folder "
    f"above has a {experiment.CONFIG_FILE}"
  )


def complete(config: ConfigDict, run: Run | None) -> list[str]:
  """Fills in the fields that are None, in place.

  Args:
    config: with the blocks of `config.fallback`.
    run: where the values come from; None takes those of the fallback.

  Returns:
    One line for each field, for the person who watches.

  Raises:
    ValueError: the encoder is of another size than the run's, or a field is
      None and nowhere given.
  """
  given = config.fallback if run is None else run.config
  name = "config.fallback" if run is None else str(run.folders[0])
  lines = []
  with config.unlocked():
    for field in _empty_fields(config, config.fallback):
      value = _look_up(given, field)
      _assign(config, field, value)
      lines.append(f"config.{field}={value!r} (from {name})")
  if run is not None:
    config.init.states = states(run)
    _check_sizes(config.model.encoder, run.config.model.encoder, name)
  return lines


def states(run: Run) -> tuple[str, ...]:
  """Returns what tells the state of each seed from others; "" has none yet."""

  def state(folder):
    try:
      return checkpoint.identity(folder)
    except FileNotFoundError:
      return ""

  return tuple(map(state, run.folders))


def check_states(run: Run, expected: tuple[str, ...], name: str) -> None:
  """Raises ValueError if a run has other states than heads were trained on.

  Args:
    run: whose encoder the heads take.
    expected: `states` of it when they were trained.
    name: of the folder of the heads, for the message.
  """
  found = states(run)
  if found != tuple(expected):
    raise ValueError(
      f"the heads in {name} were trained on states {tuple(expected)} of "
      f"{run.folders[0]}, which now has {found}; probe it again in another "
      "--workdir"
    )


def load(
  abstract: Params, config: ConfigDict, run: Run | None, seed_index: int
) -> Params:
  """Reads what a run learned and the new model can use.

  Args:
    abstract: parameters of the new model, shapes only.
    config: the new experiment, completed.
    run: the pretraining run; None gives nothing.
    seed_index: which of its seeds to take, counted modulo their number.

  Returns:
    {"encoder": ...} and, if `config.init.fc_norm` and both models have one of
    the same width, "fc_norm". Positions are resized to the new grid.

  Raises:
    ValueError: the checkpoint holds other parameters than its config tells.
  """
  if run is None:
    return {}
  wanted = {"encoder": abstract["encoder"]}
  if _shares_fc_norm(abstract, config, run):
    wanted["fc_norm"] = abstract["fc_norm"]
  return _read(wanted, config, run, seed_index)


def load_encoder(
  abstract: Params, config: ConfigDict, run: Run | None, seed_index: int
) -> Params:
  """Reads an encoder whose output is normalised, as a language model's is.

  Pretraining normalises after its pooling instead: that norm becomes the last
  one of the encoder, as in the published code.

  Args:
    abstract: parameters of the encoder with its final norm, shapes only.
    config: as of `load`.
    run: as of `load`; None gives nothing.
    seed_index: as of `load`.

  Raises:
    ValueError: as `load`.
  """
  if run is None:
    return {}
  if run.config.model.encoder.final_norm:
    return _read({"encoder": abstract}, config, run, seed_index)["encoder"]
  rest = dict(abstract)
  wanted = {"fc_norm": rest.pop("norm"), "encoder": rest}
  if not _has_fc_norm(run.config.model):
    del wanted["fc_norm"]
  read = _read(wanted, config, run, seed_index)
  norm = {"norm": read["fc_norm"]} if "fc_norm" in read else {}
  return {**read["encoder"], **norm}


def _read(
  wanted: Params, config: ConfigDict, run: Run, seed_index: int
) -> Params:
  """Reads parameters of a run, its positions fitted to the new grid."""
  old_grid = masking.grid_shape(
    run.config.spectrogram.num_frames,
    run.config.fbank.num_mel_bins,
    run.config.model.encoder.patch_size,
  )
  new_grid = experiment.token_grid(config)
  encoder = dict(wanted["encoder"])
  extra = int(config.model.encoder.class_token)
  encoder["pos_embed"] = jax.ShapeDtypeStruct(
    (1, old_grid[0] * old_grid[1] + extra, config.model.encoder.width),
    encoder["pos_embed"].dtype,
  )
  wanted = {**wanted, "encoder": encoder}
  folder = run.folders[seed_index % len(run.folders)]
  params = checkpoint.load_params(folder, {"params": wanted})["params"]
  if old_grid != new_grid:
    table = np.asarray(params["encoder"]["pos_embed"])
    params["encoder"]["pos_embed"] = positions.resize_positions(
      table, old_grid, new_grid, **config.init.positions
    )
  return params


def _shares_fc_norm(abstract: Params, config: ConfigDict, run: Run) -> bool:
  """Whether the norm after the pooling means the same in both models."""
  if not config.init.fc_norm or "fc_norm" not in abstract:
    return False
  theirs = run.config.model
  if not _has_fc_norm(theirs) or config.model.head != "linear":
    return False
  return config.model.pooling == theirs.pooling


def _has_fc_norm(model: ConfigDict) -> bool:
  """Whether a model has a norm after its pooling."""
  # An imported classifier has a head, what was pretrained has a switch.
  return model.head == "linear" if "head" in model else model.use_fc_norm


def _check_sizes(ours: ConfigDict, theirs: ConfigDict, name: str) -> None:
  for field in SHAPING:
    if ours[field] != theirs[field]:
      raise ValueError(
        f"config.model.encoder.{field} is {ours[field]!r}, but the encoder in "
        f"{name} has {theirs[field]!r}; leave it to the run (no variant=), or "
        "give a run of that size"
      )


def _empty_fields(tree: ConfigDict, known: Any, prefix: str = "") -> list[str]:
  """Returns the dotted names that are None and that `known` has."""
  fields = []
  for key in known:
    if isinstance(known[key], ConfigDict):
      fields += _empty_fields(tree[key], known[key], f"{prefix}{key}.")
    elif tree[key] is None:
      fields.append(prefix + key)
  return fields


def _look_up(tree: Any, field: str) -> Any:
  for name in field.split("."):
    tree = tree[name]
  return tree


def _assign(config: ConfigDict, field: str, value: Any) -> None:
  *path, last = field.split(".")
  for name in path:
    config = config[name]
  config[last] = value
