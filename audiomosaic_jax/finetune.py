"""Supervised training of an encoder and a head: the loop around the step.

The step is in `classification.py`. A probe is the same loop with a frozen
encoder. If nothing is augmented then, the features of every clip are computed
once, kept on disk, and only the head is trained on them.

`run` repeats `train` over layers, folds and seeds; what is finished is never
done again.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib

import jax
import ml_collections
import numpy as np

from audiomosaic_jax import (
  baseline,
  checkpoint,
  class_weights,
  classifier_setup,
  comparison,
  encoder_source,
  experiment,
  losses,
  metric_writer,
  predict,
  preemption,
  results,
  scores,
  sharding,
  split_summary,
)
from audiomosaic_jax.data import supervised
from audiomosaic_jax.models import heads

ConfigDict = ml_collections.ConfigDict
SELECTIONS = ("last", "valid", "test")


def train(job: classifier_setup.Job) -> tuple[dict, int] | None:
  """Trains one classifier, continuing from its last checkpoint.

  Returns:
    The variables that `evaluation.selection` chooses, and the step they are
    of; or None when a SIGTERM stopped it (the state is then saved).

  Raises:
    RuntimeError: the loss or the gradient is NaN or infinite.
  """
  config = job.config
  saving = config.checkpoint
  folder = job.workdir / "checkpoints"
  open_folder = functools.partial(
    checkpoint.Checkpointer, keep_every=saving.keep_every
  )
  with (
    open_folder(folder, keep_last=saving.keep_last) as checkpoints,
    # The one before, too: the last checkpoint may be from before the best.
    open_folder(job.workdir / "best", keep_last=2) as best,
    contextlib.closing(job.batches),
    preemption.PreemptionWatcher() as watcher,
    metric_writer.MetricWriter(
      job.workdir,
      total_steps=job.total_steps,
      start_step=checkpoints.latest_step() or 0,
      progress_metrics=("loss", config.evaluation.metrics[0]),
    ) as writer,
  ):
    state, progress = job.init(), {"best": None, "best_step": 0, "stale": 0}
    step = checkpoints.latest_step() or 0
    if step:
      state, progress = checkpoints.restore(step, state)
    best.delete_after(step)
    job.batches.set_state({"next_index": step})
    key = jax.random.key(job.seed)
    split = sharding.batch_sharded(job.mesh)
    pending = None
    while step < job.total_steps and not out_of_patience(progress, config):
      batch = next(job.batches)
      inputs = {k: v for k, v in batch.items() if k != "id"}
      state, scalars = job.step(state, sharding.put_batch(inputs, split), key)
      step += 1
      # The device is busy with this step while the host looks at the last one.
      if pending:
        check_finite(*pending)
      pending = (step, scalars)
      last = step == job.total_steps
      stop = watcher.reached(step)
      if last or stop or step % config.log_every == 0:
        values = scalars | {"lr": job.schedule(step - 1)}
        writer.write_scalars(step, jax.device_get(values))
      if last or step % job.eval_every == 0:
        check_finite(step, scalars)
        progress = select(job, state, step, progress, best, writer)
      ends = last or stop or out_of_patience(progress, config)
      improved = step == progress["best_step"]
      if ends or improved or step % saving.save_every == 0:
        check_finite(step, scalars)
        checkpoints.save(step, state, progress)
      if stop and not last:
        checkpoints.wait()
        writer.log(f"stopped at step {step}; saved, run again to go on")
        return None
    checkpoints.wait()
    if config.evaluation.selection == "last":
      return state.variables, step
    state, _ = best.restore(progress["best_step"], state)
    return state.variables, progress["best_step"]


def out_of_patience(progress: dict, config: ConfigDict) -> bool:
  """Whether so many evaluations in a row brought nothing; 0 waits for ever."""
  patience = config.evaluation.patience
  return bool(patience) and progress["stale"] >= patience


def select(
  job: classifier_setup.Job, state, step: int, progress: dict, best, writer
) -> dict:
  """Measures the split that selects, and keeps the state if it is the best.

  Returns:
    The new progress: best value, its step, evaluations since.
  """
  settings = job.config.evaluation
  if settings.selection == "last":
    return progress
  name, metric = settings.selection, settings.metrics[0]
  if name == "test":
    # Parity: the published numbers are of the epoch that tests best.
    name = next(iter(job.splits.tests))
  clips = job.clips[name]
  windows = job.logits_of(state.variables, clips)
  evaluation, _ = predict.evaluation(windows, job.splits.named()[name])
  value = scores.METRICS[metric](evaluation, np.ones(len(evaluation.labels)))
  writer.write_scalars(step, {metric: value})
  sign = -1 if metric in scores.LOWER_IS_BETTER else 1
  if math.isnan(value):
    value = -sign * math.inf
  record = progress["best"]
  if record is not None and sign * value <= sign * record:
    return progress | {"stale": progress["stale"] + 1}
  best.save(step, state, {"value": value})
  best.wait()
  return {"best": value, "best_step": step, "stale": 0}


def check_finite(step: int, scalars: dict[str, jax.Array]) -> None:
  """Raises RuntimeError if the loss or the gradient is not finite."""
  for name, value in jax.device_get(scalars).items():
    if not math.isfinite(value):
      advice = "lower schedule.base_lr or set optimizer.grad_clip_norm"
      raise RuntimeError(f"{name} is {value} at step {step}; {advice}")


def run(config: ConfigDict, workdir: pathlib.Path) -> bool:
  """Trains every layer, fold and seed that has no result yet, and reports.

  Args:
    config: the experiment.
    workdir: folder of the runs, with a folder each if there are several.

  Returns:
    False if a SIGTERM stopped it before the end; run again to go on.
  """
  source = encoder_source.find_run(config.init.run)
  for line in encoder_source.complete(config, source):
    print(line, flush=True)
  check(config)
  places = [p for m in results.methods(config) for p in m.places(config)]
  # Before the config is written: it is that of the results that are there.
  finished = {p for p in places if results.is_finished(config, workdir, p)}
  for difference in experiment.save_config(config, workdir):
    print(f"continuing with another config: {difference}", flush=True)
  cache = pathlib.Path(config.cache.folder or workdir / "features").expanduser()

  @functools.lru_cache(1)
  def load(fold: int) -> supervised.Splits:
    splits = classifier_setup.load_splits(config, workdir, fold)
    if jax.process_index() == 0:
      split_summary.report(splits, config, workdir, fold)
    return splits

  # Fold by fold, because each reads its clips.
  for place in sorted(places, key=lambda place: place.fold):
    folder = results.folder(config, workdir, place)
    if place in finished:
      print(f"finished before: {folder}", flush=True)
    elif not run_one(config, source, load(place.fold), place, folder, cache):
      return False
  if jax.process_index() == 0:
    comparison.write_summary(config, workdir)
  return True


def run_one(
  config: ConfigDict,
  source: encoder_source.Run | None,
  splits: supervised.Splits,
  place: results.Place,
  folder: pathlib.Path,
  cache: pathlib.Path,
) -> bool:
  """Trains and tests one classifier; False if it was stopped half-way."""
  print(f"training in {folder}", flush=True)
  write = functools.partial(results.write_run, config, folder, place, splits)
  if place.encoder == "log_mel":
    asked = dataclasses.replace(splits, tests=splits.held_out())
    logits = baseline.log_mel_logits(asked, config.fbank)
    write(logits, step=0, saved="nothing")
    return True
  if place.encoder == "random":
    source = None
  own = results.config_of(config, place)
  own.loss.class_weights = class_weights.resolve(
    own.loss, splits.train.label_sets, len(splits.train.class_names)
  )
  if config.knn.k:
    logits = classifier_setup.neighbour_logits(
      own, source, splits, place.seed, cache
    )
    write(logits, step=0, saved="nothing")
    return True
  job = classifier_setup.build_job(
    own, source, splits, place.seed, folder, cache
  )
  chosen = train(job)
  if chosen is None:
    return False
  variables, step = chosen
  logits = {
    name: job.logits_of(variables, job.clips[name])
    for name in splits.held_out()
  }
  write(logits, step=step, saved=job.saved)
  return True


def check(config: ConfigDict) -> None:
  """Raises ValueError for settings that no data could make sense of."""
  known = {
    "loss.name": (config.loss.name, losses.SUPERVISED),
    "evaluation.selection": (config.evaluation.selection, SELECTIONS),
    "model.head": (config.model.head, heads.HEADS),
  }
  known |= {
    f"baselines[{i}]": (name, results.BASELINES)
    for i, name in enumerate(config.baselines)
  }
  known |= {
    f"evaluation.metrics[{i}]": (name, scores.METRICS)
    for i, name in enumerate(config.evaluation.metrics)
  }
  for field, (value, options) in known.items():
    if value not in options:
      raise ValueError(f"{field} is {value!r}; use one of {[*options]}")
  class_weights.check(config.loss)
  if config.evaluation.selection == "last" and config.evaluation.patience:
    raise ValueError(
      f"evaluation.patience is {config.evaluation.patience} but selection is "
      "'last'; nothing is measured that could run out of it: select 'valid' "
      "or set it to 0"
    )
