"""MTEB: the tasks that its command `mteb mock-run` makes up for audio."""

import numpy as np
import pytest

pytest.importorskip("mteb")
import mteb
from mteb.results.task_result import TaskResult
from torch.utils.data import DataLoader

import audiomosaic_jax
from audiomosaic_jax.adapters.mteb import model_meta

pytestmark = pytest.mark.slow
# Classification with and without folds, of pairs and of several labels,
# clustering, reranking and retrieval.
NUM_TASKS = 7


@pytest.fixture(scope="module")
def model(workdir):
  meta = model_meta(str(workdir), name="audiomosaic/untrained", revision="1")
  return meta.load_model(device="cpu")


def test_all_audio_tasks_of_the_mock_run_pass(model, monkeypatch, verdict):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  results = mteb.mock_run(model)
  print(results.to_markdown())
  ran = {name: r for name, r in results.items() if r is not None}
  assert results.all_passed
  assert all(isinstance(result, TaskResult) for result in ran.values()), ran
  assert len(ran) == NUM_TASKS
  [audio] = [row for row in results.modality_summary() if row[1] == "audio"]
  assert audio[0] == f"✓ ({NUM_TASKS}/{NUM_TASKS})"
  verdict("mteb", "mteb.mock_run, all audio tasks, offline", audio[0])


def test_clips_are_resampled_and_keep_their_order(model, workdir, tones):
  low, high = tones(500, 1.0, seed=0), tones(3_000, 2.0, seed=1)
  rows = [
    {"audio": {"array": low, "sampling_rate": 16_000}},
    {"audio": {"array": high, "sampling_rate": 16_000}},
    {"audio": {"array": np.repeat(low, 2), "sampling_rate": 32_000}},
  ]
  embeddings = model.encode(
    DataLoader(rows, batch_size=2, collate_fn=list),
    task_metadata=None,
    hf_split="test",
    hf_subset="default",
  )
  assert isinstance(embeddings, np.ndarray)
  encoder = audiomosaic_jax.load_encoder(workdir)
  for row, clip in zip(embeddings, (low, high), strict=False):
    wanted = encoder.embed(clip, 16_000).embedding
    np.testing.assert_allclose(row, wanted, atol=1e-5)
  distance = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
  assert distance[0, 2] < 0.5 * distance[0, 1]
