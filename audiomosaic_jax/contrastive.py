"""The method: one step of contrastive pretraining.

`make_train_step` is the method section of the paper. Two copies of a waveform
are augmented apart, one loses time columns and the other frequency rows, both
pass the same encoder and projector, and NT-Xent compares them over the global
batch.

What the encoder does to a clip depends on no other clip, so it may run over a
few clips at a time (`config.micro_batch_size`); projector, BatchNorm and loss
always see the global batch, and so the gradients are the same.
"""

import functools
from collections.abc import Callable

import jax
import ml_collections
import optax

from audiomosaic_jax import (
  blockwise,
  experiment,
  losses,
  memory_queue,
  sharding,
  train_state,
  view,
)

ConfigDict = ml_collections.ConfigDict
Batch = dict[str, jax.Array]


def encode_views(model, mesh, *, at_once: int | None, split: bool) -> Callable:
  """Returns `(params, views) -> [pooled [B, D] of each view]`.

  A view is (fbank [B, T, F], keep_ids [B, K], keys [B] of stochastic depth).
  All views pass one function, so that the gradients of a device meet before
  those of the devices do.

  Args:
    model: the AudioMosaic module.
    mesh: the devices.
    at_once: clips that a device encodes at a time, or None for all.
    split: the parameters are split over the devices, see `sharding.py`.
  """

  def encode(params, fbank, keep_ids, key):
    inputs = {"params": params}, fbank[None], keep_ids[None]
    rngs = {"drop_path": key}
    return model.apply(*inputs, train=True, method="encode", rngs=rngs)[0]

  return sharding.map_examples_with(
    lambda params, views: [encode(params, *view) for view in views],
    mesh,
    at_once=at_once,
    split=split,
  )


def make_loss(config: ConfigDict, mesh) -> Callable:
  """Returns the loss of `config.loss`, as `losses.nt_xent`.

  Up to `dense_below` candidates the matrix of logits is held as a whole, above
  it is computed block by block.
  """
  loss = config.loss
  if loss.name not in losses.CONTRASTIVE:
    raise ValueError(
      f"loss.name is {loss.name!r}; use one of {tuple(losses.CONTRASTIVE)}"
    )
  if 2 * config.batch_size + loss.queue.size < loss.dense_below:
    return losses.CONTRASTIVE[loss.name]
  return functools.partial(
    blockwise.contrast, loss.name, block_size=loss.block_size, mesh=mesh
  )


def make_views(key, pcm, config: ConfigDict, mesh) -> list:
  """Returns (fbank, keep_ids, keys of stochastic depth) of both views."""
  *keys, key_drop = jax.random.split(key, 3)
  drop_keys = jax.random.split(key_drop, (2, len(pcm)))
  return [
    (*view.make(key, pcm, name, config, mesh), drop)
    for key, name, drop in zip(keys, experiment.VIEWS, drop_keys, strict=True)
  ]


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


def make_projection(model, config: ConfigDict, mesh) -> Callable:
  """Returns `(params, batch_stats, inputs) -> (views, batch_stats)`.

  `inputs` are of `make_views`; `views` holds the projections "z" and the
  "pooled" features of both.
  """
  encode = encode_views(
    model,
    mesh,
    at_once=config.micro_batch_size or None,
    split=config.split_state,
  )
  project = functools.partial(
    model.apply, train=True, mutable="batch_stats", method="project"
  )

  def project_views(params, batch_stats, inputs):
    pooled = encode(params, inputs)
    # The running statistics see one view after the other, as upstream.
    z_time, stats = project(
      {"params": params, "batch_stats": batch_stats}, pooled[0]
    )
    z_freq, stats = project({"params": params, **stats}, pooled[1])
    views = {"z": (z_time, z_freq), "pooled": tuple(pooled)}
    return views, stats["batch_stats"]

  return project_views


def remember(state, inputs, views, project_views, config: ConfigDict, mesh):
  """Returns the memory of a state with the projections of its step."""
  memory, momentum = dict(state.memory), config.loss.queue.momentum
  if not memory:
    return memory
  if momentum:
    slow = memory_queue.follow(memory["params"], state.params, momentum)
    views, _ = project_views(slow, state.batch_stats, inputs)
    memory["params"] = slow
  # Every device has the whole queue.
  z = jax.lax.with_sharding_constraint(views["z"], sharding.replicated(mesh))
  memory["rows"] = memory_queue.push(memory["rows"], z)
  return memory


def make_train_step(model, tx, config: ConfigDict, mesh) -> Callable:
  """Returns `(state, batch, key) -> (state, metrics, views)`, to be jitted.

  `metrics` holds scalars of the step. `views` holds the projections and
  pooled features of both views, for the diagnostics that are read only when
  a line is logged.
  """
  project_views = make_projection(model, config, mesh)
  contrast = make_loss(config, mesh)

  def train_step(state: train_state.TrainState, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)
    inputs = make_views(key, batch["waveform"], config, mesh)

    def loss_fn(params):
      views, batch_stats = project_views(params, state.batch_stats, inputs)
      log_scale, logit_bias = model.apply(
        {"params": params}, method=model.similarity
      )
      loss, aux = contrast(
        *views["z"],
        logit_scale=losses.inverse_temperature(log_scale),
        logit_bias=logit_bias,
        negatives=state.memory.get("rows"),
      )
      return loss, (aux, batch_stats, views)

    (loss, (aux, batch_stats, views)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    scalars = {"loss": loss, "grad_norm": optax.global_norm(grads), **aux}
    state = train_state.TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
      memory=remember(state, inputs, views, project_views, config, mesh),
    )
    return state, scalars, views

  return train_step


def jit_train_step(model, tx, config: ConfigDict, mesh) -> Callable:
  """Returns `make_train_step` compiled: batch by rows, state as placed.

  The state is donated. The key is the run's; the step folds itself in.
  """
  state = place_state(model, tx, config, mesh)
  everywhere = sharding.replicated(mesh)
  rows = sharding.batch_sharded(mesh)
  return jax.jit(
    make_train_step(model, tx, config, mesh),
    donate_argnums=0,
    in_shardings=(state, rows, everywhere),
    out_shardings=(state, everywhere, rows),
    compiler_options=sharding.compiler_options(mesh),
  )


def jit_init_state(model, tx, config: ConfigDict, mesh) -> Callable:
  """Returns key -> the state before the first step, where it belongs."""
  init = functools.partial(init_state, model=model, tx=tx, config=config)
  return jax.jit(init, out_shardings=place_state(model, tx, config, mesh))


def place_state(model, tx, config: ConfigDict, mesh):
  """Returns a sharding for each leaf of the state."""
  init = functools.partial(init_state, model=model, tx=tx, config=config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return sharding.state_sharding(shapes, mesh, split=config.split_state)
