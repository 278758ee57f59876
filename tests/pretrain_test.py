"""The training step and its loop: one definition for any number of devices."""

import collections
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiomosaic_jax import checkpoint, experiment, pretrain, sharding
from audiomosaic_jax.data import pipeline
from benchmarks import hlo, train_step
from configs import pretrain as configs

STEPS = 6


def tiny_config(**overrides):
  """A job of a second: two narrow blocks, cheap augmentation, six steps."""
  config = configs.get_config("smoke")
  # The first block drops nothing; the second half of its branches.
  config.model.encoder.update(width=32, depth=2, drop_path=0.5)
  config.model.projector.update(hidden_features=32, out_features=16)
  config.augment_waveform.order = (
    "roll_and_scale",
    "gaussian_snr",
    "high_pass",
  )
  config.duration.total = float(STEPS)
  config.probe.task = ""
  config.runtime.peak_flops_per_device = 1e12
  for name, value in overrides.items():
    config.update_from_flattened_dict({name: value})
  return config


def build(config, num_devices):
  """Returns the compiled step, the first state and the batch sharding."""
  from audiomosaic_jax import optimizer, train_state

  mesh = sharding.make_mesh(jax.devices()[:num_devices])
  model = experiment.build_model(config)
  variables = jax.jit(
    functools.partial(experiment.init_variables, model, config)
  )(jax.random.key(0))
  tx = optimizer.make_optimizer(
    variables["params"], schedule=lambda step: 1e-3, **config.optimizer
  )
  everywhere, rows = sharding.replicated(mesh), sharding.batch_sharded(mesh)
  state = jax.device_put(train_state.create(variables, tx), everywhere)
  return pretrain.jit_train_step(model, tx, config, mesh), state, rows


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
  # After one step the first moment of Adam is a tenth of the gradient.
  (_, one, _), (_, eight, _) = steps[1], steps[8]
  moments = [
    jax.tree.map(np.asarray, optax.tree_utils.tree_get(s.opt_state, "mu"))
    for s in (one, eight)
  ]
  largest = max(np.abs(m).max() for m in jax.tree.leaves(moments[0]))
  for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
    atol = 2e-5 * np.abs(a).max() + 1e-8 * largest
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


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
    encode = jax.jit(pretrain.encode_views(model, mesh))
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
  (gradients,) = [
    found
    for found in hlo.collectives(steps[8][0])
    if hlo.role(found, config, shapes) == "gradients"
  ]
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


@pytest.mark.parametrize(
  "preset, tokens",
  [
    # 25 of 64 columns of 8 patches; 4 of 8 rows of 64 patches; a class token.
    ("paper", {"view_time": 25 * 8 + 1, "view_freq": 4 * 64 + 1}),
    # 3 of 8 blocks of 64 patches; 38 of 64 cells in each of 8 blocks.
    ("released", {"view_time": 3 * 64 + 1, "view_freq": 38 * 8 + 1}),
  ],
)
def test_the_two_layouts_encode_the_published_numbers_of_tokens(preset, tokens):
  assert experiment.tokens_per_view(configs.get_config(preset)) == tokens


def test_a_pair_of_the_paper_costs_what_its_tokens_cost():
  flops = experiment.flops_per_pair(configs.get_config())
  tokens = np.array([201, 257])
  linear = 6 * tokens.sum() * (12 * 12 * 768**2 + 256 * 768)
  attention = 12 * 12 * (tokens**2).sum() * 768
  assert flops == pytest.approx(linear + attention)


def test_epochs_and_steps_count_the_same_updates():
  config = configs.get_config()
  assert experiment.count_steps(config, 6144 * 10) == (4000, 10)
  config.duration.unit = "steps"
  assert experiment.count_steps(config, 5) == (400, 1)
  config.duration.unit = "hours"
  with pytest.raises(ValueError, match="hours"):
    experiment.count_steps(config, 5)


def test_a_batch_that_does_not_divide_names_the_next_ones():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match=r"100 .* 8 devices; use 96 or 104"):
    sharding.local_batch_size(100, mesh)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
  """Keeps the loop's programs between tests, which all run the same job."""
  cache = tmp_path_factory.mktemp("compiled")
  jax.config.update("jax_compilation_cache_dir", str(cache))
  yield
  jax.config.update("jax_compilation_cache_dir", None)


def read_steps(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


def fail_at(monkeypatch, bad_step, times):
  """Makes the loss look non-finite at a step, the first `times` times."""
  check, failures = pretrain.check_finite, []

  def check_and_fail(step, scalars):
    if step == bad_step and len(failures) < times:
      failures.append(step)
      raise FloatingPointError(f"loss is nan at step {step}")
    check(step, scalars)

  monkeypatch.setattr(pretrain, "check_finite", check_and_fail)


def test_a_non_finite_loss_goes_back_and_on_with_other_clips(
  monkeypatch, tmp_path, compiled_once
):
  fail_at(monkeypatch, bad_step=4, times=1)
  config = tiny_config()
  config.checkpoint.save_every = 2
  assert pretrain.train(config, 0, tmp_path, None)
  assert read_steps(tmp_path) == list(range(1, STEPS + 1))
  assert checkpoint.load_meta(tmp_path)["rollbacks"] == 1


def test_a_loss_that_stays_non_finite_stops_with_advice(
  monkeypatch, tmp_path, compiled_once
):
  fail_at(monkeypatch, bad_step=3, times=math.inf)
  config = tiny_config(max_rollbacks=1)
  with pytest.raises(pretrain.NonFiniteLossError, match=r"2 times.*base_lr"):
    pretrain.train(config, 0, tmp_path, None)


def test_every_iterator_is_closed_after_a_rollback_too(
  monkeypatch, tmp_path, compiled_once
):
  opened, closed = [], []
  make, close = pipeline.train_iterator, pipeline.TrainIterator.close

  def open_one(*args, **kwargs):
    opened.append(make(*args, **kwargs))
    return opened[-1]

  def close_one(batches):
    closed.append(batches)
    close(batches)

  monkeypatch.setattr(pipeline, "train_iterator", open_one)
  monkeypatch.setattr(pipeline.TrainIterator, "close", close_one)
  fail_at(monkeypatch, bad_step=2, times=1)
  assert pretrain.train(tiny_config(), 0, tmp_path, None)
  assert len(opened) == 2
  assert closed == opened


def test_a_finished_run_is_not_trained_again(tmp_path, compiled_once):
  config = tiny_config()
  assert pretrain.train(config, 0, tmp_path, None)
  before = (tmp_path / "metrics.jsonl").read_text()
  assert pretrain.train(config, 0, tmp_path, None)
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_resumed_run_says_which_settings_changed(tmp_path):
  config = tiny_config()
  assert experiment.save_config(config, tmp_path) == []
  config.schedule.base_lr = 1e-2
  (difference,) = experiment.save_config(config, tmp_path)
  assert "schedule.base_lr" in difference and "0.01" in difference
  assert experiment.load_config(tmp_path).schedule.base_lr == 1e-2
