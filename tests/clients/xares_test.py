"""X-ARES: its check of an encoder, and its runner on a task of our own."""

import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile

pytest.importorskip("xares")
import torch
from xares.audio_encoder_checker import check_audio_encoder

from audiomosaic_jax.adapters.xares import AudioMosaicEncoder

pytestmark = pytest.mark.slow
# Any path that ends so: the runner makes a module name of it.
ENCODER = "audiomosaic_jax/adapters/xares.py"
# A task as the files in xares/tasks have it. Its tar files are there and said
# to be complete, so that nothing is downloaded.
TASK = """
from xares.task import TaskConfig

def pitch_config(encoder) -> TaskConfig:
  return TaskConfig(
    encoder=encoder,
    name="pitch",
    formal_name="Pitch",
    env_root="env",
    eval_weight=1,
    batch_size_train=8,
    epochs=20,
    learning_rate=0.01,
    label_processor=lambda x: x["label"],
    num_encoder_workers=0,
    output_dim=2,
  )
"""


@pytest.fixture
def encoder(workdir, monkeypatch):
  monkeypatch.setenv("AUDIOMOSAIC_ENCODER", str(workdir))
  return AudioMosaicEncoder()


def write_split(folder, split, count, tones, first_seed):
  """Writes clips of two pitches and their labels into one tar file."""
  with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
    for i in range(count):
      label, name = i % 2, f"{split}{i:03d}"
      # Lengths are no multiple of a hop.
      clip = tones((500, 3_000)[label], 0.9 + 0.01 * i, seed=first_seed + i)
      soundfile.write(folder / f"{name}.wav", clip, 16_000)
      (folder / f"{name}.json").write_text(json.dumps({"label": label}))
      for suffix in ("wav", "json"):
        tar.add(folder / f"{name}.{suffix}", f"{name}.{suffix}")


def test_the_checker_accepts_the_encoder(encoder, verdict):
  accepted = check_audio_encoder(encoder)
  assert accepted is True
  verdict("xares", "check_audio_encoder(AudioMosaicEncoder())", str(accepted))


def test_the_runner_finds_encodes_and_scores(workdir, tmp_path, tones, verdict):
  folder = tmp_path / "env" / "pitch"
  folder.mkdir(parents=True)
  for seed, (split, count) in enumerate(
    {"train": 48, "valid": 16, "test": 32}.items()
  ):
    write_split(folder, split, count, tones, first_seed=1_000 * seed)
  (folder / ".audio_tar_ready").touch()
  (tmp_path / "pitch_task.py").write_text(TASK)
  command = ("-m", "xares.run", ENCODER, "pitch_task.py", "--max-jobs", "0")
  result = subprocess.run(
    [sys.executable, *command],
    cwd=tmp_path,
    env=os.environ | {"AUDIOMOSAIC_ENCODER": str(workdir)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  print(result.stdout)
  lines = [line.split() for line in result.stdout.splitlines()]
  header = lines.index(["Task", "MLP_Score", "KNN_Score", "Private"])
  task, mlp, knn, _ = lines[header + 1]
  assert task == "Pitch"
  assert float(mlp) > 0.8
  assert float(knn) > 0.8
  verdict(
    "xares",
    f"python -m xares.run {ENCODER}, two pitches",
    f"MLP {float(mlp):.3f}, KNN {float(knn):.3f}",
  )


def test_frames_are_those_of_the_encoder_at_the_hop_it_tells(encoder, tones):
  clip = tones(500, 3.125, seed=0)
  frames = encoder(torch.from_numpy(clip)[None])[0].numpy()
  out = encoder.encoder.embed(clip, 16_000, hop_ms=encoder.hop_size_in_ms)
  np.testing.assert_allclose(frames, out.frames, atol=1e-5)
  # As many as the benchmark's own example: 50000 samples, 40 ms, 78 frames.
  assert encoder.hop_size_in_ms == 40
  assert len(frames) == 78
