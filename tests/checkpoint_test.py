"""Checkpoints resume exactly, survive kills, and say what does not fit."""

import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from audiomosaic_jax import sharding
from audiomosaic_jax.checkpoint import (
  Checkpointer,
  load_meta,
  load_params,
)

ROOT = pathlib.Path(__file__).parents[1]


@flax.struct.dataclass
class State:
  """The fields of the training state; any leaf, arrays and shapes alike."""

  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any


def make_state(seed: int) -> State:
  """Returns a state with every dtype and nesting that training uses."""
  normal = np.random.default_rng(seed).normal
  params = {
    "encoder": {
      "blocks": {"kernel": jnp.asarray(normal(size=(2, 16, 8)), jnp.float32)},
      "bias": jnp.asarray(normal(size=8), jnp.bfloat16),
    },
    "projector": {"kernel": jnp.asarray(normal(size=(8, 3)), jnp.float32)},
  }
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(
      optax.adamw(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
  )
  batch_stats = {"mean": jnp.asarray(normal(size=3), jnp.float32)}
  return State(jnp.int32(seed), params, batch_stats, tx.init(params))


def place(state: State, mesh: Mesh) -> State:
  """Splits every leaf that divides over the mesh; replicates the rest."""
  devices = mesh.devices.size

  def put(leaf: jax.Array) -> jax.Array:
    splits = leaf.ndim > 0 and leaf.shape[0] % devices == 0
    layout = sharding.batch_sharded if splits else sharding.replicated
    return jax.device_put(leaf, layout(mesh))

  return jax.tree.map(put, state)


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def assert_bit_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def open_checkpoints(tmp_path, *, keep_last=3, keep_every=0):
  return Checkpointer(
    tmp_path / "checkpoints", keep_last=keep_last, keep_every=keep_every
  )


def test_state_and_meta_come_back_bit_equal(tmp_path):
  state, meta = make_state(5), {"config": {"lr": 6e-4, "order": ["a", "b"]}}
  with open_checkpoints(tmp_path) as saved:
    assert saved.latest_step() is None
    assert saved.save(5, state, meta)
  with open_checkpoints(tmp_path) as saved:
    assert saved.latest_step() == 5
    restored, restored_meta = saved.restore(5, abstract(state))
  assert_bit_equal(restored, state)
  assert restored_meta == meta
  assert load_meta(tmp_path) == meta


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_a_state_saved_on_eight_devices_restores_on_fewer(tmp_path, devices):
  state = place(make_state(1), sharding.make_mesh(jax.devices()))
  with open_checkpoints(tmp_path) as saved:
    saved.save(1, state, {})
  mesh = sharding.make_mesh(jax.devices()[:devices])
  target = place(make_state(2), mesh)
  with open_checkpoints(tmp_path) as saved:
    restored, _ = saved.restore(1, abstract(target))
  assert_bit_equal(restored, state)
  for got, wanted in zip(
    jax.tree.leaves(restored), jax.tree.leaves(target), strict=True
  ):
    assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
  state = make_state(1)
  wanted = jax.tree.map(np.array, state.params)
  double = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0
  )
  with open_checkpoints(tmp_path) as saved:
    saved.save(1, state, {})
    double(state)
  with open_checkpoints(tmp_path) as saved:
    restored, _ = saved.restore(1, abstract(make_state(2)))
  assert_bit_equal(jax.tree.map(np.array, restored.params), wanted)


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess:
  """Runs a script in a fresh interpreter on two simulated devices."""
  return subprocess.run(
    [sys.executable, "-c", script, *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=120,
  )


KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp
from audiomosaic_jax.checkpoint import Checkpointer

saved = Checkpointer(sys.argv[1], keep_last=2, keep_every=0)
make = lambda n: {"w": jax.random.bits(jax.random.key(n), (30_000_000,))}
for step in (1, 2):
  saved.save(step, make(step), {"step": step})
  if step == 1:
    saved.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_previous_step_restorable(tmp_path):
  directory = tmp_path / "checkpoints"
  result = run_script(KILLED, str(directory))
  assert result.returncode == -signal.SIGKILL, result.stdout
  assert any("tmp" in folder.name for folder in directory.iterdir())
  wanted = {"w": jax.random.bits(jax.random.key(1), (30_000_000,))}
  with open_checkpoints(tmp_path) as saved:
    assert saved.all_steps() == [1]
    state, meta = saved.restore(1, abstract(wanted))
    assert_bit_equal(state, wanted)
    assert meta == {"step": 1}
    assert saved.save(2, {"w": jnp.zeros(3)}, {})
    saved.wait()
    assert saved.all_steps() == [1, 2]
  assert sorted(folder.name for folder in directory.iterdir()) == ["1", "2"]


def test_the_last_n_and_every_mth_step_are_kept(tmp_path):
  with open_checkpoints(tmp_path, keep_last=2, keep_every=4) as saved:
    for step in range(2, 15, 2):
      saved.save(step, {"w": jnp.full(3, step)}, {})
    saved.wait()
    assert saved.all_steps() == [4, 8, 12, 14]
  with open_checkpoints(tmp_path, keep_last=1, keep_every=0) as saved:
    saved.save(15, {"w": jnp.zeros(3)}, {})
    saved.wait()
    assert saved.all_steps() == [15]


def test_saving_a_step_twice_does_nothing(tmp_path):
  with open_checkpoints(tmp_path) as saved:
    assert saved.save(3, {"w": jnp.ones(3)}, {"first": True})
    assert not saved.save(3, {"w": jnp.zeros(3)}, {"first": False})
    saved.wait()
    assert load_meta(tmp_path) == {"first": True}


def test_folders_that_were_not_completed_are_ignored(tmp_path):
  directory = tmp_path / "checkpoints"
  with open_checkpoints(tmp_path) as saved:
    saved.save(3, {"w": jnp.ones(3)}, {})
  (directory / "7" / "state").mkdir(parents=True)
  (directory / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  with open_checkpoints(tmp_path) as saved:
    assert saved.latest_step() == 3
    assert saved.save(7, {"w": jnp.zeros(3)}, {})
    saved.wait()
    assert saved.latest_step() == 7
  left = sorted(folder.name for folder in directory.iterdir())
  assert left == ["3", "7", "7.incomplete"]
  for _ in range(2):  # A copy may be cut off again.
    (directory / "9" / "state").mkdir(parents=True)
    with open_checkpoints(tmp_path) as saved:
      assert saved.latest_step() == 7
  left = {folder.name for folder in directory.iterdir()}
  assert left >= {"3", "7", "7.incomplete", "9.incomplete", "9.incomplete1"}


def test_restoring_names_what_does_not_fit(tmp_path):
  with open_checkpoints(tmp_path) as saved:
    saved.save(3, {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, {})
    saved.wait()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4.*3"):
      saved.restore(4, {"a": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"a has shape \(2, 3\).*\(2, 5\)"):
      saved.restore(3, {"a": jnp.ones((2, 5)), "b": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"has no c .*shape \(1,\)"):
      saved.restore(3, {"c": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"1 leaves that the model lacks.* b "):
      saved.restore(3, {"a": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="keep_last=0"):
      open_checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="has no sharding"):
      saved.restore(3, jax.eval_shape(lambda: {"a": jnp.ones((2, 3))}))


@pytest.fixture
def run_with_state(tmp_path):
  state = place(make_state(1), sharding.make_mesh(jax.devices()))
  with open_checkpoints(tmp_path) as saved:
    saved.save(2, make_state(2), {})
    saved.save(10, state, {})
  return tmp_path, state


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/10"])
def test_the_encoder_alone_can_be_read(run_with_state, where):
  workdir, state = run_with_state
  wanted = {
    "params": {"encoder": state.params["encoder"]},
    "batch_stats": state.batch_stats,
  }
  target = jax.eval_shape(lambda: wanted)
  assert_bit_equal(load_params(workdir / where, target), wanted)


def test_parameters_can_be_read_in_another_precision(run_with_state):
  workdir, state = run_with_state
  target = {"params": {"projector": {"kernel": jnp.ones((8, 3), jnp.bfloat16)}}}
  kernel = load_params(workdir, target)["params"]["projector"]["kernel"]
  np.testing.assert_array_equal(
    kernel, state.params["projector"]["kernel"].astype(jnp.bfloat16)
  )


def test_reading_parameters_names_what_is_missing(run_with_state, tmp_path):
  workdir, _ = run_with_state
  with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
    load_params(tmp_path / "nowhere", {})
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
    load_params(tmp_path / "empty", {})
  target = {"params": {"projector": {"kernel": jnp.ones((8, 4))}}}
  with pytest.raises(
    ValueError, match=r"params/projector/kernel has shape \(8, 3\).*\(8, 4\)"
  ):
    load_params(workdir, target)
  with pytest.raises(ValueError, match="has no params/decoder"):
    load_params(workdir, {"params": {"decoder": jnp.ones(3)}})


def test_a_folder_may_be_named_from_the_working_directory(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  state = make_state(2)
  with Checkpointer("run/checkpoints", keep_last=1, keep_every=0) as saved:
    saved.save(2, state, {"a": 1})
  assert load_meta("run") == {"a": 1}
  params = load_params("run", {"params": state.params})
  assert_bit_equal(params, {"params": state.params})
