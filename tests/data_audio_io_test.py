"""Every format, rate and channel count decodes; broken clips say why."""

import io

import numpy as np
import pytest
import soundfile

from audiomosaic_jax.data import audio_io

RATE_HZ = 16_000
SECONDS = 1.5
PITCH_HZ = 440.0

FORMATS = {
  "wav": ("WAV", "PCM_16"),
  "flac": ("FLAC", "PCM_16"),
  "ogg": ("OGG", "VORBIS"),
  "opus": ("OGG", "OPUS"),
  "mp3": ("MP3", "MPEG_LAYER_III"),
}
RATES_HZ = (8_000, 22_050, 44_100, 48_000)


def tone(rate_hz, seconds=SECONDS, pitch_hz=PITCH_HZ):
  time_s = np.arange(int(seconds * rate_hz)) / rate_hz
  return (0.3 * np.sin(2 * np.pi * pitch_hz * time_s)).astype(np.float32)


def encode(samples, rate_hz, kind):
  container, subtype = FORMATS[kind]
  file = io.BytesIO()
  soundfile.write(file, samples, rate_hz, format=container, subtype=subtype)
  return file.getvalue()


def pitch_of(waveform):
  spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
  return np.argmax(spectrum) * RATE_HZ / len(waveform)


CASES = [
  (kind, rate_hz, channels)
  for kind in FORMATS
  for rate_hz in RATES_HZ
  for channels in (1, 2)
  # Opus has five rates of its own.
  if kind != "opus" or rate_hz in (8_000, 48_000)
]


@pytest.mark.parametrize("kind, rate_hz, channels", CASES)
def test_every_format_keeps_length_pitch_and_level(
  tmp_path, kind, rate_hz, channels
):
  samples = np.stack([tone(rate_hz)] * channels, axis=1)
  contents = encode(samples, rate_hz, kind)
  path = tmp_path / f"clip.{kind}"
  path.write_bytes(contents)
  for audio in (path, contents):
    waveform = audio_io.load_audio(audio, sample_rate_hz=RATE_HZ)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - SECONDS * RATE_HZ) <= 1
    assert abs(pitch_of(waveform) - PITCH_HZ) < 1.0
    assert np.isclose(np.abs(waveform[4000:-4000]).max(), 0.3, rtol=0.15)


def test_channels_are_averaged():
  left = tone(RATE_HZ)
  contents = encode(np.stack([left, np.zeros_like(left)], 1), RATE_HZ, "wav")
  waveform = audio_io.load_audio(contents, sample_rate_hz=RATE_HZ)
  np.testing.assert_allclose(waveform, left / 2, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_part_of_a_file_equals_the_part_of_the_whole(tmp_path, kind):
  rate_hz = 48_000
  noise = np.random.default_rng(0).normal(size=4 * rate_hz) * 0.1
  path = tmp_path / f"clip.{kind}"
  path.write_bytes(encode(noise, rate_hz, kind))
  whole = audio_io.load_audio(path, sample_rate_hz=rate_hz)
  for start_s, end_s in ((0.0, 1.0), (0.7, 1.7), (2.5, 9.0)):
    part = audio_io.load_audio(
      path, sample_rate_hz=rate_hz, start_s=start_s, end_s=end_s
    )
    expected = whole[round(start_s * rate_hz) : round(end_s * rate_hz)]
    # The Opus decoder converges after a seek; the others are exact.
    tolerance = 2e-3 if kind == "opus" else 1e-5
    np.testing.assert_allclose(part, expected, atol=tolerance)


def test_resampling_matches_the_tone_at_the_other_rate():
  contents = encode(tone(44_100), 44_100, "wav")
  waveform = audio_io.load_audio(contents, sample_rate_hz=RATE_HZ)
  inside = slice(500, -500)
  np.testing.assert_allclose(waveform[inside], tone(RATE_HZ)[inside], atol=1e-3)


def test_what_lies_above_half_the_rate_is_removed():
  contents = encode(tone(44_100, pitch_hz=12_000), 44_100, "wav")
  waveform = audio_io.load_audio(contents, sample_rate_hz=RATE_HZ)
  assert np.abs(waveform[500:-500]).max() < 1e-3


def nan_file():
  file = io.BytesIO()
  samples = tone(RATE_HZ)
  samples[100] = np.nan
  soundfile.write(file, samples, RATE_HZ, format="WAV", subtype="FLOAT")
  return file.getvalue()


BAD = {
  "noise": (b"this is not audio" * 100, "cannot decode"),
  "zero bytes": (b"", "cannot decode"),
  "no samples": (encode(np.zeros(0), RATE_HZ, "wav"), "empty"),
  "silence": (encode(np.zeros(RATE_HZ), RATE_HZ, "wav"), "silent"),
  "nan": (nan_file(), "NaN"),
  **{
    f"half a {kind}": (
      encode(tone(48_000), 48_000, kind)[: 4000 if kind == "flac" else 3000],
      "cannot decode|empty|truncated",
    )
    for kind in ("flac", "ogg", "opus", "mp3")
  },
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_clip_says_what_is_wrong(tmp_path, case):
  contents, reason = BAD[case]
  path = tmp_path / "bad.bin"
  path.write_bytes(contents)
  for audio in (contents, path):
    with pytest.raises(audio_io.BadClipError, match=reason) as caught:
      audio_io.load_audio(audio, sample_rate_hz=RATE_HZ)
  assert caught.value.path == str(path)


def test_a_missing_file_is_a_bad_clip(tmp_path):
  with pytest.raises(audio_io.BadClipError, match="no such file"):
    audio_io.load_audio(tmp_path / "a.wav", sample_rate_hz=RATE_HZ)


def test_a_format_that_needs_conversion_names_the_command(tmp_path):
  (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A " * 9)
  with pytest.raises(audio_io.BadClipError, match="ffmpeg -i"):
    audio_io.load_audio(tmp_path / "a.m4a", sample_rate_hz=RATE_HZ)


def test_a_clip_that_begins_after_the_end_is_empty():
  contents = encode(tone(RATE_HZ), RATE_HZ, "wav")
  with pytest.raises(audio_io.BadClipError, match="empty: samples 80000"):
    audio_io.load_audio(
      contents, sample_rate_hz=RATE_HZ, start_s=5.0, end_s=6.0
    )


def test_fit_length_cuts_pads_and_repeats():
  clip = np.arange(1, 6)

  def fit(num_samples, mode, offset):
    fitted = audio_io.fit_length(clip, num_samples, mode=mode, offset=offset)
    return fitted.tolist()

  assert fit(3, "pad", 2) == [3, 4, 5]
  assert fit(5, "repeat", 0) == [1, 2, 3, 4, 5]
  assert fit(7, "pad", 0) == [1, 2, 3, 4, 5, 0, 0]
  assert fit(12, "repeat", 3) == [4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5]


def test_fit_length_refuses_what_it_cannot_do():
  clip = np.arange(5)
  with pytest.raises(ValueError, match=r"offset 3 .* use 0 to 2"):
    audio_io.fit_length(clip, 3, mode="pad", offset=3)
  with pytest.raises(ValueError, match="choose 'pad' or 'repeat'"):
    audio_io.fit_length(clip, 3, mode="wrap", offset=0)
  with pytest.raises(ValueError, match="empty"):
    audio_io.fit_length(clip[:0], 3, mode="pad", offset=0)


def test_sixteen_bits_round_trip_exactly_and_clip():
  integers = np.arange(-32768, 32768).astype(np.int16)
  floats = audio_io.pcm16_to_float(integers)
  np.testing.assert_array_equal(audio_io.float_to_pcm16(floats), integers)
  loud = np.array([-2.0, 1.0, 2.0], np.float32)
  assert audio_io.float_to_pcm16(loud).tolist() == [-32768, 32767, 32767]


def test_what_is_in_the_wanted_form_is_not_copied():
  integers = np.array([-32768, 0, 5], np.int16)
  floats = audio_io.as_float(integers)
  assert audio_io.as_pcm16(integers) is integers
  assert audio_io.as_float(floats) is floats
  np.testing.assert_array_equal(audio_io.as_pcm16(floats), integers)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_blocks_of_a_file_are_its_samples(tmp_path, kind, rate_hz):
  if kind == "opus" and rate_hz == 44_100:
    rate_hz = 48_000
  noise = np.random.default_rng(0).normal(size=(3 * rate_hz, 2)) * 0.1
  path = tmp_path / f"clip.{kind}"
  path.write_bytes(encode(noise.astype(np.float32), rate_hz, kind))
  whole = audio_io.load_audio(path, sample_rate_hz=RATE_HZ)
  blocks = list(
    audio_io.stream_audio(path, sample_rate_hz=RATE_HZ, block_s=0.37)
  )
  assert len(blocks) > 5
  joined = np.concatenate(blocks)
  assert len(joined) == len(whole)
  np.testing.assert_allclose(joined, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "samples, reason",
  [
    (np.zeros(8_000), "silent"),
    (np.zeros(0), "empty"),
    (np.r_[np.ones(4_000) * 0.1, np.nan], "NaN"),
  ],
)
def test_blocks_without_usable_sound_end_in_the_same_error(
  tmp_path, samples, reason
):
  path = tmp_path / "clip.wav"
  soundfile.write(path, samples.astype(np.float32), RATE_HZ, subtype="FLOAT")
  with pytest.raises(audio_io.BadClipError, match=reason):
    list(audio_io.stream_audio(path, sample_rate_hz=RATE_HZ, block_s=0.1))


def test_blocks_of_a_file_that_is_cut_short_end_in_an_error(tmp_path):
  path = tmp_path / "clip.flac"
  noise = np.random.default_rng(0).normal(size=4 * RATE_HZ) * 0.1
  contents = encode(noise.astype(np.float32), RATE_HZ, "flac")
  path.write_bytes(contents[: len(contents) // 2])
  with pytest.raises(audio_io.BadClipError, match=r"clip\.flac"):
    list(audio_io.stream_audio(path, sample_rate_hz=RATE_HZ, block_s=0.5))


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(audio_io.BadClipError, match=r"gone\.wav: no such file"):
    list(
      audio_io.stream_audio(
        tmp_path / "gone.wav", sample_rate_hz=RATE_HZ, block_s=1.0
      )
    )
