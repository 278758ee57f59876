"""Decoders are read from folders slice by slice, and written back alike."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from audiomosaic_jax import sharding, torch_files, weight_files
from audiomosaic_jax.language import generate, llama_weights
from audiomosaic_jax.models import lora
from tests import tiny_llama

FOLDERS = pytest.mark.parametrize("name", tiny_llama.FOLDERS)
# tensor, devices: all share the rows, all share the layers, and between.
MESHES = pytest.mark.parametrize("tensor", [1, 2, 8])


def one_device():
  return sharding.make_mesh(jax.devices()[:1])


def opened(name):
  return weight_files.open_weights(tiny_llama.GOLDEN / name)


def counting(tensors, read):
  """Returns the tensors; each reading adds (name, elements) to a list."""

  def watch(name, tensor):
    def part_of(index):
      part = tensor.read(index)
      read.append((name, part.size))
      return part

    return tensor._replace(read=part_of)

  return {name: watch(name, tensor) for name, tensor in tensors.items()}


@FOLDERS
@MESHES
def test_every_device_reads_only_its_slices(name, tensor):
  mesh = sharding.make_mesh(tensor=tensor)
  tensors, read = opened(name), []
  model = tiny_llama.stored(name)
  params = llama_weights.read_params(counting(tensors, read), model, mesh)
  flat = traverse_util.flatten_dict(params)
  for key, (path, layer) in llama_weights.hf_names(flat).items():
    sizes = [size for which, size in read if which == key]
    whole = math.prod(tensors[key].shape)
    # Devices with the same slice share a reading, and slices do not overlap.
    assert sum(sizes) == whole, key
    if path[-1] in ("kernel", "lm_head", "embed_tokens"):
      shards = flat[path].addressable_shards
      count = len({str(shard.index) for shard in shards})
      assert count > 1, path
      assert sizes == [whole // count] * count
      stack = 1 if layer is None else model.num_hidden_layers
      assert all(shard.data.size == whole * stack // count for shard in shards)


@FOLDERS
@MESHES
def test_split_over_eight_devices_it_is_the_same_decoder(name, tensor):
  model, expected = tiny_llama.stored(name), tiny_llama.golden(name)
  mesh = sharding.make_mesh(tensor=tensor)
  params = llama_weights.read_params(opened(name), model, mesh)
  jax.tree.map(
    np.testing.assert_array_equal, params, tiny_llama.stored_params(name)
  )
  ids, valid = expected["input_ids"], expected["attention_mask"] == 1
  logits = tiny_llama.logits_of(model, params, ids, valid)
  np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-4)
  tokens = generate.generate(
    model,
    params,
    model.apply({"params": params}, ids, method="embed"),
    valid,
    ids,
    jax.random.key(0),
    generate.Sampling(12, 0.0, 0, 1.0, 1.0, (), 0),
  )
  sequences = expected["gen_no_eos_sequences"]
  np.testing.assert_array_equal(tokens, sequences[:, ids.shape[1] :])


def test_adapters_and_norms_are_on_every_device():
  model = tiny_llama.build(lora_rank=2)
  params = tiny_llama.random_params(model)
  places = sharding.decoder_sharding(params, sharding.make_mesh(tensor=2))
  whole = {
    path[-1]
    for path, place in traverse_util.flatten_dict(places).items()
    if place.is_fully_replicated
  }
  assert whole == {"lora_a", "lora_b", "scale"}


def test_an_axis_that_the_devices_do_not_divide_is_not_split():
  places = sharding.decoder_sharding(
    {"lm_head": jnp.zeros((6, 16))}, sharding.make_mesh()
  )
  assert places["lm_head"].is_fully_replicated


def test_a_mesh_of_no_divisor_is_refused():
  with pytest.raises(ValueError, match="8 devices cannot be split by tensor 3"):
    sharding.make_mesh(tensor=3)


def test_weights_take_the_type_of_the_model():
  name = tiny_llama.FOLDERS[0]
  model = tiny_llama.stored(name, param_dtype="bfloat16", lora_rank=2)
  params = llama_weights.read_params(opened(name), model, one_device())
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
  assert not lora.split(params)[0]
  exact = tiny_llama.stored_params(name)
  jax.tree.map(
    lambda ours, x: np.testing.assert_array_equal(ours, x.astype(ours.dtype)),
    params,
    exact,
  )


@FOLDERS
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_a_folder_read_and_written_holds_the_same(tmp_path, name, shard_bytes):
  params = tiny_llama.stored_params(name)
  settings = llama_weights.read_settings(tiny_llama.GOLDEN / name)
  llama_weights.write_folder(
    params, settings, tmp_path / "a", shard_bytes=shard_bytes
  )
  theirs = torch_files.read(tiny_llama.GOLDEN / name).tensors
  ours = torch_files.read(tmp_path / "a")
  buffers = {key for key in theirs if key.endswith("inv_freq")}
  assert set(ours.tensors) == set(theirs) - buffers
  for key, tensor in ours.tensors.items():
    np.testing.assert_array_equal(tensor, theirs[key])
  assert (len(ours.files) > 1) == (shard_bytes < 10**9)
  sizes = [path.stat().st_size for path in ours.files]
  assert max(sizes) <= shard_bytes + 2000
  assert ours.settings["torch_dtype"] == "float32"
  assert tiny_llama.build(ours.settings) == tiny_llama.build(settings)
  assert [path.name for path in tmp_path.iterdir()] == ["a"]
  again = llama_weights.read_params(
    weight_files.open_weights(tmp_path / "a"),
    tiny_llama.build(ours.settings),
    one_device(),
  )
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_folder_that_is_there_and_adapters_are_not_written_over(tmp_path):
  params = tiny_llama.random_params(tiny_llama.build(lora_rank=2))
  write = llama_weights.write_folder
  with pytest.raises(FileExistsError, match="remove it"):
    write(params, {}, tmp_path, shard_bytes=10**9)
  with pytest.raises(ValueError, match="merge them first"):
    write(params, {}, tmp_path / "new", shard_bytes=10**9)
  assert not list(tmp_path.iterdir())


def test_missing_and_extra_tensors_are_named():
  name = tiny_llama.FOLDERS[1]
  tensors = opened(name)
  del tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.audio_proj.1.weight"] = tensors["lm_head.weight"]
  model = tiny_llama.stored(name)
  with pytest.raises(ValueError) as raised:
    llama_weights.read_params(tensors, model, one_device())
  said = str(raised.value)
  assert "1 tensors missing: model.layers.1.mlp.up_proj.weight" in said
  assert "1 tensors not of this model: model.audio_proj.1.weight" in said
  tensors["model.layers.1.mlp.up_proj.weight"] = tensors[
    "model.layers.0.mlp.up_proj.weight"
  ]
  llama_weights.read_params(tensors, model, one_device(), ignore="audio_")


def test_tensors_of_another_shape_are_named_with_both():
  name = tiny_llama.FOLDERS[0]
  model = tiny_llama.stored(name, intermediate_size=177)
  with pytest.raises(ValueError, match=r"\(64, 176\), wanted \(64, 177\)"):
    llama_weights.read_params(opened(name), model, one_device())


def test_with_tied_embeddings_a_head_may_be_there_and_need_not():
  tensors = opened(tiny_llama.FOLDERS[0])
  model = tiny_llama.stored(tiny_llama.FOLDERS[0], tie_word_embeddings=True)
  params = llama_weights.read_params(tensors, model, one_device())
  assert "lm_head" not in params
  del tensors["lm_head.weight"]
  llama_weights.read_params(tensors, model, one_device())


def test_an_index_and_files_that_differ_are_refused(tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(tiny_llama.GOLDEN / tiny_llama.FOLDERS[1], folder)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["new.weight"] = "model-00001-of-00011.safetensors"
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"differ in 1 tensors.*new\.weight"):
    weight_files.open_weights(folder)
  (folder / "model-00003-of-00011.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="model-00003-of-00011"):
    weight_files.open_weights(folder)


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    weight_files.open_weights(tmp_path / "nothing")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    llama_weights.read_settings(tmp_path)
  damaged = tmp_path / "a.safetensors"
  damaged.write_bytes(b"x" * 100)
  with pytest.raises(ValueError, match="damaged"):
    weight_files.open_weights(damaged)
  (tmp_path / "a.npz").write_bytes(b"")
  with pytest.raises(ValueError, match=r"\.npz"):
    weight_files.open_weights(tmp_path / "a.npz")
