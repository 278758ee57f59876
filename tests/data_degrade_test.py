"""Degradations do what their numbers say, to every clip alike each time."""

import numpy as np
import pytest
import soundfile
from scipy import signal

from audiomosaic_jax.data import degrade, sources, wrappers

RATE_HZ = 16_000


class Clips(sources.Source):
  """Clips in memory."""

  def __init__(self, waveforms, labels, class_names, *, multi_hot=False):
    self.waveforms = waveforms
    self.class_names, self.multi_hot = class_names, multi_hot
    self.ids = [f"clip{i}" for i in range(len(waveforms))]
    self._label_sets = [np.atleast_1d(label).tolist() for label in labels]

  @property
  def label_sets(self):
    return [tuple(labels) for labels in self._label_sets]

  @property
  def labels(self):
    return sources.encode_labels(
      self._label_sets if self.multi_hot else [s[0] for s in self._label_sets],
      len(self.class_names),
    )

  def path(self, index):
    return None

  def __getitem__(self, index):
    return {
      "waveform": self.waveforms[index],
      "label": self.labels[index],
      "id": np.int32(index),
    }


@pytest.fixture
def speechlike():
  """Two seconds of noise between 300 and 3000 Hz."""
  rng = np.random.default_rng(0)
  b, a = signal.butter(2, [300, 3_000], "band", fs=RATE_HZ)
  return (0.3 * signal.lfilter(b, a, rng.normal(size=2 * RATE_HZ))).astype("f4")


def make(**changes):
  nothing = dict.fromkeys(
    ("noise_snr_db", "room_t60_s", "impulse_responses", "codecs"), ()
  )
  settings = nothing | {"codec_compression": 0.9, "resample_hz": ()}
  return degrade.degradations(**settings | changes, sample_rate_hz=RATE_HZ)


def snr_db(clean, degraded):
  noise = degraded - clean
  return 10 * np.log10(np.sum(clean**2) / np.sum(noise**2))


def generator():
  return np.random.default_rng(7)


def test_noise_has_the_ratio_that_its_name_says(speechlike):
  found = make(noise_snr_db=(20.0, 0.0))
  assert list(found) == ["clean", "noise at 20 dB", "noise at 0 dB"]
  np.testing.assert_array_equal(
    found["clean"](speechlike, generator()), speechlike
  )
  for name, ratio in (("noise at 20 dB", 20), ("noise at 0 dB", 0)):
    noisy = found[name](speechlike, generator())
    assert snr_db(speechlike, noisy) == pytest.approx(ratio, abs=0.2)


def test_a_room_decays_by_60_db_in_its_time():
  click = np.zeros(2 * RATE_HZ, "f4")
  click[0] = 1.0
  wet = make(room_t60_s=(0.5,))["room of 0.5 s"](click, generator())
  energy = np.square(wet[1:])
  level = [
    10 * np.log10(energy[int(t * RATE_HZ) :][:400].mean()) for t in (0.05, 0.3)
  ]
  # 60 dB in 0.5 s is 30 dB in a quarter of a second.
  assert level[0] - level[1] == pytest.approx(30, abs=2)
  assert np.sum(wet**2) == pytest.approx(1.0, rel=1e-6)
  # Half of the energy is the direct sound.
  assert wet[0] ** 2 == pytest.approx(0.5, abs=0.01)
  assert energy[int(0.5 * RATE_HZ) + 1 :].max() < 1e-20


def test_a_measured_room_is_read_from_its_file(speechlike, tmp_path):
  response = np.zeros(800)
  # Travel time, the direct sound, an echo.
  response[100], response[500] = 1.0, 0.5
  path = tmp_path / "hall.wav"
  soundfile.write(path, response, RATE_HZ, subtype="FLOAT")
  found = make(impulse_responses=(str(path),))
  wet = found[f"room {path}"](speechlike, generator())
  echo = speechlike + 0.5 * np.pad(speechlike, (400, 0))[: len(speechlike)]
  echo *= np.linalg.norm(speechlike) / np.linalg.norm(echo)
  np.testing.assert_allclose(wet, echo, atol=1e-5)


@pytest.mark.parametrize("name", ["mp3", "vorbis", "opus"])
def test_a_codec_loses_something_and_shifts_nothing(name, speechlike):
  decoded = make(codecs=(name,))[name](speechlike, generator())
  assert decoded.shape == speechlike.shape
  assert 3 < snr_db(speechlike, decoded) < 30
  lags = np.arange(-200, 201)
  middle = speechlike[4_000:-4_000]
  match = [np.dot(decoded[4_000 + k :][: len(middle)], middle) for k in lags]
  assert lags[np.argmax(match)] == 0


def test_resampling_loses_what_lies_above_half_the_rate():
  time_s = np.arange(RATE_HZ) / RATE_HZ
  tones = np.sin(2 * np.pi * 1_000 * time_s) + np.sin(
    2 * np.pi * 6_000 * time_s
  )
  there_and_back = make(resample_hz=(8_000,))["through 8000 Hz"](
    tones.astype("f4"), generator()
  )
  spectrum = np.abs(np.fft.rfft(there_and_back * np.hanning(RATE_HZ)))
  before = np.abs(np.fft.rfft(tones * np.hanning(RATE_HZ)))
  assert spectrum[1_000] == pytest.approx(before[1_000], rel=0.01)
  assert spectrum[6_000] < 1e-3 * before[6_000]


def test_every_classifier_hears_the_same_noise(speechlike):
  clips = Clips([speechlike, speechlike[::-1].copy()], [0, 1], ("a", "b"))
  noise = make(noise_snr_db=(5.0,))["noise at 5 dB"]
  sources_ = [degrade.DegradedSource(clips, noise, seed=s) for s in (0, 0, 1)]
  one, again, other = ([s[i]["waveform"] for i in (1, 0)] for s in sources_)
  np.testing.assert_array_equal(one[0], again[0])
  assert one[0].dtype == np.float32
  assert np.abs(one[0] - other[0]).max() > 1e-3
  # Not one noise for all clips.
  first, second = one[1] - speechlike, one[0] - speechlike[::-1]
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"codecs": ("gsm",)}, "codec 'gsm' is unknown; use one of .*mp3"),
    ({"codecs": ("mp3",), "codec_compression": 2.0}, "compress by less"),
  ],
)
def test_codecs_that_are_not_there_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


def test_classes_are_matched_by_name():
  clips = Clips([np.zeros(10)] * 3, [0, 1, 0], ("dog", "cat"))
  found = wrappers.ReclassedSource(clips, ("bird", "cat", "dog"))
  np.testing.assert_array_equal(found.labels, [2, 1, 2])
  assert found.label_sets == [(2,), (1,), (2,)]
  assert found[1]["label"] == 1 and found[2]["label"] == 2
  unlabelled = Clips([np.zeros(10)] * 2, [1, -1], ("dog", "cat"))
  found = wrappers.ReclassedSource(unlabelled, ("bird", "cat", "dog"))
  np.testing.assert_array_equal(found.labels, [1, -1])
  many = Clips(
    [np.zeros(10)] * 2, [[0, 1], [1]], ("dog", "cat"), multi_hot=True
  )
  found = wrappers.ReclassedSource(many, ("cat", "bird", "dog"))
  np.testing.assert_array_equal(found.labels, [[1, 0, 1], [1, 0, 0]])
  with pytest.raises(ValueError, match=r"classes \['cat'\].*not among"):
    wrappers.ReclassedSource(clips, ("dog", "bird"))
