"""The program that is exported says what the encoder says, before any file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder as tiny
import tiny_supervised
from jax import export as jax_export

from audiomosaic_jax import (
  classifier_setup,
  encoder_source,
  export_parity,
  export_program,
  features,
)
from audiomosaic_jax.encoder import Encoder
from configs import pretrain

RATE_HZ = tiny.RATE_HZ
WINDOW = 20_720
FBANK = pretrain.get_config().fbank.to_dict()


def make_encoder(seed=0, **changes):
  """An encoder as `tiny_encoder` makes them, initialised in one program."""
  config = tiny.config(**changes)
  variables = jax.jit(lambda: tiny.variables_of(config, seed))()
  return place(config, jax.device_get(variables))


def place(config, variables, class_names=(), dtype="float32"):
  return Encoder(config, variables, class_names, dtype=dtype, batch_size=8)


@pytest.fixture(scope="module")
def encoder():
  return make_encoder()


def recordings(length):
  [clips] = export_parity.demo_clips(RATE_HZ, [length])
  return clips


def assert_close_to(encoder, outputs, clips, atol):
  live = encoder.embed_batch(list(clips), RATE_HZ)
  for name in export_program.output_names(encoder):
    expected = np.stack([getattr(out, name) for out in live])
    assert outputs[name].shape == expected.shape
    np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
  "length", [400, 3_000, WINDOW - 1, WINDOW, WINDOW + 160, 50_000]
)
def test_the_program_is_the_encoder(encoder, length):
  program = export_program.make_program(encoder, export_program.fft_log_mel)
  clips = recordings(length)
  assert_close_to(encoder, jax.jit(program)(clips), clips, 5e-6)


@pytest.mark.parametrize(
  "changes",
  [
    {"model.pooling": "cls", "model.encoder.qk_norm": True},
    {"model.pooling": "mean_no_cls", "model.encoder.norm": "rmsnorm"},
    {"model.encoder.class_token": False, "model.encoder.final_norm": True},
    {"model.use_fc_norm": False, "model.encoder.scan_unroll": 2},
  ],
  ids=lambda changes: "+".join(changes),
)
def test_every_kind_of_encoder_has_its_program(changes):
  encoder = make_encoder(**changes)
  program = export_program.make_program(encoder, export_program.fft_log_mel)
  clips = recordings(50_000)
  assert_close_to(encoder, jax.jit(program)(clips), clips, 2e-5)


def test_the_program_of_a_classifier_has_its_logits():
  config = tiny_supervised.fine_tuning()
  encoder_source.complete(config, None)
  config.model.encoder.dtype = "float32"
  model = classifier_setup.build_model(config, 3)
  variables = classifier_setup.start_variables(model, config, None, 0)
  classifier = place(config, jax.device_get(variables), ("a", "b", "c"))
  program = export_program.make_program(classifier, export_program.fft_log_mel)
  clips = recordings(12_000)
  assert_close_to(classifier, jax.jit(program)(clips), clips, 5e-6)
  assert export_program.output_names(classifier)[-1] == "logits"


def test_other_clips_of_a_batch_change_nothing(encoder):
  program = jax.jit(
    export_program.make_program(encoder, export_program.conv_log_mel)
  )
  clips = recordings(30_000)
  together = program(clips)
  for i, clip in enumerate(clips):
    alone = program(clip[None])
    for name, rows in together.items():
      np.testing.assert_allclose(alone[name][0], rows[i], atol=2e-6)
  assert np.abs(np.diff(together["embedding"], axis=0)).max() > 0.1


@pytest.mark.parametrize("length", [400, 479, 480, 481, 559, 560, 20_000])
def test_a_symbolic_length_gives_the_same_spectrogram(length):
  log_mel = jax.jit(functools.partial(export_program.fft_log_mel, **FBANK))
  shape = jax_export.symbolic_shape("b, s", constraints=["s >= 400"])
  symbolic = jax_export.export(log_mel)(
    jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  clips = recordings(length)
  expected = jax.jit(functools.partial(features.log_mel_fbank, **FBANK))(clips)
  np.testing.assert_array_equal(symbolic.call(clips), expected)


def exact_log_mel(clips, *, num_mel_bins=128, **_):
  """Returns Kaldi's log-mel filter bank, computed in float64."""
  clips = np.asarray(clips)
  frames = np.lib.stride_tricks.sliding_window_view(clips, 400, axis=-1)
  frames = frames[:, ::160].astype(np.float64)
  frames = frames - frames.mean(axis=-1, keepdims=True)
  previous = np.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
  windowed = (frames - 0.97 * previous) * np.hanning(400)
  power = np.abs(np.fft.rfft(windowed, 512)[..., :256]) ** 2
  weights = features.mel_filter_bank(
    sample_rate_hz=RATE_HZ,
    fft_length=512,
    num_mel_bins=num_mel_bins,
    low_freq_hz=20.0,
    high_freq_hz=8_000.0,
  )
  energies = np.maximum(power @ weights, features.EPSILON)
  return np.log(energies).astype(np.float32)


def test_the_convolution_is_the_fourier_transform():
  clips = np.concatenate(export_parity.demo_clips(RATE_HZ, [WINDOW] * 8))
  convolved = export_program.conv_log_mel(jnp.asarray(clips), **FBANK)
  transformed = features.log_mel_fbank(clips, **FBANK)
  exact = exact_log_mel(clips)
  between = np.abs(convolved - transformed)
  from_conv, from_fft = (np.abs(x - exact) for x in (convolved, transformed))
  assert between.mean() < 1e-5 and between.max() < 5e-3
  assert from_conv.max() < 3e-3
  assert from_conv.mean() < from_fft.mean()


def test_the_convolution_is_as_near_to_the_encoder_as_exact_spectrograms(
  encoder,
):
  clips = np.concatenate(export_parity.demo_clips(RATE_HZ, [48_000] * 3))
  live = encoder.embed_batch(list(clips), RATE_HZ)
  convolved, exact = (
    export_program.make_program(encoder, log_mel)(jnp.asarray(clips))
    for log_mel in (export_program.conv_log_mel, exact_log_mel)
  )
  for name, allowed in (("embedding", 2e-5), ("frames", 3e-4)):
    expected = np.stack([getattr(out, name) for out in live])
    from_conv, from_exact = (
      np.abs(out[name] - expected).max() for out in (convolved, exact)
    )
    assert from_conv < 2 * from_exact < allowed


def test_the_convolution_hears_no_constant_offset():
  clips = recordings(WINDOW)
  log_mel = functools.partial(export_program.conv_log_mel, **FBANK)
  moved, still = log_mel(jnp.asarray(clips + 0.25)), log_mel(jnp.asarray(clips))
  assert np.abs(moved - still).mean() < 1e-4
  silence = log_mel(jnp.full((1, 800), 0.25))
  np.testing.assert_array_equal(silence, np.float32(np.log(features.EPSILON)))
