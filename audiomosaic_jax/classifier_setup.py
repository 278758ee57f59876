"""What supervised training starts from: classifier, features, batches."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from audiomosaic_jax import (
  classification,
  clip_record,
  encoder_source,
  experiment,
  metrics,
  optimizer,
  predict,
  results,
  scores,
  sharding,
  train_state,
)
from audiomosaic_jax.data import (
  datasets,
  pipeline,
  rows,
  sampling,
  supervised,
)
from audiomosaic_jax.data.sources import Source
from audiomosaic_jax.models import heads, readout

ConfigDict = ml_collections.ConfigDict
Features = dict[str, predict.Windows]


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of the loop: an encoder, a head, the clips of a fold, a seed.

  `logits_of(variables, clips[split])` are the logits of a split, whether its
  clips are decoded each time or are features in memory. Its checkpoints hold
  "all" of the classifier, or the "head" if the features are stored.
  """

  config: ConfigDict
  seed: int
  workdir: pathlib.Path
  mesh: Any
  splits: supervised.Splits
  batches: Any
  total_steps: int
  eval_every: int
  init: Callable[[], train_state.TrainState]
  step: Callable
  schedule: Callable
  clips: dict[str, Any]
  logits_of: Callable
  saved: str


def build_job(
  config: ConfigDict,
  run: encoder_source.Run | None,
  splits: supervised.Splits,
  seed: int,
  workdir: pathlib.Path,
  cache: pathlib.Path,
) -> Job:
  """Sets up data, model, optimiser and the step.

  Args:
    config: the experiment, completed.
    run: the pretraining run of the encoder, or None.
    splits: clips of one fold.
    seed: of initialisation, order and augmentation.
    workdir: folder of this run.
    cache: folder of features.

  Raises:
    ValueError: two settings do not fit each other.
  """
  mesh = sharding.make_mesh()
  sharding.local_batch_size(config.batch_size, mesh)
  model = build_model(config, len(splits.train.class_names))
  variables = start_variables(model, config, run, seed)
  stored = None
  if can_cache(config, model, variables["params"], splits):
    stored = compute_features(model, variables, splits, config, cache)
    variables = {"params": without_encoder(variables["params"])}
  batches, num_clips = make_batches(config, splits.train, stored, seed)
  total_steps, warmup_steps = experiment.count_steps(config, num_clips)
  schedule = optimizer.make_schedule(
    **config.schedule, warmup_steps=warmup_steps, total_steps=total_steps
  )
  frozen = config.optimizer.frozen if stored is None else ()
  settings = config.optimizer.to_dict() | {"frozen": frozen}
  tx = optimizer.make_optimizer(
    variables["params"], schedule=schedule, **settings
  )
  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    classification.make_train_step(model, tx, config, mesh),
    donate_argnums=0,
    in_shardings=(everywhere, sharding.batch_sharded(mesh), everywhere),
    out_shardings=everywhere,
  )
  # A copy, because the step donates its state.
  init = jax.jit(
    lambda v: train_state.create(jax.tree.map(jnp.copy, v), tx, {}),
    out_shardings=everywhere,
  )
  if stored is None:
    logits_of = predict.make_window_fn(model, config, "__call__")
  else:
    logits_of = predict.make_readout_fn(model, config.evaluation.batch_size)
  per_epoch = num_clips / config.batch_size
  return Job(
    config=config,
    seed=seed,
    workdir=workdir,
    mesh=mesh,
    splits=splits,
    batches=batches,
    total_steps=total_steps,
    eval_every=max(1, round(config.evaluation.eval_every_epochs * per_epoch)),
    init=lambda: init(variables),
    step=step,
    schedule=schedule,
    clips=splits.named() if stored is None else stored,
    logits_of=logits_of,
    saved="all" if stored is None else "head",
  )


def load_splits(
  config: ConfigDict, workdir: pathlib.Path, fold: int
) -> supervised.Splits:
  """Reads the splits of a fold, tolerant of a few clips that do not decode.

  Raises:
    ValueError: clips that cannot be trained on, or others than the job in
      `workdir` began with.
  """
  settings = config.data.splits.to_dict()
  if config.evaluation.selection != "valid":
    # Nobody would look at them.
    settings["valid_fraction"] = 0.0
  splits = supervised.load_splits(
    config.data.source.to_dict(),
    **settings,
    fold=fold,
    num_folds=config.folds,
    seed=config.seed,
    sample_rate_hz=config.fbank.sample_rate_hz,
    min_clip_ms=config.fbank.frame_length_ms,
  )
  if config.evaluation.selection == "valid" and splits.valid is None:
    raise ValueError(
      "evaluation.selection is 'valid' but there are no validation clips: "
      f"data.splits.valid={config.data.splits.valid!r}, which folds leave out; "
      "set data.splits.valid_fraction=0.1, or select 'last'"
    )

  scores.check_classes(config.evaluation.metrics, len(splits.train.class_names))
  clip_record.check(splits, workdir, fold, begun=workdir / results.RUNS)

  def guard(name, clips):
    path = workdir / f"bad_clips_{name}.jsonl"
    return datasets.guard(clips, **config.data.guard, report_path=path)

  guarded = {name: guard(name, clips) for name, clips in splits.named().items()}
  return supervised.Splits(
    guarded.pop("train"), guarded.pop("valid", None), guarded
  )


def build_model(config: ConfigDict, num_classes: int):
  """Returns the classifier that the config describes.

  Raises:
    ValueError: a frozen encoder that the optimiser would still change.
  """
  if (
    config.model.freeze_encoder and "encoder/.*" not in config.optimizer.frozen
  ):
    raise ValueError(
      "model.freeze_encoder is True but optimizer.frozen is "
      f"{config.optimizer.frozen}; add 'encoder/.*', or weight decay would "
      "shrink the frozen encoder"
    )
  grid = experiment.token_grid(config)
  return heads.build(grid=grid, num_classes=num_classes, **config.model)


def start_variables(
  model, config: ConfigDict, run: encoder_source.Run | None, seed: int
) -> dict[str, Any]:
  """Returns fresh variables, with what the pretraining run has learned."""
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  init = functools.partial(
    model.init, fbank=jnp.zeros((2, frames, bins)), keep_ids=None, train=False
  )
  variables = jax.jit(init)(jax.random.key(seed))
  abstract = jax.eval_shape(lambda: variables)["params"]
  learned = encoder_source.load(abstract, config, run, seed - config.seed)
  # From the one device they were read to, to go to all.
  learned = jax.device_get(learned)
  return variables | {"params": variables["params"] | learned}


def can_cache(
  config: ConfigDict, model, params, splits: supervised.Splits
) -> bool:
  """Whether the inputs of the head are the same in every epoch, and fit."""
  augmented = (
    config.augment_waveform.order
    or config.augment_fbank.order
    or config.augment_input.order
    or config.mixup.p
    or config.masking.mode != "none"
    or config.data.pipeline.crop != "start"
    or config.data.sampling.balanced
  )
  has_readout = isinstance(model, readout.ProbeableHead)
  if augmented or not config.model.freeze_encoder or not has_readout:
    return False
  needed = sum(
    predict.feature_bytes(model, params, source, config)
    for source in splits.named().values()
  )
  if needed > config.cache.limit_bytes:
    print(
      f"features of {needed:,} bytes exceed cache.limit_bytes="
      f"{config.cache.limit_bytes:,}; the encoder runs in every epoch",
      flush=True,
    )
  return needed <= config.cache.limit_bytes


def compute_features(
  model,
  variables,
  splits: supervised.Splits,
  config: ConfigDict,
  cache: pathlib.Path,
) -> Features:
  """Returns split -> features of its windows, from disk where they are."""
  compute = predict.make_window_fn(model, config, "features")
  encoder = {"encoder": variables["params"]["encoder"]}
  return {
    name: predict.cached_features(compute, encoder, source, config, cache)
    for name, source in splits.named().items()
  }


def without_encoder(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters of the head alone."""
  return {name: tree for name, tree in params.items() if name != "encoder"}


def make_batches(
  config: ConfigDict, source: Source, stored: Features | None, seed: int
) -> tuple[Any, int]:
  """Returns (training batches of this process, clips per epoch).

  Args:
    config: the experiment.
    source: training clips.
    stored: their features, whose windows are then the examples; or None.
    seed: of the order and the crops.
  """
  processes = {
    "batch_size": config.batch_size // jax.process_count(),
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }
  if stored is not None:
    windows = stored["train"]
    table = {"features": windows.rows, "label": source.labels[windows.clip]}
    return rows.RowBatches(table, seed=seed, **processes), len(windows.rows)
  drawn, num_clips = None, len(source)
  if config.data.sampling.balanced:
    drawn = sampling.clip_weights(source.label_sets, len(source.class_names))
    num_clips = config.data.sampling.epoch_clips or len(source)
    # All clips without replacement would be all alike, whatever they weigh.
    if num_clips < len(source):
      drawn = sampling.WithoutReplacement(drawn, num_clips)
  batches = pipeline.train_iterator(
    source, seed=seed, weights=drawn, **processes, **config.data.pipeline
  )
  return batches, num_clips


def neighbour_logits(
  config: ConfigDict,
  run: encoder_source.Run | None,
  splits: supervised.Splits,
  seed: int,
  cache: pathlib.Path,
) -> Features:
  """Returns test split -> votes of the most similar training windows.

  Nothing is trained: score_c = sum over the k nearest windows of class c of
  exp((cosine - 1) / temperature), with `config.knn` giving both.

  Raises:
    ValueError: something is augmented, or there are fewer windows than k.
  """
  model = build_model(config, len(splits.train.class_names))
  variables = start_variables(model, config, run, seed)
  if not can_cache(config, model, variables["params"], splits):
    raise ValueError(
      "knn.k is set, but neighbours need features that are computed once: "
      "freeze the encoder, and augment and mask nothing"
    )
  stored = compute_features(model, variables, splits, config, cache)
  train = stored["train"]
  labels = splits.train.labels[train.clip]
  if labels.ndim == 1:
    labels = np.eye(len(splits.train.class_names))[labels]
  votes = {}
  for name in splits.tests:
    scored = metrics.knn_votes(
      train.rows, labels, stored[name].rows, **config.knn
    )
    votes[name] = predict.Windows(np.asarray(scored), stored[name].clip)
  return votes
