"""From files to pairs on the host: the same filter banks, honest ratios."""

import functools

import numpy as np
import pytest
import soundfile as sf

from audiomosaic_jax import features
from benchmarks import host_pairs, input_pipeline, whole_path
from configs import pretrain


def noise(seconds=1.0):
  rng = np.random.default_rng(0)
  samples = int(seconds * input_pipeline.RATE)
  return 0.1 * rng.standard_normal(samples).astype(np.float32)


def numpy_bank(config):
  del config
  return functools.partial(
    input_pipeline.numpy_fbank, bank=input_pipeline.mel_bank()
  )


def torchaudio_bank(config):
  pytest.importorskip("torchaudio")
  name, fbank = host_pairs.host_fbank(config)
  assert name == "torchaudio"
  return fbank


@pytest.mark.parametrize("make", [numpy_bank, torchaudio_bank])
def test_the_hosts_filter_bank_is_ours(make):
  config = pretrain.get_config("")
  ours = features.log_mel_fbank(noise(), **config.fbank)
  theirs = make(config)(noise())
  np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_pairs_of_the_host_are_what_the_encoder_takes(tmp_path):
  config = pretrain.get_config("smoke")
  samples = config.data.pipeline.clip_samples
  host_pairs.write_clips(
    str(tmp_path), str(input_pipeline.PACKAGED), 2, samples
  )
  paths = sorted(map(str, tmp_path.iterdir()))
  assert [sf.info(path).frames for path in paths] == [samples] * 2
  pairs = host_pairs.HostPairs(paths, config, numpy_bank(config))
  pair = pairs[1]
  assert pair.shape == (2, config.spectrogram.num_frames, 128)
  assert pair.dtype == np.float32 and np.isfinite(pair).all()
  # The views were augmented apart.
  assert np.abs(pair[0] - pair[1]).max() > 0.1


def turn(pairs_per_s, cpu_s):
  return {"pairs_per_s": pairs_per_s, "cpu_s_per_pair": cpu_s}


def test_speed_and_host_time_are_compared_within_each_round():
  trained = {
    "ours": [turn(10.0, 0.2), turn(4.0, 0.2), turn(12.0, 0.2)],
    "host + torch": [turn(2.0, 0.9), turn(1.0, 0.9), turn(2.0, 0.9)],
  }
  read = {
    "ours": [turn(100.0, 0.01)] * 3,
    "host + torch": [turn(5.0, 0.2), turn(5.0, 0.3), turn(5.0, 0.1)],
  }
  found = whole_path.summarize(trained, read)
  assert found["ratio"] == {
    "pairs_per_s": pytest.approx(5.0),
    "host_cpu": pytest.approx(20.0),
  }
  text = whole_path.table(
    {
      "batch_size": 8,
      "workers": 2,
      "dtype": "float32",
      "fbank": "numpy",
      "device": "cpu",
      "programs": found,
    }
  )
  assert "5.00 times the pairs/s; 20.0 times less host CPU" in text
