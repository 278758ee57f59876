"""perch-hoplite: its worker fills its database, its search finds in it."""

import numpy as np
import pytest
import soundfile
from ml_collections import config_dict

pytest.importorskip("perch_hoplite")
from perch_hoplite.agile import embed, source_info
from perch_hoplite.db import brutalism, in_mem_impl, score_functions

from audiomosaic_jax.adapters.hoplite import AudioMosaicModel

pytestmark = pytest.mark.slow
PITCHES_HZ = {"low": 400, "middle": 1_200, "high": 3_600}


@pytest.fixture(scope="module")
def model(workdir):
  config = config_dict.create(path=str(workdir), window_size_s=0.5)
  return AudioMosaicModel.from_config(config)


def test_search_finds_the_windows_that_sound_alike(
  model, tmp_path, tones, verdict
):
  for seed, (name, hz) in enumerate(PITCHES_HZ.items()):
    clip = tones(hz, 2.2, seed=seed)
    soundfile.write(tmp_path / f"{name}.wav", clip, 16_000)
  width = model.encoder.width
  db = in_mem_impl.InMemoryGraphSearchDB.create(embedding_dim=width)
  glob = source_info.AudioSourceConfig("tones", str(tmp_path), "*.wav")
  worker = embed.EmbedWorker(
    source_info.AudioSources((glob,)),
    embed.ModelConfig("audiomosaic", width, config_dict.ConfigDict()),
    db,
    embedding_model=model,
  )
  worker.process_all()
  # Four whole windows of half a second in each recording.
  assert db.count_embeddings() == 4 * len(PITCHES_HZ)

  query = tones(PITCHES_HZ["middle"], 0.5, seed=99)
  found = brutalism.brute_search(
    db,
    model.embed(query).embeddings[0, 0],
    search_list_size=4,
    score_fn=score_functions.get_score_fn("cos"),
  )
  windows = [db.get_window(result.window_id) for result in found]
  names = [db.get_recording(w.recording_id).filename for w in windows]
  assert names == 4 * ["middle.wav"]
  assert sorted(w.offsets[0] for w in windows) == [0.0, 0.5, 1.0, 1.5]
  verdict(
    "perch-hoplite",
    "EmbedWorker.process_all, in-memory database, brute_search",
    f"{db.count_embeddings()} windows; 4 of 4 found are of the query's pitch",
  )


def test_windows_are_embedded_as_the_encoder_does(model, tones):
  clip = tones(700, 1.7, seed=0)
  outputs = model.embed(clip)
  assert outputs.embeddings.shape == (3, 1, model.encoder.width)
  wanted = model.encoder.embed(clip[8_000:16_000], 16_000).embedding
  np.testing.assert_allclose(outputs.embeddings[1, 0], wanted, atol=1e-5)


def test_a_batch_is_its_recordings_one_by_one(model, tones):
  batch = np.stack([tones(hz, 1.0, seed=0) for hz in (500, 2_500)])
  outputs = model.batch_embed(batch)
  assert outputs.batched
  for row, clip in zip(outputs.embeddings, batch, strict=True):
    wanted = model.embed(clip).embeddings
    np.testing.assert_allclose(row, wanted, atol=1e-5)


def test_a_window_is_what_the_encoder_sees_unless_told(workdir):
  model = AudioMosaicModel.from_config(config_dict.create(path=str(workdir)))
  assert model.window_size_s == model.hop_size_s == model.encoder.window_s
