"""The method: one step of contrastive pretraining.

From `make_views` to `make_update` this is the method section of the paper. Two
copies of a waveform are augmented apart, one loses time columns and the other
frequency rows, both pass the same encoder and projector, and NT-Xent compares
them over the global batch.

What the encoder does to a clip depends on no other clip, so it may run over a
few clips at a time (`config.micro_batch_size`); projector, BatchNorm and loss
always see the global batch, and so the gradients are the same.
"""

import functools
import math
from collections.abc import Callable

import jax
import ml_collections
import optax

from audiomosaic_jax import (
  blockwise,
  experiment,
  losses,
  memory_queue,
  per_device,
  sharding,
  train_state,
  view,
)

ConfigDict = ml_collections.ConfigDict
Batch = dict[str, jax.Array]


def make_mesh(config: ConfigDict, devices=None) -> jax.sharding.Mesh:
  """Returns the mesh of `config` over `devices` (default: all).

  Raises:
    ValueError: devices, batch and heads do not divide as the config asks.
  """
  tensor, heads = config.tensor_devices, config.model.encoder.num_heads
  mesh = sharding.make_mesh(devices, tensor=tensor)
  if heads % tensor:
    raise ValueError(
      f"tensor_devices {tensor} cannot share the {heads} heads of the encoder; "
      f"use {math.gcd(heads, tensor)}"
    )
  sharding.local_batch_size(config.batch_size, mesh)
  clips = config.batch_size // mesh.shape[sharding.DATA_AXIS]
  per_device.check_at_once(config.micro_batch_size, clips)
  return mesh


def make_views(key, pcm, config: ConfigDict, mesh) -> list:
  """Returns (fbank, keep_ids, keys of stochastic depth) of both views."""
  *keys, key_drop = jax.random.split(key, 3)
  drop_keys = jax.random.split(key_drop, (2, len(pcm)))
  return [
    (*view.make(key, pcm, name, config, mesh), drop)
    for key, name, drop in zip(keys, experiment.VIEWS, drop_keys, strict=True)
  ]


def encode_views(model, config: ConfigDict, mesh) -> Callable:
  """Returns `(params, views) -> [pooled [B, D] of each view]`.

  A view is (fbank [B, T, F], keep_ids [B, K], keys [B] of stochastic depth).
  All views pass one function, so that the gradients of a device meet before
  those of the devices do.
  """

  def encode(params, fbank, keep_ids, drop_keys):
    return model.apply(
      {"params": params},
      fbank,
      keep_ids,
      train=True,
      drop_keys=drop_keys,
      method="encode",
    )

  return per_device.map_rows_with(
    lambda params, views: [encode(params, *view) for view in views],
    mesh,
    at_once=config.micro_batch_size or None,
    split=config.split_state,
  )


def project_views(model, params, batch_stats, pooled):
  """Returns ((z_time, z_freq), batch_stats) of the pooled tokens of a batch."""
  project = functools.partial(
    model.apply, train=True, mutable="batch_stats", method="project"
  )
  # The running statistics see one view after the other, as upstream.
  z_time, stats = project(
    {"params": params, "batch_stats": batch_stats}, pooled[0]
  )
  z_freq, stats = project({"params": params, **stats}, pooled[1])
  return (z_time, z_freq), stats["batch_stats"]


def make_loss(model, config: ConfigDict, mesh) -> Callable:
  """Returns `(params, z, negatives) -> (loss, {"accuracy"})`.

  It is `config.loss`, with the temperature and the bias among the parameters.
  Up to `dense_below` candidates the matrix of logits is held as a whole, above
  it is computed block by block.

  Raises:
    ValueError: the loss is unknown, or the temperature out of its limits.
  """
  settings, temperature = config.loss, config.model.temperature
  low, high = losses.MIN_TEMPERATURE, losses.MAX_TEMPERATURE
  if not low <= temperature <= high:
    raise ValueError(
      f"model.temperature is {temperature:g}, and would be taken for the "
      f"nearest of its limits; use {low:g} to {high:g}"
    )
  if settings.name not in losses.CONTRASTIVE:
    raise ValueError(
      f"loss.name is {settings.name!r}; use one of {tuple(losses.CONTRASTIVE)}"
    )
  contrast = losses.CONTRASTIVE[settings.name]
  if 2 * config.batch_size + settings.queue.size >= settings.dense_below:
    contrast = functools.partial(
      blockwise.contrast,
      settings.name,
      block_size=settings.block_size,
      mesh=mesh,
    )

  def loss(params, z, negatives):
    log_scale, logit_bias = model.apply(
      {"params": params}, method=model.similarity
    )
    return contrast(
      *z,
      logit_scale=losses.inverse_temperature(log_scale),
      logit_bias=logit_bias,
      negatives=negatives,
    )

  return loss


def make_update(model, tx, config: ConfigDict, mesh) -> Callable:
  """Returns `(state, inputs) -> (state, metrics, views)`.

  `inputs` are of `make_views`; the rest as of `make_train_step`.
  """
  encode = encode_views(model, config, mesh)
  contrast = make_loss(model, config, mesh)

  def update(state: train_state.TrainState, inputs):
    def loss_fn(params):
      pooled = encode(params, inputs)
      stats = state.batch_stats
      with jax.named_scope("loss"):
        z, batch_stats = project_views(model, params, stats, pooled)
        loss, aux = contrast(params, z, state.memory.get("rows"))
      return loss, (aux, batch_stats, {"z": z, "pooled": tuple(pooled)})

    (loss, (aux, batch_stats, views)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(state.params)
    with jax.named_scope("optimiser"):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    scalars = {"loss": loss, "grad_norm": optax.global_norm(grads), **aux}
    new_state = train_state.TrainState(
      step=state.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      memory=remember(state, inputs, views["z"]),
    )
    return new_state, scalars, views

  def remember(state: train_state.TrainState, inputs, z):
    memory, momentum = dict(state.memory), config.loss.queue.momentum
    if not memory:
      return memory
    if momentum:
      slow = memory_queue.follow(memory["params"], state.params, momentum)
      pooled = encode(slow, inputs)
      z, _ = project_views(model, slow, state.batch_stats, pooled)
      memory["params"] = slow
    # Every device has the whole queue.
    z = jax.lax.with_sharding_constraint(z, sharding.replicated(mesh))
    memory["rows"] = memory_queue.push(memory["rows"], z)
    return memory

  return update


def make_train_step(model, tx, config: ConfigDict, mesh) -> Callable:
  """Returns `(state, batch, key) -> (state, metrics, views)`, to be jitted.

  `metrics` holds scalars of the step. `views` holds the projections and
  pooled features of both views, for the diagnostics that are read only when
  a line is logged.
  """
  update = make_update(model, tx, config, mesh)

  def train_step(state: train_state.TrainState, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)
    return update(state, make_views(key, batch["waveform"], config, mesh))

  return train_step


def init_state(
  key: jax.Array, model, tx: optax.GradientTransformation, config: ConfigDict
) -> train_state.TrainState:
  """Returns the state before the first step."""
  variables = experiment.init_variables(model, config, key)
  head = config.model.projector
  memory = memory_queue.create(
    jax.random.fold_in(key, 1),
    variables["params"],
    width=head.out_features if head else config.model.encoder.width,
    **config.loss.queue,
  )
  return train_state.create(variables, tx, memory)


def jit_init_and_step(
  model, tx, config: ConfigDict, mesh
) -> tuple[Callable, Callable]:
  """Returns `init_state` of a key and `make_train_step`, compiled.

  The batch is split by rows, the state lies as `sharding.state_sharding` says.
  The step donates its state. Its key is the run's; the step folds itself in.
  """
  init = functools.partial(init_state, model=model, tx=tx, config=config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  state = sharding.state_sharding(shapes, mesh, split=config.split_state)
  everywhere = sharding.replicated(mesh)
  rows = sharding.batch_sharded(mesh)
  step = jax.jit(
    make_train_step(model, tx, config, mesh),
    donate_argnums=0,
    in_shardings=(state, rows, everywhere),
    out_shardings=(state, everywhere, rows),
    compiler_options=sharding.compiler_options(mesh),
  )
  return jax.jit(init, out_shardings=state), step
