"""One step of the method: the same on any number of devices, in any pieces."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_pretrain import tiny_config

from audiomosaic_jax import (
  contrastive,
  experiment,
  losses,
  memory_queue,
  optimizer,
  per_device,
  sharding,
)
from benchmarks import hlo, train_step


def build(config, num_devices):
  """Returns the compiled step, the first state and the batch sharding."""
  mesh = contrastive.make_mesh(config, jax.devices()[:num_devices])
  model = experiment.build_model(config)
  shapes = jax.eval_shape(
    functools.partial(experiment.init_variables, model, config),
    jax.random.key(0),
  )
  tx = optimizer.make_optimizer(
    shapes["params"], schedule=lambda step: 1e-3, **config.optimizer
  )
  init, step = contrastive.jit_init_and_step(model, tx, config, mesh)
  return step, init(jax.random.key(0)), sharding.batch_sharded(mesh)


def take_steps(config, num_devices, count=1):
  """Returns the first state, and what each step on the same clips returns."""
  step, state, rows = build(config, num_devices)
  batch = {"waveform": jax.device_put(random_batch(config), rows)}
  start, taken = state, []
  for _ in range(count):
    # A copy, because the step donates its state.
    state, *rest = step(jax.tree.map(jnp.copy, state), batch, jax.random.key(1))
    taken.append((state, *rest))
  return start, taken


def gradients(state):
  """After one step the first moment of Adam is a tenth of the gradient."""
  return jax.tree.map(
    np.asarray, optax.tree_utils.tree_get(state.opt_state, "mu")
  )


def assert_same_gradients(actual, expected, rtol):
  actual, expected = map(gradients, (actual, expected))
  largest = max(np.abs(m).max() for m in jax.tree.leaves(expected))
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    atol = rtol * np.abs(b).max() + 1e-8 * largest
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def random_batch(config):
  rng = np.random.default_rng(0)
  shape = (config.batch_size, config.data.pipeline.clip_samples)
  return rng.integers(-8000, 8000, shape, dtype=np.int16)


@pytest.fixture(scope="module")
def steps():
  """(compiled text, state, metrics) after a step on one and eight devices."""
  config = tiny_config()
  results = {}
  for num_devices in (1, 8):
    step, state, rows = build(config, num_devices)
    batch = {"waveform": jax.device_put(random_batch(config), rows)}
    compiled = step.lower(state, batch, jax.random.key(1)).compile()
    state, metrics, _ = compiled(state, batch, jax.random.key(1))
    results[num_devices] = compiled.as_text(), state, metrics
  return results


def test_eight_devices_take_the_same_step_as_one(steps):
  (_, one, metrics_one), (_, eight, metrics_eight) = steps[1], steps[8]
  for name, value in metrics_one.items():
    np.testing.assert_allclose(metrics_eight[name], value, rtol=2e-5)
  for a, b in zip(
    jax.tree.leaves(one.batch_stats),
    jax.tree.leaves(eight.batch_stats),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_eight_devices_have_the_same_gradients_as_one(steps):
  assert_same_gradients(steps[8][1], steps[1][1], rtol=2e-5)


def test_stochastic_depth_is_drawn_by_example_and_not_by_device():
  config = tiny_config()
  model = experiment.build_model(config)
  params = jax.jit(functools.partial(experiment.init_variables, model, config))(
    jax.random.key(0)
  )["params"]
  frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
  clip = jax.random.normal(jax.random.key(1), (frames, bins))
  # The same clip sixteen times: what differs between rows is drawn.
  view = (
    jnp.broadcast_to(clip, (16, frames, bins)),
    jnp.broadcast_to(jnp.arange(4), (16, 4)),
    jax.random.split(jax.random.key(2), 16),
  )
  pooled = {}
  for num_devices in (1, 8):
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    encode = jax.jit(contrastive.encode_views(model, config, mesh))
    rows = jax.device_put(view, sharding.batch_sharded(mesh))
    (pooled[num_devices],) = encode(params, [rows])
  np.testing.assert_allclose(pooled[8], pooled[1], atol=1e-5)
  # Two branches stay or go: four outcomes, and not the same on every device.
  distance = np.abs(pooled[8][:, None] - pooled[8][None]).max(-1)
  same = distance < 1e-4
  assert len(np.unique(same, axis=0)) == 4
  assert not same[:2, ::2].all() and not same[:2, 1::2].all()


def test_gradients_are_summed_over_devices_once_and_together(steps):
  config = tiny_config()
  shapes = [leaf.shape for leaf in jax.tree.leaves(steps[8][1].params)]
  (gradients,) = hlo.roles(steps[8][0], config, shapes)["gradients"]
  assert (gradients.kind, gradients.times) == ("all-reduce", 1)
  # The gradient of a matrix may be computed transposed.
  summed = collections.Counter(tuple(sorted(d)) for _, d in gradients.shapes)
  assert not collections.Counter(tuple(sorted(s)) for s in shapes) - summed


def test_gradients_of_a_bfloat16_encoder_are_summed_in_float32():
  config = tiny_config()
  config.model.encoder.dtype = "bfloat16"
  setup = train_step.build(config, sharding.make_mesh())
  program = str(jax.make_jaxpr(setup.step)(*setup.shapes))
  summed = re.findall(r":(\w+)\[([\d,]*)\]\S* = psum_invariant\[", program)
  encoder = jax.tree.leaves(setup.shapes[0].params["encoder"])
  # Stacked over the blocks, thus outside of the loop over them.
  assert sorted(summed) == sorted(
    ("f32", ",".join(map(str, leaf.shape))) for leaf in encoder
  )


def test_nothing_but_embeddings_and_gradients_crosses_devices(steps):
  text = steps[8][0]
  assert not re.search(r"all-to-all|collective-permute", text)
  gathered = re.findall(r"= \(?(\w+\[[\d,]*\]).*? all-gather", text)
  config = tiny_config()
  embeddings = {f"f32[{config.batch_size},16]"}
  assert gathered and set(gathered) <= embeddings


def test_a_step_changes_every_parameter_but_the_frozen_one(steps):
  config = tiny_config()
  _, before, _ = build(config, 1)
  after = steps[1][1]
  unchanged = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(before.params),
      jax.tree.leaves(after.params),
      strict=True,
    )
    if np.array_equal(a, b)
  ]
  assert unchanged == ["projector/norm_1/bias"]


def test_a_few_clips_at_a_time_give_the_gradients_of_the_whole_batch(steps):
  _, ((state, metrics, _),) = take_steps(tiny_config(micro_batch_size=4), 2)
  _, whole, whole_metrics = steps[1]
  np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=2e-6)
  assert_same_gradients(state, whole, rtol=2e-5)
  for a, b in zip(
    *map(jax.tree.leaves, (state.batch_stats, whole.batch_stats)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_activations_are_kept_for_a_micro_batch_and_not_for_the_batch():
  def temporary(batch_size, micro_batch_size):
    config = tiny_config(
      batch_size=batch_size, micro_batch_size=micro_batch_size
    )
    config.model.encoder.update(remat="none", depth=4)
    model = experiment.build_model(config)
    init = functools.partial(experiment.init_variables, model, config)
    variables = jax.eval_shape(init, jax.random.key(0))
    mesh = sharding.make_mesh(jax.devices()[:1])
    encode = contrastive.encode_views(model, config, mesh)
    frames, bins = config.spectrogram.num_frames, config.fbank.num_mel_bins
    view = (
      jax.ShapeDtypeStruct((batch_size, frames, bins), np.float32),
      jax.ShapeDtypeStruct((batch_size, 32), np.int32),
      jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size)),
    )

    def loss(params, batch_stats, inputs):
      pooled = encode(params, inputs)
      z, _ = contrastive.project_views(model, params, batch_stats, pooled)
      return jnp.sum(z[0]) + jnp.sum(z[1])

    compiled = (
      jax.jit(jax.grad(loss))
      .lower(variables["params"], variables["batch_stats"], [view, view])
      .compile()
    )
    return train_step.memory_bytes(compiled)["temp"]

  small, whole, in_pieces = (
    temporary(16, 0),
    temporary(128, 0),
    temporary(128, 16),
  )
  assert in_pieces < 2 * small < whole / 2


def test_a_micro_batch_that_does_not_divide_names_one_that_does():
  with pytest.raises(ValueError, match=r"5 .* 16 clips of a device; use 4"):
    per_device.check_at_once(5, 16)


@pytest.mark.slow
def test_a_blockwise_step_is_the_dense_one(steps):
  config = tiny_config(**{"loss.dense_below": 0, "loss.block_size": 5})
  _, ((state, metrics, _),) = take_steps(config, 8)
  for name, value in steps[1][2].items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5)
  assert_same_gradients(state, steps[1][1], rtol=2e-5)


def test_an_unknown_loss_is_refused_by_name():
  config = tiny_config(**{"loss.name": "triplet"})
  with pytest.raises(ValueError, match=r"triplet.*nt_xent.*sigmoid"):
    contrastive.make_loss(None, config, sharding.make_mesh())


@pytest.mark.parametrize("temperature", [0.005, 2.0])
def test_a_temperature_that_would_be_clipped_is_refused(temperature):
  config = tiny_config(**{"model.temperature": temperature})
  with pytest.raises(ValueError, match=f"{temperature:g}.*use 0.01 to 1"):
    contrastive.make_loss(None, config, sharding.make_mesh())


@pytest.mark.slow
def test_the_sigmoid_loss_learns_its_temperature_and_bias():
  config = tiny_config("smoke,loss=sigmoid")
  before, ((state, metrics, _),) = take_steps(config, 1)
  for name in ("logit_scale", "logit_bias"):
    assert state.params[name] != before.params[name]
  # All pairs start as negatives: each anchor pays for its positive.
  assert 0.5 * -config.model.logit_bias < metrics["loss"]


def queue_config(momentum):
  return tiny_config(**{"loss.queue.size": 40, "loss.queue.momentum": momentum})


@pytest.mark.slow
def test_the_queue_holds_the_projections_of_the_last_steps_as_negatives():
  config = queue_config(0.0)
  start, ((state, metrics, views),) = take_steps(config, 1)
  rows = start.memory["rows"]
  expected = np.concatenate([*views["z"], rows[:8]])
  np.testing.assert_array_equal(state.memory["rows"], expected)
  # No momentum, no second encoder.
  assert set(state.memory) == {"rows"}

  def loss(negatives):
    return losses.nt_xent(
      *views["z"],
      logit_scale=1 / config.model.temperature,
      logit_bias=0.0,
      negatives=negatives,
    )[0]

  np.testing.assert_allclose(metrics["loss"], loss(rows), rtol=1e-5)
  assert metrics["loss"] > loss(None)
  np.testing.assert_array_equal(jax.grad(loss)(rows), 0)


@pytest.mark.slow
def test_the_slow_encoder_follows_the_trained_one_on_all_devices():
  config = queue_config(0.75)
  start, ((once, _, views), (twice, _, _)) = take_steps(config, 8, count=2)
  # The first step starts from equal encoders: the queue gets the same rows.
  rows = once.memory["rows"]
  assert rows.sharding.is_fully_replicated
  np.testing.assert_allclose(rows[:16], views["z"][0], atol=1e-5)
  np.testing.assert_array_equal(rows[32:], start.memory["rows"][:8])
  jax.tree.map(
    lambda slow, old, new: np.testing.assert_allclose(
      slow, 0.75 * old + 0.25 * new, atol=1e-6
    ),
    twice.memory["params"],
    start.params,
    once.params,
  )
  np.testing.assert_array_equal(twice.memory["rows"][32:], rows[:8])


def test_a_momentum_of_one_is_refused():
  with pytest.raises(ValueError, match=r"momentum is 1\.0"):
    memory_queue.create(jax.random.key(0), {}, width=4, size=8, momentum=1.0)


@pytest.mark.parametrize(
  ("tensor", "split"),
  [
    pytest.param(1, True, marks=pytest.mark.slow),
    pytest.param(2, False, marks=pytest.mark.slow),
    (2, True),
  ],
)
def test_a_split_state_takes_the_same_step_and_every_device_keeps_its_part(
  steps, tensor, split
):
  config = tiny_config(split_state=split, tensor_devices=tensor)
  _, ((state, metrics, _),) = take_steps(config, 8)
  for name, value in steps[1][2].items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5)
  assert_same_gradients(state, steps[1][1], rtol=2e-5)
  moments = optax.tree_utils.tree_get(state.opt_state, "nu")
  for tree in (state.params, moments):
    kernel = tree["encoder"]["blocks"]["mlp"]["fc2"]["kernel"]
    depth, hidden, width = kernel.shape
    (part, *_) = kernel.addressable_shards
    data = 8 // tensor if split else 1
    assert part.data.shape == (depth, hidden // tensor, width // data)


@pytest.mark.slow
def test_devices_that_share_an_encoder_compute_their_heads_and_channels():
  config = tiny_config(tensor_devices=2)
  setup = train_step.build(config, contrastive.make_mesh(config))
  program = setup.step.lower(*setup.shapes).compile().as_text()
  products = set(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program))
  sums = re.findall(r"= f32\[([\d,]+)\]\S* all-reduce\(", program)
  clips, width = config.batch_size // 4, config.model.encoder.width
  # 24 and 32 patches stay, and there is a class token; two of four heads.
  for tokens in (25, 33):
    assert f"{clips},2,{tokens},{tokens}" in products
    assert f"{clips},4,{tokens},{tokens}" not in products
    assert f"{clips * tokens},{2 * width}" in products
    assert f"{clips * tokens},{4 * width}" not in products
    # Two in a block going forward and, of the MLP, one going backward; those
    # of q, k and v go together.
    tokens_of_clips = f"{clips * tokens},{width}"
    assert sums.count(tokens_of_clips) == 3
    together = ", ".join([rf"f32\[{tokens_of_clips}\]\S*"] * 3)
    assert len(re.findall(rf"\({together}\) all-reduce\(", program)) == 1


def test_heads_that_devices_cannot_share_are_refused():
  config = tiny_config(tensor_devices=8)
  config.model.encoder.num_heads = 4
  with pytest.raises(ValueError, match="tensor_devices 8 cannot share the 4"):
    contrastive.make_mesh(config)


def test_a_split_state_is_gathered_and_its_gradients_are_scattered():
  config = tiny_config(split_state=True)
  setup = train_step.build(config, sharding.make_mesh())
  program = str(jax.make_jaxpr(setup.step)(*setup.shapes))
  kernels = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      setup.shapes[0].params["encoder"]
    )
    if "kernel" in jax.tree_util.keystr(path) and leaf.ndim == 3
  ]
  assert len(kernels) == 4
  assert program.count("reduce_scatter[") == len(kernels)


def test_an_axis_that_the_devices_do_not_divide_stays_whole():
  mesh = sharding.make_mesh()
  mlp = {
    "fc1": {"kernel": jnp.zeros((2, 16, 4)), "bias": jnp.zeros((2, 16))},
    "fc2": {"kernel": jnp.zeros((2, 4, 12))},
  }
  state = {"encoder": {"blocks": {"mlp": mlp}}}
  found = sharding.state_sharding(state, mesh, split=True)
  found = found["encoder"]["blocks"]["mlp"]
  whole = sharding.replicated(mesh)
  assert found["fc1"]["kernel"].shard_shape((2, 16, 4)) == (2, 2, 4)
  assert found["fc1"]["bias"].is_equivalent_to(whole, 2)
  assert found["fc2"]["kernel"].is_equivalent_to(whole, 3)
