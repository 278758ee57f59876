"""A recording alone decides its embedding; frames are where they say."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
import tiny_encoder as tiny

from audiomosaic_jax import embedding, experiment, features
from audiomosaic_jax.data import audio_io, windows

RATE_HZ = tiny.RATE_HZ


@pytest.fixture(scope="module")
def encoder():
  return tiny.encoder()


def cosine(a, b):
  return (
    np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  )


def assert_close(one, other, atol=2e-5):
  for name in ("embedding", "frames", "z"):
    np.testing.assert_allclose(
      getattr(one, name), getattr(other, name), rtol=0, atol=atol
    )


def test_a_window_is_embedded_as_the_pretrained_model_does(encoder):
  samples = tiny.noise(encoder.window_s)
  model = experiment.build_model(encoder.config)
  fbank = features.log_mel_fbank(samples, **encoder.config.fbank)
  fbank = features.standardize(fbank, **encoder.config.spectrogram)
  expected = model.apply(encoder.variables, fbank[None], method="embed")
  out = encoder.embed(samples, RATE_HZ)
  np.testing.assert_allclose(out.embedding, expected[0], atol=5e-6)
  assert out.embedding.shape == (encoder.width,) == (32,)
  assert out.frames.shape == (8, 32) and out.z.shape == (128,)
  assert out.layers is None and out.logits is None


def test_200_random_batch_mates_change_nothing(encoder):
  # Lengths from a frame to a few windows, each next to another one.
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.uniform(np.log(400), np.log(60_000), size=(200, 2)))
  for seed, (one, other) in enumerate(lengths.astype(int)):
    clip = tiny.noise(one / RATE_HZ, seed)
    mate = tiny.noise(other / RATE_HZ, 1_000 + seed)
    alone = encoder.embed(clip, RATE_HZ)
    beside = encoder.embed_batch([mate, clip], RATE_HZ)[1]
    assert cosine(alone.embedding, beside.embedding) > 0.999999
    assert cosine(alone.frames, beside.frames).min() > 0.999999
    # The mate is another sound: the test can tell.
  assert cosine(alone.embedding, encoder.embed(mate, RATE_HZ).embedding) < 0.999


def test_silence_after_a_clip_is_heard_and_padding_is_not(encoder):
  clip = tiny.noise(0.5)
  longer = np.concatenate([clip, np.zeros(RATE_HZ // 2, np.float32)])
  short, long = encoder.embed(clip, RATE_HZ), encoder.embed(longer, RATE_HZ)
  assert len(short.frames) == 3 and len(long.frames) == 7
  assert cosine(short.embedding, long.embedding) < 0.999


def test_windows_of_a_long_recording_are_averaged_by_their_columns(encoder):
  # Two windows and a half: the grid of columns is that of the recording.
  step = 8 * 2_560
  samples = tiny.noise(2.5 * step / RATE_HZ)
  whole = encoder.embed(samples, RATE_HZ)
  span = encoder.geometry.span(8)
  parts = encoder.embed_batch(
    [samples[i * step : i * step + span] for i in range(3)], RATE_HZ
  )
  columns = [len(part.frames) for part in parts]
  assert columns == [8, 8, 4] and len(whole.frames) == 20
  for name in ("embedding", "z"):
    expected = np.average(
      [getattr(p, name) for p in parts], axis=0, weights=columns
    )
    np.testing.assert_allclose(getattr(whole, name), expected, atol=2e-5)
  joined = np.concatenate([part.frames for part in parts])
  np.testing.assert_allclose(whole.frames, joined, atol=2e-5)


def test_samples_are_let_go_once_they_are_embedded(encoder):
  geometry = encoder.geometry
  samples = tiny.noise(encoder.window_s)

  def compute(waveform, num_frames):
    return {"embedding": np.zeros((len(waveform), 2), np.float32)}

  run = embedding.WindowRun(
    compute, geometry, [0], row_sizes=[2], column_sizes=[8], frames=True
  )
  tracemalloc.start()
  try:
    for column in range(0, 8 * 100, 8):
      run.add(0, windows.Window(column, 0, samples, geometry.max_columns * 16))
    held, _ = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  # What waits or is on its way, of a hundred.
  assert held < 10 * samples.nbytes
  run.close(0)
  run.flush()
  [(_, out)] = run.finished()
  assert out.embedding.shape == (2,)


def test_frames_that_two_windows_saw_are_averaged(encoder):
  step = 4 * 2_560
  samples = tiny.noise((2 * step + 2_800) / RATE_HZ)
  both = encoder.embed(samples, RATE_HZ, overlap=0.5)
  span = encoder.geometry.span(8)
  first, second = encoder.embed_batch(
    [samples[:span], samples[step : step + span]], RATE_HZ
  )
  assert len(both.frames) == 9
  np.testing.assert_allclose(both.frames[:4], first.frames[:4], atol=2e-5)
  np.testing.assert_allclose(
    both.frames[4:8], (first.frames[4:] + second.frames[:4]) / 2, atol=2e-5
  )
  np.testing.assert_allclose(both.frames[8:], second.frames[4:], atol=2e-5)


def test_finer_frames_are_those_of_the_shifted_recording(encoder):
  samples = tiny.noise(3.0)
  fine = encoder.embed(samples, RATE_HZ, hop_ms=40, layers=True)
  np.testing.assert_allclose(np.diff(fine.timestamps_s), 0.04, atol=1e-9)
  for i in range(4):
    coarse = encoder.embed(samples[i * 640 :], RATE_HZ, layers=True)
    np.testing.assert_allclose(fine.frames[i::4], coarse.frames, atol=2e-5)
    np.testing.assert_allclose(fine.layers[:, i::4], coarse.layers, atol=2e-5)
    np.testing.assert_allclose(
      fine.timestamps_s[i::4], coarse.timestamps_s + 0.04 * i, atol=1e-9
    )
  coarse = encoder.embed(samples, RATE_HZ)
  np.testing.assert_allclose(fine.embedding, coarse.embedding, atol=2e-6)


def test_at_a_rate_that_cuts_the_shift_frames_are_a_column_apart():
  # 10 ms are 220.5 samples of 22.05 kHz, of which 220 are taken.
  rate_hz = 22_050
  encoder = tiny.encoder(**{"fbank.sample_rate_hz": rate_hz})
  assert encoder.hop_ms == pytest.approx(1e3 * 16 * 220 / rate_hz)
  samples = tiny.noise(3.0)
  whole = encoder.embed(samples, rate_hz)
  hop_s = encoder.hop_ms / 1e3
  np.testing.assert_allclose(np.diff(whole.timestamps_s), hop_s, atol=1e-9)
  assert_close(encoder.embed(samples, rate_hz, hop_ms=encoder.hop_ms), whole)
  # As the message about another hop gives it, in six digits.
  fine = encoder.embed(samples, rate_hz, hop_ms=float(f"{500 * hop_s:g}"))
  np.testing.assert_allclose(fine.frames[::2], whole.frames, atol=2e-5)
  with pytest.raises(ValueError, match=r"80.*159\.637 ms.*use 159\.637, 79\.8"):
    encoder.embed(samples, rate_hz, hop_ms=80)


@pytest.mark.parametrize("hop_ms", [160, 80, 20])
def test_a_click_is_in_the_frames_whose_time_it_is_at(hop_ms):
  # Without attention a frame knows nothing but its own patches.
  made = tiny.config()
  variables = jax.device_get(tiny.variables_of(made))
  attention = variables["params"]["encoder"]["blocks"]["attn"]["proj"]
  attention["kernel"] = np.zeros_like(attention["kernel"])
  blind = tiny.Encoder(made, variables, (), dtype="float32", batch_size=8)
  samples = tiny.noise(4.0)
  before = blind.embed(samples, RATE_HZ, hop_ms=hop_ms)
  for click_s in (0.05, 0.7, 1.31, 2.0, 3.33):
    clicked = samples.copy()
    clicked[round(click_s * RATE_HZ)] += 0.9
    after = blind.embed(clicked, RATE_HZ, hop_ms=hop_ms)
    changed = np.abs(after.frames - before.frames).max(axis=1) > 1e-3
    # A frame sees 175 ms, half of it on either side of its timestamp. At the
    # edges the window of the filter bank is next to zero: 5 ms on each side.
    distance = np.abs(before.timestamps_s - click_s)
    assert changed[distance < 0.0825].all()
    assert not changed[distance > 0.0876].any()
    assert changed.any()


def test_a_file_is_its_samples(encoder, tmp_path):
  samples = tiny.noise(2.0)
  path = tmp_path / "clip.wav"
  soundfile.write(path, samples, RATE_HZ, subtype="FLOAT")
  assert_close(encoder.embed(path), encoder.embed(samples, RATE_HZ))
  assert_close(encoder.embed(str(path)), encoder.embed(samples, RATE_HZ))
  pcm = audio_io.float_to_pcm16(samples)
  assert_close(
    encoder.embed(pcm, RATE_HZ),
    encoder.embed(audio_io.pcm16_to_float(pcm), RATE_HZ),
  )


def test_other_rates_are_resampled_and_channels_of_a_file_averaged(
  encoder, tmp_path
):
  rate_hz = 44_100
  samples = soxr.resample(tiny.noise(2.0), RATE_HZ, rate_hz)
  path = tmp_path / "clip.wav"
  stereo = np.stack([samples * 1.5, samples * 0.5], axis=1)
  soundfile.write(path, stereo, rate_hz, subtype="FLOAT")
  expected = encoder.embed(soxr.resample(samples, rate_hz, RATE_HZ), RATE_HZ)
  assert_close(encoder.embed(samples, rate_hz), expected)
  assert_close(encoder.embed(path), expected, atol=1e-3)


def test_recordings_of_a_hundred_lengths_compile_a_few_programs():
  encoder = tiny.encoder(batch_size=8)
  # Eight devices and as many rows: one batch size, windows of 4 or 8 columns.
  for i in range(100):
    encoder.embed(tiny.noise(0.03 + 0.03 * i), RATE_HZ)
  assert encoder._compute._cache_size() == 2


def test_a_bad_recording_is_reported_and_the_others_go_on(encoder, tmp_path):
  good = tiny.noise(1.0)
  soundfile.write(tmp_path / "silent.wav", np.zeros(8_000), RATE_HZ)
  errors = {}
  found = dict(
    encoder.embed_clips(
      [
        [good],
        [good[:100]],
        encoder.read(tmp_path / "silent.wav", None),
        encoder.read(tmp_path / "gone.wav", None),
        [good],
      ],
      hop_ms=None,
      overlap=0.0,
      layers=False,
      on_error=errors.__setitem__,
    )
  )
  assert sorted(found) == [0, 4]
  assert_close(found[0], found[4])
  assert {i: type(e) for i, e in errors.items()} == {
    1: ValueError,
    2: audio_io.BadClipError,
    3: audio_io.BadClipError,
  }


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"sample_rate_hz": None}, "sample_rate_hz="),
    ({"audio": np.zeros((2, 9_000), np.float32)}, r"\(2, 9000\).*channels"),
    ({"audio": np.zeros(9_000, np.int32)}, "int32.*int16"),
    ({"audio": np.r_[np.nan, np.zeros(9_000)]}, "1 NaN.*of 9001"),
    ({"audio": np.zeros(399, np.float32)}, r"399 samples.*400 \(25 ms\)"),
    ({"hop_ms": 50}, "50.*160 ms.*80 or 40"),
    ({"hop_ms": 0}, "hop_ms is 0"),
    ({"overlap": 1.0}, "overlap is 1.0"),
  ],
)
def test_what_cannot_be_embedded_is_refused(encoder, arguments, message):
  given = {"audio": tiny.noise(1.0), "sample_rate_hz": RATE_HZ} | arguments
  with pytest.raises(ValueError, match=message):
    encoder.embed(**given)


def test_variables_that_do_not_fit_are_refused_by_name():
  made = tiny.config()
  variables = jax.device_get(tiny.variables_of(made))
  del variables["params"]["fc_norm"]["bias"]
  with pytest.raises(ValueError, match="no params/fc_norm/bias"):
    tiny.Encoder(made, variables, (), dtype="float32", batch_size=8)
  variables["params"]["fc_norm"]["bias"] = jnp.zeros(31)
  with pytest.raises(ValueError, match=r"fc_norm/bias.*\(31,\).*\(32,\)"):
    tiny.Encoder(made, variables, (), dtype="float32", batch_size=8)


def test_bfloat16_is_close_to_float32(encoder):
  half = tiny.Encoder(
    encoder.config, encoder.variables, (), dtype="bfloat16", batch_size=8
  )
  samples = tiny.noise(3.0)
  one = half.embed(samples, RATE_HZ).embedding
  other = encoder.embed(samples, RATE_HZ).embedding
  assert 0.99 < cosine(one, other) < 0.9999999
  assert one.dtype == np.float32
