"""The benchmarks against other programs: equal work, and honest tables."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiomosaic_jax import sharding, torch_params
from benchmarks import (
  inference,
  report,
  train_step,
  versus_torch,
)
from configs import pretrain


def tiny_config():
  """A small model in float32 whose step draws nothing at random."""
  config = pretrain.get_config("smoke,batch_size=6")
  config.model.encoder.update(
    width=16, depth=2, num_heads=2, drop_path=0.0, dtype="float32"
  )
  config.model.projector.update(hidden_features=24, out_features=8)
  # Where a gradient is a rounding error, Adam is to make little of it.
  config.optimizer.eps = 1e-3
  config.schedule.base_lr = 0.1
  return config


def scattered(tree, seed=0):
  """Adds noise, so that no part is without effect."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), x.dtype),
    tree,
  )


class Ours(NamedTuple):
  """Our program: its step is compiled once for all tests."""

  config: Any
  setup: train_step.Setup
  state: Any
  step: Callable


@pytest.fixture(scope="module")
def ours():
  config = tiny_config()
  mesh = sharding.make_mesh(jax.devices()[:1])
  setup = train_step.build(config, mesh)
  state = setup.init(jax.random.key(0))
  state = state.replace(params=scattered(state.params))
  return Ours(
    config, setup, state, versus_torch.model_step(setup, config, mesh)
  )


@pytest.fixture
def theirs(ours):
  """Returns PyTorch's model with our parameters."""
  pytest.importorskip("torch")
  from benchmarks import torch_model

  model = torch_model.AudioMosaic(ours.config, ours.setup.model.encoder.grid)
  arrays = torch_params.to_torch(ours.state.variables, ignored={})
  torch_model.load(model, arrays)
  return model


def our_inputs(config):
  fbanks, ids = versus_torch.noise_fbanks(config), versus_torch.keep_ids(config)
  return [jnp.asarray(x) for x in fbanks], [jnp.asarray(x) for x in ids]


def their_inputs(config):
  import torch

  fbanks, ids = versus_torch.noise_fbanks(config), versus_torch.keep_ids(config)
  return [torch.tensor(x) for x in fbanks], [
    torch.tensor(x).long() for x in ids
  ]


def their_names(params):
  """Returns arrays under the names of the PyTorch model."""
  return torch_params.to_torch({"params": params}, ignored={})


def first_gradients(state, config):
  """Returns the gradients of the first step, from the moments of Adam."""
  moments = optax.tree_utils.tree_get(state.opt_state, "mu")

  def gradient(moment, param):
    if isinstance(moment, optax.MaskedNode):
      return jnp.zeros_like(param)
    return moment / (1 - config.optimizer.b1)

  return jax.tree.map(
    gradient,
    moments,
    state.params,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )


def test_loss_and_gradients_of_pytorch_are_ours(ours, theirs):
  state = jax.tree.map(jnp.copy, ours.state)
  batch = our_inputs(ours.config)
  state, loss = ours.step(state, *batch, jax.random.key(0))
  grads = first_gradients(state, ours.config)
  their_loss = theirs(*their_inputs(ours.config))
  their_loss.backward()
  np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
  expected = {
    name: parameter.grad.numpy()
    for name, parameter in theirs.named_parameters()
    if parameter.requires_grad
  }
  found = their_names(grads)
  assert found.keys() - expected.keys() == {"projector.4.bias"}
  for name, grad in expected.items():
    # What BatchNorm takes away has a gradient of rounding errors alone.
    atol = 2e-5 * np.abs(grad).max() + 1e-6
    np.testing.assert_allclose(
      found[name], grad, atol=atol, rtol=1e-4, err_msg=name
    )
  assert sum(np.abs(grad).max() > 1e-3 for grad in expected.values()) > 20


def test_steps_of_pytorch_change_what_ours_do(ours, theirs):
  from benchmarks import torch_model

  config, state = ours.config, jax.tree.map(jnp.copy, ours.state)
  our_batch, their_batch = our_inputs(config), their_inputs(config)
  their_step = torch_model.make_step(theirs, config, compiled=False)
  for step in range(3):
    rate = config.schedule.base_lr * step / train_step.WARMUP_STEPS
    state, loss = ours.step(state, *our_batch, jax.random.key(0))
    their_loss = their_step(*their_batch, rate)
  np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
  before = their_names(ours.state.params)
  after = {n: p.detach().numpy() for n, p in theirs.named_parameters()}
  moved = 0.0
  for name, found in their_names(state.params).items():
    np.testing.assert_allclose(
      found, after[name], atol=0.01 * rate, rtol=1e-5, err_msg=name
    )
    moved = max(moved, np.abs(after[name] - before[name]).max())
  assert moved > 0.5 * rate
  stats = torch_params.to_torch(state.variables, ignored={})
  for name in ("projector.1.running_mean", "projector.4.running_var"):
    np.testing.assert_allclose(
      stats[name], theirs.state_dict()[name].numpy(), rtol=1e-4, atol=1e-6
    )


def test_what_the_pytorch_model_does_not_know_is_refused():
  pytest.importorskip("torch")
  from benchmarks import torch_model

  config = tiny_config()
  config.model.encoder.norm = "rmsnorm"
  with pytest.raises(ValueError, match=r"rmsnorm.*layernorm"):
    torch_model.AudioMosaic(config, (8, 8))


def test_our_model_step_lowers_its_loss(ours):
  batch = our_inputs(ours.config)
  state, losses = jax.tree.map(jnp.copy, ours.state), []
  for _ in range(5):
    state, loss = ours.step(state, *batch, jax.random.key(0))
    losses.append(float(loss))
  # The rate of the first step is zero.
  assert losses[0] == losses[1] > losses[2] > losses[4]
  assert int(state.step) == 5


def said(*seconds):
  return [
    {
      "step_s": s,
      "first_loss": 2.0,
      "first_step_s": 9.0,
      "peak_bytes": 2**30,
      "libraries_bytes": 2**28,
    }
    for s in seconds
  ]


def test_the_ratio_is_taken_within_each_round():
  found = versus_torch.summarize(
    {"ours": said(1.0, 10.0, 2.0), "torch eager": said(2.0, 20.0, 5.0)}, 8
  )
  assert found["torch eager"]["ratios"] == [2.0, 2.0, 2.5]
  assert found["torch eager"]["ratio"] == 2.0
  assert found["ours"]["ratio"] == 1.0
  assert found["ours"]["pairs_per_s"] == 8 / 2.0
  text = versus_torch.table(
    {
      "batch_size": 8,
      "tokens": "201 + 257",
      "dtype": "float32",
      "device": "cpu",
      "programs": found,
    }
  )
  assert "2.00 to 2.50" in text and "1024" in text and "201 + 257" in text


def fake_calls(variant, clips):
  del variant
  cold = {"compile_s": 4.0, "seconds": [1.0 * clips] * 3}
  return {"cold": cold, "cached": {"compile_s": 0.5, "seconds": []}}


def test_cells_that_would_take_too_long_are_named_and_not_run():
  settings = inference.Settings(
    clip_s=10.0, dtype="float32", repeats=3, budget_s=20.0
  )
  called = []

  def measure(variant, clips):
    called.append((variant, clips))
    return fake_calls(variant, clips)

  found = list(inference.cells(measure, ["tiny", "base"], [1, 64], settings))
  # A call of 64 tiny clips would take 64 s; one of a base clip some 14 s.
  assert called == [("tiny", 1), ("base", 1)]
  text = inference.table(settings._asdict() | {"device": "cpu", "cells": found})
  assert text.count("over budget") == 2
  assert found[0]["clips_per_s"] == 1.0
  assert found[0]["compile_s"] == {"cold": 4.0, "cached": 0.5}


def test_an_encoder_is_timed_from_waveforms(tmp_path, monkeypatch):
  def small(variant):
    assert variant == "tiny"
    config = tiny_config()
    config.fbank = pretrain.get_config("").fbank
    return config

  monkeypatch.setattr(inference, "make_config", small)
  settings = inference.Settings(
    clip_s=1.0, dtype="float32", repeats=2, budget_s=20.0
  )
  before = jax.config.jax_compilation_cache_dir
  try:
    measure = inference.make_measure(settings, str(tmp_path))
    figures = measure("tiny", 2)
    again = measure("tiny", 2)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
    jax.monitoring.clear_event_listeners()
  assert len(figures["seconds"]) == 2
  assert figures["compile_s"] > again["compile_s"] > 0
  assert inference.call_flops("tiny", 2, 1.0) == 2 * inference.call_flops(
    "tiny", 1, 1.0
  )


def test_a_file_of_figures_says_how_it_was_made(tmp_path):
  path = tmp_path / "figures.json"
  report.write_json(str(path), {"pairs_per_s": 3.0}, "cpu")
  written = json.loads(path.read_text())
  assert written["pairs_per_s"] == 3.0
  assert written["versions"]["jax"] == jax.__version__
  assert written["command"] and written["date"] and written["processor"]
  report.write_json("", {}, "cpu")
  assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]
