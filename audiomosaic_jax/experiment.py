"""What follows from a config: grid, model, steps, FLOPs, folders of a run."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from audiomosaic_jax import files, masking, throughput
from audiomosaic_jax.models import audiomosaic

ConfigDict = ml_collections.ConfigDict
VIEWS = ("view_time", "view_freq")
CONFIG_FILE = "config.json"


def token_grid(config: ConfigDict) -> tuple[int, int]:
  """Returns (time, freq) patches of one spectrogram."""
  return masking.grid_shape(
    config.spectrogram.num_frames,
    config.fbank.num_mel_bins,
    config.model.encoder.patch_size,
  )


def build_model(config: ConfigDict) -> audiomosaic.AudioMosaic:
  """Returns the model that the config describes; it has no parameters yet."""
  return audiomosaic.build(grid=token_grid(config), **config.model)


def init_variables(
  model: audiomosaic.AudioMosaic, config: ConfigDict, key: jax.Array
) -> dict[str, Any]:
  """Returns freshly drawn `params` and `batch_stats`."""
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  return model.init(key, jnp.zeros((2, frames, bins)), None, train=False)


def count_steps(config: ConfigDict, num_clips: int) -> tuple[int, int]:
  """Returns (total, warm-up) steps of `config.duration`.

  Args:
    config: the experiment.
    num_clips: clips per epoch.

  Raises:
    ValueError: an unknown unit, or less than one step.
  """
  unit = config.duration.unit
  if unit not in ("epochs", "steps"):
    raise ValueError(f"duration.unit is {unit!r}; use 'epochs' or 'steps'")
  per_unit = num_clips / config.batch_size if unit == "epochs" else 1
  total = round(config.duration.total * per_unit)
  warmup = round(config.duration.warmup * per_unit)
  if total < 1:
    raise ValueError(
      f"duration.total={config.duration.total} {unit} of {num_clips} clips is "
      f"less than one step of batch_size {config.batch_size}; train longer"
    )
  return total, warmup


def tokens_per_view(config: ConfigDict) -> dict[str, int]:
  """Returns view -> tokens that the blocks see, the class token included."""
  layout = config.masking.layout
  return {
    view: num_tokens(config, layout=layout, **config.masking[view])
    for view in VIEWS
  }


def num_tokens(config: ConfigDict, **mask: Any) -> int:
  """Returns how many tokens a mask leaves to the blocks, with the class token.

  Args:
    config: the experiment.
    **mask: arguments of `masking.keep_ids`; none hides nothing.
  """
  grid = token_grid(config)
  kept = grid[0] * grid[1]
  if mask:
    keep_ids = functools.partial(
      masking.keep_ids, batch_size=1, grid=grid, **mask
    )
    kept = jax.eval_shape(keep_ids, jax.random.key(0)).shape[1]
  return kept + int(config.model.encoder.class_token)


def encoder_flops(config: ConfigDict, count: int) -> float:
  """Returns the FLOPs of one clip of so many tokens, forward."""
  encoder = config.model.encoder
  return throughput.encoder_flops(
    count,
    patch_dim=encoder.patch_size**2,
    width=encoder.width,
    depth=encoder.depth,
    mlp_ratio=encoder.mlp_ratio,
  )


def flops_per_pair(config: ConfigDict) -> float:
  """Returns the training FLOPs of one pair: forward, and backward as two."""
  return 3 * sum(
    encoder_flops(config, count) for count in tokens_per_view(config).values()
  )


def seed_folders(
  config: ConfigDict, workdir: pathlib.Path
) -> dict[int, pathlib.Path]:
  """Returns seed -> folder: `workdir` itself, or one below it per seed."""
  if config.num_seeds == 1:
    return {config.seed: workdir}
  seeds = range(config.seed, config.seed + config.num_seeds)
  return {seed: workdir / f"seed_{seed}" for seed in seeds}


def save_config(config: ConfigDict, workdir: pathlib.Path) -> list[str]:
  """Writes `workdir/config.json`; returns what differs from the one there.

  A run that is resumed with other values goes on with the new ones; the
  caller shows the returned lines so that nobody is surprised.

  Raises:
    ValueError: the one there is of another kind of job.
  """
  check_mode(config, workdir)
  path = workdir / CONFIG_FILE
  text = json.dumps(config.to_dict(), indent=2)
  new = _flat(json.loads(text))
  old = _flat(json.loads(path.read_text())) if path.exists() else new
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text + "\n")
  return [
    f"config.{name} was {old.get(name)!r}, is now {new.get(name)!r}"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]


def check_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Raises ValueError if the workdir is of another kind of job."""
  path = workdir / CONFIG_FILE
  mode = json.loads(path.read_text())["mode"] if path.exists() else config.mode
  if mode != config.mode:
    raise ValueError(
      f"{workdir} holds a job of mode {mode!r}, and this is one of mode "
      f"{config.mode!r}; give another --workdir"
    )


def load_config(workdir: pathlib.Path) -> ConfigDict:
  """Reads the config that a run was started with.

  Raises:
    FileNotFoundError: `workdir` is not the folder of a run.
  """
  path = workdir / CONFIG_FILE
  if not path.exists():
    raise FileNotFoundError(
      f"{workdir} has no {CONFIG_FILE}; give the workdir of a run"
    )
  return ConfigDict(_with_tuples(json.loads(path.read_text())))


def _with_tuples(tree: Any) -> Any:
  """Returns JSON with tuples for its lists, as configs are written."""
  if isinstance(tree, dict):
    return {name: _with_tuples(value) for name, value in tree.items()}
  return tuple(map(_with_tuples, tree)) if isinstance(tree, list) else tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Returns dotted name -> value of nested dicts."""
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {
    name: value
    for key, subtree in tree.items()
    for name, value in _flat(
      subtree, f"{prefix}.{key}" if prefix else key
    ).items()
  }
