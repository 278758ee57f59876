"""Contrastive pretraining: the loop around the step of `contrastive.py`.

`train` is data -> step -> log -> checkpoint -> probe, from the last checkpoint
to the last step.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from audiomosaic_jax import (
  checkpoint,
  contrastive,
  encoder_probe,
  experiment,
  metric_writer,
  metrics,
  optimizer,
  preemption,
  sharding,
  summary,
  throughput,
  train_state,
)
from audiomosaic_jax.data import datasets, pipeline

ConfigDict = ml_collections.ConfigDict


class NonFiniteLossError(RuntimeError):
  """The loss kept becoming NaN or infinite after every allowed rollback."""


@dataclasses.dataclass(frozen=True)
class Job:
  """What `train` sets up once and every restart of the loop shares."""

  config: ConfigDict
  seed: int
  workdir: pathlib.Path
  mesh: Any
  source: Any
  total_steps: int
  init: Callable[[], train_state.TrainState]
  step: Callable
  schedule: Callable
  clock: throughput.StepClock
  probe: Callable | None


def build_job(
  config: ConfigDict,
  seed: int,
  workdir: pathlib.Path,
  task: encoder_probe.Task | None,
) -> Job:
  """Sets up mesh, data, model, optimiser and the compiled step.

  Raises:
    ValueError: two settings do not fit each other; nothing is compiled yet.
  """
  mesh = contrastive.make_mesh(config)
  source = datasets.guard(
    datasets.make_dataset(
      **config.data.source, sample_rate_hz=config.fbank.sample_rate_hz
    ),
    **config.data.guard,
    report_path=workdir / "bad_clips.jsonl",
  )
  total_steps, warmup_steps = experiment.count_steps(config, len(source))
  schedule = optimizer.make_schedule(
    **config.schedule, warmup_steps=warmup_steps, total_steps=total_steps
  )
  model = experiment.build_model(config)
  init_model = functools.partial(experiment.init_variables, model, config)
  params = jax.eval_shape(init_model, jax.random.key(0))["params"]
  tx = optimizer.make_optimizer(params, schedule=schedule, **config.optimizer)

  init, step = contrastive.jit_init_and_step(model, tx, config, mesh)
  checkpoint.check_fits(workdir, jax.eval_shape(init, jax.random.key(seed)))
  clock = throughput.StepClock(
    pairs_per_step=config.batch_size,
    flops_per_pair=experiment.flops_per_pair(config),
    peak_flops=mesh.devices.size
    * throughput.peak_flops(
      mesh.devices.flat[0], config.runtime.peak_flops_per_device
    ),
    computes_on_host=mesh.devices.flat[0].platform == "cpu",
  )
  probe = None
  if task:
    online = encoder_probe.make_online_probe(model, config, task)
    # Of a split state a process has but its devices' part.
    whole = jax.jit(
      lambda variables: variables, out_shardings=sharding.replicated(mesh)
    )

    def probe(variables):
      return online(whole(variables))

  return Job(
    config=config,
    seed=seed,
    workdir=workdir,
    mesh=mesh,
    source=source,
    total_steps=total_steps,
    init=lambda: init(jax.random.key(seed)),
    step=step,
    schedule=schedule,
    clock=clock,
    probe=probe,
  )


def train(
  config: ConfigDict,
  seed: int,
  workdir: pathlib.Path,
  task: encoder_probe.Task | None,
  begin: Callable[[], None] = lambda: None,
) -> bool:
  """Trains one encoder, continuing from the last checkpoint in `workdir`.

  Args:
    config: the experiment.
    seed: of initialisation, data order, augmentation and masks.
    workdir: receives checkpoints/, metrics.jsonl, tensorboard/.
    task: labelled clips to probe the encoder with, or None.
    begin: called when nothing is known to keep it from training.

  Returns:
    True when all steps are done, False when a SIGTERM stopped it (the state
    is then saved).

  Raises:
    NonFiniteLossError: after `config.max_rollbacks` rollbacks.
  """
  job = build_job(config, seed, workdir, task)
  begin()
  with (
    checkpoint.Checkpointer(
      workdir / "checkpoints",
      keep_last=config.checkpoint.keep_last,
      keep_every=config.checkpoint.keep_every,
    ) as checkpoints,
    preemption.PreemptionWatcher() as watcher,
    metric_writer.MetricWriter(
      workdir,
      total_steps=job.total_steps,
      start_step=checkpoints.latest_step() or 0,
      progress_metrics=("loss", "accuracy", "knn", "pairs_per_s"),
    ) as writer,
  ):
    for rollbacks in range(config.max_rollbacks + 1):
      try:
        return run_steps(job, checkpoints, watcher, writer, rollbacks)
      except FloatingPointError as error:
        back = checkpoints.latest_step() or 0
        writer.log(f"{error}; going back to step {back} with other clips")
        writer.rewind(back)
  raise NonFiniteLossError(
    f"the loss became non-finite {config.max_rollbacks + 1} times, the last "
    f"after step {back}; lower schedule.base_lr, set "
    "optimizer.grad_clip_norm, or raise max_rollbacks"
  )


def run_steps(job, checkpoints, watcher, writer, rollbacks: int) -> bool:
  """Runs from the last checkpoint to the end, a SIGTERM or a bad loss.

  Everything random is a function of (seed, rollbacks, step), so a run that
  is killed and restarted computes what an uninterrupted one would have.

  Raises:
    FloatingPointError: the loss or the gradient is NaN or infinite.
  """
  config = job.config
  step = checkpoints.latest_step() or 0
  state = job.init()
  if step:
    state, meta = checkpoints.restore(step, state)
    # This process counts from 0 again; what went bad before must not recur.
    rollbacks += meta["rollbacks"]
    _log_resumed(job, writer, step, meta)
  elif not rollbacks:
    writer.log_parameter_overview(state.params)
    _log_beginning(job, writer)
  key = jax.random.fold_in(jax.random.key(job.seed), rollbacks)
  split = sharding.batch_sharded(job.mesh)
  pending = None
  with contextlib.closing(make_batches(job, rollbacks, step)) as batches:
    job.clock.restart()
    while step < job.total_steps:
      batch = job.clock.wait_for(batches)
      batch = sharding.put_batch({"waveform": batch["waveform"]}, split)
      state, scalars, views = job.step(state, batch, key)
      step += 1
      # The device is busy with this step while the host looks at the last one.
      if pending:
        check_finite(*pending)
      pending = (step, scalars)
      last = step == job.total_steps
      stop = watcher.reached(step)
      if last or stop or step % config.log_every == 0:
        log_step(job, writer, step, scalars, views)
      if last or stop or step % config.checkpoint.save_every == 0:
        # A checkpoint that was never seen to be finite is no way back.
        check_finite(step, scalars)
        meta = {"rollbacks": rollbacks, "clips": len(job.source)}
        checkpoints.save(step, state, meta)
      if job.probe and (last or step % config.probe.eval_every == 0):
        writer.write_scalars(step, job.probe(state.variables))
        job.clock.restart()
      if stop and not last:
        checkpoints.wait()
        writer.log(f"stopped at step {step}; saved, run again to go on")
        return False
  checkpoints.wait()
  if job.source.num_bad:
    where = job.source.report_path
    writer.log(f"{job.source.num_bad} clips could not be used, see {where}")
  return True


def _log_beginning(job: Job, writer) -> None:
  """Says how much there is to do, and of what."""
  clips, batch_size = len(job.source), job.config.batch_size
  writer.log(f"{clips:,} clips, {job.total_steps:,} steps of {batch_size:,}")
  if batch_size > clips:
    writer.log(
      f"warning: a batch has {batch_size:,} clips and there are {clips:,}, so "
      "clips are their own negatives; lower batch_size"
    )


def _log_resumed(job: Job, writer, step: int, meta: dict[str, Any]) -> None:
  """Says where it goes on, and if there are other clips."""
  writer.log(f"going on from step {step:,} of {job.total_steps:,}")
  clips = meta.get("clips", len(job.source))
  if clips != len(job.source):
    writer.log(
      f"there were {clips:,} clips and are {len(job.source):,}: from here on "
      "they come in another order"
    )


def make_batches(job: Job, rollbacks: int, step: int):
  """Returns the iterator over this process's batches from a step on."""
  batches = pipeline.train_iterator(
    job.source,
    seed=job.seed + 1_000_003 * rollbacks,
    batch_size=job.config.batch_size // jax.process_count(),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    weights=None,
    **job.config.data.pipeline,
  )
  pipeline.set_step(batches, step)
  return batches


def check_finite(step: int, scalars: dict[str, jax.Array]) -> None:
  """Raises FloatingPointError if the loss or the gradient is not finite."""
  values = jax.device_get(scalars)
  for name in ("loss", "grad_norm"):
    if not math.isfinite(values[name]):
      raise FloatingPointError(f"{name} is {values[name]} at step {step}")


def log_step(job: Job, writer, step: int, scalars, views) -> None:
  """Writes the metrics of a step: what it learned and how fast."""
  values = scalars | metrics.diagnose(views) | {"lr": job.schedule(step - 1)}
  writer.write_scalars(step, jax.device_get(values) | job.clock.read())


def run(config: ConfigDict, workdir: pathlib.Path) -> bool:
  """Pretrains every seed of the config, then compares and reports.

  Args:
    config: the experiment.
    workdir: folder of the run, with a folder per seed if there are several.

  Returns:
    False if a SIGTERM stopped it before the end; run again to go on.
  """
  task = None
  if config.probe.task:
    task = encoder_probe.load_task(config.probe.task, config)
  experiment.check_mode(config, workdir)

  def begin():
    # Not before: what is there stays described as it is if this cannot go on.
    for difference in experiment.save_config(config, workdir):
      print(f"resuming with another config: {difference}", flush=True)

  folders = experiment.seed_folders(config, workdir)
  for number, (seed, folder) in enumerate(folders.items(), 1):
    which = f" ({number} of {len(folders)})" if len(folders) > 1 else ""
    print(f"pretraining with seed {seed}{which} in {folder}", flush=True)
    if not train(config, seed, folder, task, begin):
      return False
  results = encoder_probe.compare(config, workdir, task) if task else None
  if config.report:
    summary.write_pretraining_report(config, workdir, task, results)
  return True
