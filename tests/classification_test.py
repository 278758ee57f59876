"""A step of supervised training, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_supervised as tiny

from audiomosaic_jax import (
  classification,
  classifier_setup,
  encoder_source,
  optimizer,
  predict,
  sharding,
  train_state,
)


def test_one_and_eight_devices_take_the_same_step():
  config = tiny.fine_tuning()
  encoder_source.complete(config, None)
  model = classifier_setup.build_model(config, 3)
  variables = classifier_setup.start_variables(model, config, None, 0)
  tx = optimizer.make_optimizer(
    variables["params"],
    schedule=lambda step: jnp.float32(1e-3),
    **config.optimizer,
  )
  rng = np.random.default_rng(0)
  batch = {
    "waveform": rng.integers(-8000, 8000, (8, 3_200), dtype=np.int16),
    "label": rng.integers(0, 3, 8, dtype=np.int32),
  }
  losses = {}
  for count in (1, 8):
    mesh = sharding.make_mesh(jax.devices()[:count])
    everywhere = sharding.replicated(mesh)
    state = jax.device_put(train_state.create(variables, tx, {}), everywhere)
    step = jax.jit(classification.make_train_step(model, tx, config, mesh))
    rows = sharding.put_batch(batch, sharding.batch_sharded(mesh))
    _, scalars = step(state, rows, jax.random.key(1))
    losses[count] = jax.device_get(scalars)
  for name, value in losses[1].items():
    np.testing.assert_allclose(losses[8][name], value, rtol=2e-5)


def test_nothing_of_the_input_is_changed_when_nothing_is_asked_for():
  config = tiny.probing()
  encoder_source.complete(config, None)
  mesh = sharding.make_mesh(jax.devices()[:1])
  rng = np.random.default_rng(0)
  waveform = jnp.asarray(rng.normal(size=(2, 3_200)) * 0.1, jnp.float32)
  targets = jnp.eye(2)
  fbank, same, keep_ids = classification.make_inputs(
    jax.random.key(0), waveform, targets, config, mesh
  )
  expected = predict.spectrogram_fn(config)(waveform)
  np.testing.assert_allclose(fbank, expected, atol=2e-5)
  np.testing.assert_array_equal(same, targets)
  assert keep_ids is None
