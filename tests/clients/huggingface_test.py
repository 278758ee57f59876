"""The folder of the Hub: written, read by others, and read back."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_encoder

import audiomosaic_jax
from audiomosaic_jax import embed_program
from audiomosaic_jax.adapters import huggingface
from audiomosaic_jax.encoder import Encoder

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def saved(workdir, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pretrained")
  encoder = audiomosaic_jax.load_encoder(workdir)
  huggingface.save_pretrained(encoder, folder)
  return encoder, folder


def test_embeddings_are_equal_after_a_round_trip(saved, tones):
  encoder, folder = saved
  again = huggingface.from_pretrained(folder)
  clip = tones(700, seconds=2.0, seed=0)
  wanted = encoder.embed(clip, RATE_HZ, layers=True)
  found = again.embed(clip, RATE_HZ, layers=True)
  for name in ("embedding", "frames", "layers", "z", "timestamps_s"):
    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
  assert wanted.z is not None


def test_a_classifier_keeps_its_logits_and_the_names_of_its_classes(
  tmp_path, tones
):
  config = tiny_encoder.config()
  encoder = config.model.encoder
  config.model = {"head": "linear", "pooling": "mean", "encoder": encoder}
  abstract = embed_program.abstract_variables(
    embed_program.build_embedder(config, 3, "float32"), config
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype),
    abstract,
  )
  names = ("bird", "engine", "rain")
  encoder = Encoder(config, variables, names, dtype="float32", batch_size=8)
  huggingface.save_pretrained(encoder, tmp_path)
  again = huggingface.from_pretrained(tmp_path)
  assert again.class_names == names
  clip = tones(700, seconds=1.0, seed=0)
  wanted = encoder.embed(clip, RATE_HZ).logits
  assert np.ptp(wanted) > 0.01
  np.testing.assert_array_equal(again.embed(clip, RATE_HZ).logits, wanted)


def test_the_folder_holds_two_files_and_no_path_of_the_run(saved, workdir):
  _, folder = saved
  names = sorted(path.name for path in folder.iterdir())
  assert names == ["config.json", "model.safetensors"]
  text = (folder / "config.json").read_text()
  assert set(json.loads(text)) == {
    *("model_type", "fbank", "spectrogram", "model", "class_names")
  }
  assert str(workdir) not in text


def test_a_missing_tensor_is_named(saved, tmp_path):
  _, folder = saved
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  del tensors["patch_embed.proj.bias"]
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"patch_embed\.proj\.bias"):
    huggingface.from_pretrained(tmp_path)


def test_the_model_of_another_library_is_refused_by_its_type(saved, tmp_path):
  _, folder = saved
  (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
  (tmp_path / "model.safetensors").write_bytes(
    (folder / "model.safetensors").read_bytes()
  )
  with pytest.raises(ValueError, match="wav2vec2"):
    huggingface.from_pretrained(tmp_path)


def test_a_folder_without_weights_is_refused(saved, tmp_path):
  _, folder = saved
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
    huggingface.from_pretrained(tmp_path)


@pytest.mark.slow
def test_pytorch_reads_the_tensors_in_its_own_layout(saved, verdict):
  torch = pytest.importorskip("torch")
  import safetensors.torch

  encoder, folder = saved
  path = folder / "model.safetensors"
  with safetensors.safe_open(path, framework="pt") as file:
    assert file.metadata() == {"format": "pt"}
  tensors = safetensors.torch.load_file(path)
  block = encoder.variables["params"]["encoder"]["blocks"]
  ours = block["attn"]["qkv"]["kernel"][1]  # [in, out], blocks on axis 0
  theirs = tensors["blocks.1.attn.qkv.weight"]
  layer = torch.nn.Linear(*ours.shape, bias=False)
  layer.load_state_dict({"weight": theirs})
  x = np.random.default_rng(0).normal(size=(3, len(ours))).astype(np.float32)
  with torch.no_grad():
    found = layer(torch.from_numpy(x)).numpy()
  np.testing.assert_allclose(found, x @ ours, rtol=1e-5, atol=1e-6)
  count = sum(tensor.numel() for tensor in tensors.values())
  assert count == sum(leaf.size for leaf in jax.tree.leaves(encoder.variables))
  verdict(
    "safetensors",
    "safetensors.torch.load_file of a folder of save_pretrained",
    f"{len(tensors)} tensors, {count} numbers, all of the encoder's",
  )
