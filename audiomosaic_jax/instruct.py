"""Instruction tuning: an encoder, a projector and adapters learn to answer.

`make_train_step` is the method: spectrogram, audio tokens before the text, the
loss of the next token, gradients of what the stage trains, summed over
micro-batches. `run` goes through the stages, each from the last state of the
one before, and ends with the table of `language.evaluation`.

The base never changes and is never saved.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from audiomosaic_jax import (
  checkpoint,
  encoder_source,
  experiment,
  losses,
  metric_writer,
  optimizer,
  preemption,
  sharding,
  train_state,
)
from audiomosaic_jax.data import datasets, pipeline, questions, text
from audiomosaic_jax.language import (
  base,
  build,
  demo,
  evaluation,
  partition,
  stages,
)
from audiomosaic_jax.models.audio_lm import AudioLM

ConfigDict = ml_collections.ConfigDict
Batch = dict[str, jax.Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
  """One stage."""

  config: ConfigDict
  workdir: pathlib.Path
  mesh: Any
  base: base.Base
  fingerprint: str
  batches: Any
  total_steps: int
  init: Callable[[], train_state.TrainState]
  step: Callable
  schedule: Callable


def make_train_step(
  model: AudioLM, tx, trainable: tuple[str, ...], config: ConfigDict, mesh
) -> Callable:
  """Returns `(state, base, batch, key) -> (state, metrics)`, to be jitted.

  The loss is the mean over all counted tokens of the batch, however it is cut
  into micro-batches.

  Differs from upstream: there it is the mean over micro-batches of their
  means, in which a token counts more if its micro-batch has few.

  Args:
    model: the audio-language model.
    tx: optimiser over what learns.
    trainable: patterns of that, see `partition.split`.
    config: the experiment; a batch has "waveform" int16 [B, S], "ids",
      "labels" [B, N], "valid" [B, N] and "has_audio" [B].
    mesh: the devices.
  """
  spectrogram = build.make_spectrogram(config, mesh)

  def train_step(state: train_state.TrainState, frozen, batch: Batch, key):
    key = jax.random.fold_in(key, state.step)
    learns, rest = partition.split(state.params, trainable)
    count = jnp.sum(batch["labels"][:, 1:] != losses.IGNORED).clip(1)

    def loss_fn(learns: Params, batch: Batch, key: jax.Array):
      own = partition.join(learns, rest)
      params = {**own, "llama": partition.join(own["llama"], frozen)}
      key_dropout, key_path, key_shuffle = jax.random.split(key, 3)
      logits = model.apply(
        {"params": params},
        spectrogram(batch["waveform"]),
        batch["ids"],
        batch["valid"],
        batch["has_audio"],
        train=True,
        rngs={
          "dropout": key_dropout,
          "drop_path": key_path,
          "shuffle": key_shuffle,
        },
      )
      return losses.next_token(logits, batch["labels"])[0] / count

    def add(sums, inputs):
      return jax.tree.map(
        jnp.add, sums, jax.value_and_grad(loss_fn)(learns, *inputs)
      ), None

    micro = micro_batches(batch, rows_at_once(config, mesh))
    keys = jax.random.split(key, len(micro["ids"]))
    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, learns)
    (loss, grads), _ = jax.lax.scan(add, start, (micro, keys))
    updates, opt_state = tx.update(grads, state.opt_state, learns)
    learned = optax.apply_updates(learns, updates)
    state = state.replace(
      step=state.step + 1,
      params=partition.join(learned, rest),
      opt_state=opt_state,
    )
    return state, {"loss": loss, "grad_norm": optax.global_norm(grads)}

  return train_step


def rows_at_once(config: ConfigDict, mesh) -> int:
  """Returns the rows of a micro-batch, over all devices."""
  at_once = config.micro_batch_size * mesh.devices.size
  return min(config.batch_size, at_once or config.batch_size)


def micro_batches(batch: Batch, size: int) -> Batch:
  """Returns [B, ...] as [B / size, size, ...].

  Every micro-batch has rows from all over the batch, so that a batch that is
  split over devices by rows stays where it is.
  """

  def cut(x):
    return jnp.moveaxis(x.reshape(size, -1, *x.shape[1:]), 0, 1)

  return jax.tree.map(cut, batch)


def build_job(
  config: ConfigDict,
  name: str,
  held: base.Base,
  own: Params,
  workdir: pathlib.Path,
  mesh,
) -> Job:
  """Sets up one stage: its questions, its optimiser, its step.

  Args:
    config: completed.
    name: of the stage.
    held: the base.
    own: parameters that the stage starts from, on the host.
    workdir: folder of the stage.
    mesh: the devices.
  """
  stage = config.stages[name]
  source = load_questions(config, name, held, workdir)
  total_steps = max(1, round(stage.epochs * len(source) / config.batch_size))
  schedule = optimizer.make_schedule(
    **config.schedule,
    base_lr=stage.base_lr,
    warmup_steps=min(config.warmup_steps, total_steps - 1),
    total_steps=total_steps,
  )
  learns, _ = partition.split(own, stage.trainable)
  tx = optimizer.make_optimizer(learns, schedule=schedule, **config.optimizer)
  model = build.build_model(config, held.llama)
  everywhere = sharding.replicated(mesh)

  @functools.partial(jax.jit, out_shardings=everywhere)
  def init(own):
    learns, _ = partition.split(own, stage.trainable)
    state = train_state.create({"params": learns}, tx, {})
    # A copy, because the step donates its state.
    return state.replace(params=jax.tree.map(jnp.copy, own))

  step = make_train_step(model, tx, stage.trainable, config, mesh)
  return Job(
    config=config,
    workdir=workdir,
    mesh=mesh,
    base=held,
    fingerprint=base.fingerprint_of(held.params),
    batches=pipeline.train_iterator(
      source,
      seed=config.seed,
      batch_size=config.batch_size // jax.process_count(),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      weights=None,
      **config.data.pipeline,
    ),
    total_steps=total_steps,
    init=lambda: init(own),
    step=jax.jit(step, donate_argnums=0, out_shardings=everywhere),
    schedule=schedule,
  )


def load_questions(
  config: ConfigDict, name: str, held: base.Base, workdir: pathlib.Path
):
  """Returns the questions of a stage, tolerant of a few bad clips."""
  source = questions.QuestionSource(
    text.read_records(
      base.within(workdir.parent, config.data.folder, file)
      for file in config.stages[name].files
    ),
    audio_root=config.data.audio_root,
    tokenizer=held.tokenizer,
    cutoff=config.text.cutoff,
    response_only=config.text.response_only,
    sample_rate_hz=config.fbank.sample_rate_hz,
  )
  return datasets.guard(
    source, **config.data.guard, report_path=workdir / "bad_clips.jsonl"
  )


def train(job: Job) -> bool:
  """Trains one stage, continuing from its last checkpoint.

  Returns:
    False when a SIGTERM stopped it; the state is then saved.

  Raises:
    RuntimeError: the loss or the gradient is NaN or infinite.
    ValueError: the checkpoint belongs to another base.
  """
  config, saving = job.config, job.config.checkpoint
  with (
    checkpoint.Checkpointer(
      job.workdir / "checkpoints",
      keep_last=saving.keep_last,
      keep_every=saving.keep_every,
    ) as checkpoints,
    contextlib.closing(job.batches),
    preemption.PreemptionWatcher() as watcher,
    metric_writer.MetricWriter(
      job.workdir,
      total_steps=job.total_steps,
      start_step=checkpoints.latest_step() or 0,
      progress_metrics=("loss",),
    ) as writer,
  ):
    state, step = job.init(), checkpoints.latest_step() or 0
    if step:
      state, meta = checkpoints.restore(step, state)
      base.check(meta["base"], job.fingerprint, job.workdir)
    pipeline.set_step(job.batches, step)
    key, pending = jax.random.key(config.seed), None
    split = sharding.batch_sharded(job.mesh)
    while step < job.total_steps:
      batch = questions.to_arrays(next(job.batches), config.text.buckets)
      state, scalars = job.step(
        state, job.base.params, sharding.put_batch(batch, split), key
      )
      step += 1
      # The device is busy with this step while the host looks at the last one.
      if pending:
        check_finite(*pending)
      pending = (step, scalars)
      last, stop = step == job.total_steps, watcher.reached(step)
      if last or stop or step % config.log_every == 0:
        values = scalars | {"lr": job.schedule(step - 1)}
        writer.write_scalars(step, jax.device_get(values))
      if last or stop or step % saving.save_every == 0:
        check_finite(step, scalars)
        checkpoints.save(step, state, {"base": job.fingerprint})
      if stop and not last:
        checkpoints.wait()
        writer.log(f"stopped at step {step}; run again to go on")
        return False
    checkpoints.wait()
  return True


def check_finite(step: int, scalars: dict[str, jax.Array]) -> None:
  """Raises RuntimeError if the loss or the gradient is not finite."""
  for name, value in jax.device_get(scalars).items():
    if not math.isfinite(value):
      raise RuntimeError(
        f"{name} is {value} at step {step}; lower base_lr of the stage"
      )


def run(config: ConfigDict, workdir: pathlib.Path) -> bool:
  """Trains the stages that are not finished, then evaluates the last.

  Args:
    config: the experiment.
    workdir: receives a folder per stage, results.json and results.md.

  Returns:
    False if a SIGTERM stopped it before the end; run again to go on.
  """
  source = encoder_source.find_run(config.init.run)
  for line in encoder_source.complete(config, source):
    print(line, flush=True)
  check(config)
  demo.write(config, workdir)
  evaluation.check(config, workdir)
  for difference in experiment.save_config(config, workdir):
    print(f"continuing with another config: {difference}", flush=True)
  mesh = sharding.make_mesh()
  held = base.open_base(
    **base.place(config, workdir), mesh=mesh, **config.model.llama
  )
  for name in config.stages.order:
    if stages.read_record(workdir / name):
      print(f"finished before: {workdir / name}", flush=True)
    elif not run_stage(config, name, held, source, workdir, mesh):
      return False
  evaluation.run(config, held, workdir, mesh)
  return True


def run_stage(
  config: ConfigDict,
  name: str,
  held: base.Base,
  source: encoder_source.Run | None,
  workdir: pathlib.Path,
  mesh,
) -> bool:
  """Trains a stage from the one before; False if it was stopped half-way."""
  own = start(config, name, held, source, workdir)
  job = build_job(config, name, held, own, workdir / name, mesh)
  learns, _ = partition.split(own, config.stages[name].trainable)
  print(
    f"{name}: {job.total_steps} steps in {job.workdir}; learns "
    f"{partition.count(learns):,} of {partition.count(own):,} parameters, the "
    f"{partition.count(held.params):,} of the base stay",
    flush=True,
  )
  if not train(job):
    return False
  record = {"steps": job.total_steps, "base": job.fingerprint}
  stages.write_record(job.workdir, record)
  return True


def start(
  config: ConfigDict,
  name: str,
  held: base.Base,
  source: encoder_source.Run | None,
  workdir: pathlib.Path,
) -> Params:
  """Returns the parameters that a stage starts from, on the host.

  Raises:
    FileNotFoundError: the stage before is not finished.
  """
  model = build.build_model(config, held.llama)
  before = stages.before(config, name)
  only = len(config.stages.order) == 1
  if before is None or (only and config.init.weights):
    key = jax.random.key(config.seed)
    return jax.device_get(build.init_own(model, config, source, key))
  if not stages.read_record(workdir / before):
    raise FileNotFoundError(
      f"{workdir / before} is not finished, which {name} starts from; run "
      f"{before} first, or give init.weights to start from"
    )
  return jax.device_get(build.load_own(model, config, workdir / before))


def check(config: ConfigDict) -> None:
  """Raises ValueError for settings that do not fit each other."""
  mesh = sharding.make_mesh()
  sharding.local_batch_size(config.batch_size, mesh)
  if config.batch_size % rows_at_once(config, mesh):
    raise ValueError(
      f"micro_batch_size {config.micro_batch_size} x {mesh.devices.size} "
      f"devices does not divide batch_size {config.batch_size}; use divisors"
    )
  if config.text.cutoff > config.text.buckets[-1]:
    raise ValueError(
      f"text.cutoff {config.text.cutoff} is above the last of text.buckets "
      f"{config.text.buckets}; make that one longer"
    )
