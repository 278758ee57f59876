"""HEAR 2021: its validator, as a user runs it."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("hearvalidator")
import torch

from audiomosaic_jax.adapters import hear

pytestmark = pytest.mark.slow
MODULE = "audiomosaic_jax.adapters.hear"


@pytest.fixture(scope="module")
def model(workdir):
  return hear.load_model(str(workdir))


def test_the_validator_says_looks_good(workdir, tmp_path, verdict):
  validator = pathlib.Path(sys.executable).with_name("hear-validator")
  result = subprocess.run(
    [validator, MODULE, "--model", workdir, "--device", "cpu"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  print(result.stdout)
  lines = [line.strip(" -") for line in result.stdout.splitlines()]
  assert "Interval between timestamps is 40.0ms" in lines
  # It warns of more than 50 ms between timestamps.
  assert "We suggest" not in result.stderr
  assert lines[-1] == "Looks good!"
  verdict("hearvalidator", f"hear-validator {MODULE}", lines[-1])


def test_an_encoder_that_is_not_given_is_asked_for(monkeypatch):
  monkeypatch.delenv("AUDIOMOSAIC_ENCODER", raising=False)
  with pytest.raises(ValueError, match="AUDIOMOSAIC_ENCODER"):
    hear.load_model()


def test_embeddings_are_those_of_the_encoder(model, tones):
  clips = np.stack([tones(500, 1.5, seed=0), tones(900, 1.5, seed=1)])
  audio = torch.from_numpy(clips)
  scenes = hear.get_scene_embeddings(audio, model).numpy()
  frames, times_ms = hear.get_timestamp_embeddings(audio, model)
  for i, clip in enumerate(clips):
    out = model.encoder.embed(clip, 16_000, hop_ms=40.0)
    np.testing.assert_allclose(scenes[i], out.embedding, atol=1e-5)
    np.testing.assert_allclose(frames[i].numpy(), out.frames, atol=1e-5)
    np.testing.assert_allclose(times_ms[i].numpy(), 1e3 * out.timestamps_s)


def test_timestamps_stay_regular_across_windows(model, tones):
  # A window is 1.3 s.
  audio = torch.from_numpy(tones(500, 5.3, seed=0))[None]
  _, times_ms = hear.get_timestamp_embeddings(audio, model)
  assert torch.all(torch.diff(times_ms) == 40)
