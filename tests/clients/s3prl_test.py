"""S3PRL: found by its hubs, read by both of its featurizers."""

import numpy as np
import pytest

pytest.importorskip("s3prl")
import torch

from audiomosaic_jax.adapters import s3prl as adapter

pytestmark = pytest.mark.slow
SECONDS = (1.0, 0.4, 1.7, 0.05)


@pytest.fixture(scope="module")
def upstream(workdir):
  from s3prl.nn import S3PRLUpstream

  adapter.register()
  return S3PRLUpstream("audiomosaic", str(workdir)).eval()


@pytest.fixture
def batch(tones):
  clips = [tones(600, s, seed=i) for i, s in enumerate(SECONDS)]
  return [torch.from_numpy(clip) for clip in clips]


def test_the_upstream_and_the_featurizer_of_the_toolkit_run(
  upstream, batch, verdict
):
  from s3prl.nn import Featurizer

  assert upstream.num_layers == 2
  assert upstream.hidden_sizes == [32, 32]
  assert upstream.downsample_rates == [640, 640]
  lengths = torch.tensor([len(wav) for wav in batch])
  padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
  featurizer = Featurizer(upstream)
  features, frames = featurizer(*upstream(padded, lengths))
  assert features.shape == (4, 43, 32)
  assert frames.tolist() == [25, 10, 43, 2]
  verdict(
    "s3prl",
    "S3PRLUpstream('audiomosaic') and Featurizer, 4 lengths",
    f"{tuple(features.shape)}, frames {frames.tolist()}",
  )


def test_the_featurizer_of_superb_tasks_learns_weights_of_blocks(
  workdir, batch, verdict
):
  from s3prl.upstream.interfaces import Featurizer

  upstream = adapter.audiomosaic(str(workdir))
  featurizer = Featurizer(upstream, upstream_device="cpu")
  assert featurizer.layer_num == 2
  assert featurizer.output_dim == 32
  features = featurizer(batch, upstream(batch))
  assert [len(feature) for feature in features] == [25, 10, 42, 1]
  sum(feature.square().sum() for feature in features).backward()
  assert torch.all(featurizer.weights.grad != 0)
  verdict(
    "s3prl",
    "upstream.interfaces.Featurizer, forward and backward",
    f"{featurizer.layer_num} layers weighted, {featurizer.output_dim} channels",
  )


def test_torch_hub_finds_the_upstream_in_a_folder(workdir, tmp_path, verdict):
  line = "from audiomosaic_jax.adapters.s3prl import audiomosaic\n"
  (tmp_path / "hubconf.py").write_text(line)
  upstream = torch.hub.load(
    str(tmp_path), "audiomosaic", str(workdir), source="local", hop_ms=20.0
  )
  assert upstream.get_downsample_rates("hidden_states") == 320
  verdict("torch", "torch.hub.load(folder, 'audiomosaic')", "loaded")


def test_states_do_not_depend_on_what_a_clip_is_batched_with(workdir, batch):
  upstream = adapter.audiomosaic(str(workdir))
  together = upstream(batch)["hidden_states"]
  for i, wav in enumerate(batch):
    out = upstream.encoder.embed(wav.numpy(), 16_000, hop_ms=40.0, layers=True)
    count = min(-(-len(wav) // 640), len(out.frames))
    for block, states in enumerate(together):
      np.testing.assert_allclose(
        states[i, :count].numpy(), out.layers[block, :count], atol=1e-5
      )
      assert not states[i, -(-len(wav) // 640) :].any()


def test_an_encoder_of_another_rate_is_refused(workdir, tmp_path):
  config = (workdir / "config.json").read_text()
  other = tmp_path / "run"
  (other).mkdir()
  changed = config.replace('"sample_rate_hz": 16000', '"sample_rate_hz": 8000')
  (other / "config.json").write_text(changed)
  (other / "checkpoints").symlink_to(workdir / "checkpoints")
  with pytest.raises(ValueError, match="8000 Hz"):
    adapter.audiomosaic(str(other))
