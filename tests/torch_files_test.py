"""Files of PyTorch are read whole, or refused by name; nothing is executed."""

import json
import re
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from audiomosaic_jax import torch_files

TENSORS = {
  "cls_token": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
  "norm.weight": np.arange(5, dtype=np.float16),
  "norm.bias": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
  "count": np.array(3, np.int64),
}


def save(tensors, path):
  safetensors.numpy.save_file(tensors, path)
  return path


def write_shards(folder, weight_map, *, suffix="safetensors"):
  stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
  index = folder / f"{stem}.{suffix}.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return index


def shards(folder):
  """Two files and their index; returns the index and what it says."""
  names = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
  ]
  weight_map = {name: names[i % 2] for i, name in enumerate(TENSORS)}
  for file in names:
    inside = {n: TENSORS[n] for n, f in weight_map.items() if f == file}
    save(inside, folder / file)
  return write_shards(folder, weight_map), weight_map


def assert_same(tensors, expected=TENSORS):
  assert set(tensors) == set(expected)
  for name, tensor in expected.items():
    assert tensors[name].dtype == tensor.dtype
    assert tensors[name].shape == tensor.shape
    assert tensors[name].tobytes() == tensor.tobytes()


def test_every_byte_of_a_file_is_read_and_written(tmp_path):
  path = save(TENSORS, tmp_path / "a.safetensors")
  found = torch_files.read(path)
  assert_same(found.tensors)
  assert (found.settings, found.files) == ({}, (path,))
  torch_files.write_tensors(found.tensors, tmp_path / "b.safetensors")
  assert_same(torch_files.read_tensors(tmp_path / "b.safetensors"))
  assert not list(tmp_path.glob("*.tmp"))


def test_a_view_is_written_in_the_order_of_its_shape(tmp_path):
  table = np.arange(6, dtype=np.float32).reshape(2, 3)
  torch_files.write_tensors({"x": table.T}, tmp_path / "x.safetensors")
  read = torch_files.read_tensors(tmp_path / "x.safetensors")["x"]
  np.testing.assert_array_equal(read, table.T)


def test_a_damaged_file_is_refused_by_name(tmp_path):
  path = save(TENSORS, tmp_path / "a.safetensors")
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"a\.safetensors is damaged.*again"):
    torch_files.read(path)


def test_what_is_not_there_or_of_another_kind_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nothing does not exist"):
    torch_files.read(tmp_path / "nothing")
  (tmp_path / "a.npz").write_bytes(b"")
  with pytest.raises(ValueError, match=r"a\.npz: it ends in '\.npz'"):
    torch_files.read(tmp_path / "a.npz")
  with pytest.raises(FileNotFoundError, match=r"holds none of.*a\.npz"):
    torch_files.read(tmp_path)


def test_a_folder_is_read_with_its_config(tmp_path):
  (tmp_path / "config.json").write_text('{"depth": 2}')
  save(TENSORS, tmp_path / "model.safetensors")
  found = torch_files.read(tmp_path)
  assert_same(found.tensors)
  assert found.settings == {"depth": 2}
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"config\.json holds a list"):
    torch_files.read(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is not JSON"):
    torch_files.read(tmp_path)


def test_python_files_of_a_folder_are_not_run(tmp_path):
  save(TENSORS, tmp_path / "model.safetensors")
  for name in ("modeling.py", "load_model.py", "__init__.py"):
    (tmp_path / name).write_text(
      f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
  torch_files.read(tmp_path)
  assert not (tmp_path / "ran").exists()
  assert not {"modeling", "load_model"} & set(sys.modules)


def test_files_of_a_cache_are_reached_by_links(tmp_path):
  (tmp_path / "blobs").mkdir()
  snapshot = tmp_path / "snapshots" / "main"
  snapshot.mkdir(parents=True)
  shards(tmp_path / "blobs")
  for path in (tmp_path / "blobs").iterdir():
    (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
  assert_same(torch_files.read(snapshot).tensors)


def test_weights_in_several_files_are_one_checkpoint(tmp_path):
  index, weight_map = shards(tmp_path)
  found = torch_files.read(tmp_path)
  assert_same(found.tensors)
  assert_same(torch_files.read(index).tensors)
  assert [f.name for f in found.files] == sorted(set(weight_map.values()))


@pytest.mark.parametrize(
  "file",
  [
    "../secret.safetensors",
    "/etc/secret.safetensors",
    "sub/secret.safetensors",
    "..\\secret.safetensors",
    "secret.bin",
    "..",
    "",
  ],
)
def test_no_file_outside_the_folder_is_read(tmp_path, file):
  folder = tmp_path / "folder"
  (folder / "sub").mkdir(parents=True)
  for place in (tmp_path, folder, folder / "sub"):
    save(TENSORS, place / "secret.safetensors")
  write_shards(folder, dict.fromkeys(TENSORS, file))
  with pytest.raises(ValueError, match=r"only \.safetensors files beside it"):
    torch_files.read(folder)


def test_an_index_that_differs_from_its_files_is_refused(tmp_path):
  _, weight_map = shards(tmp_path)
  file = weight_map["count"]
  write_shards(tmp_path, {k: v for k, v in weight_map.items() if k != "count"})
  with pytest.raises(ValueError, match=rf"{file} differ in 1.*first is count"):
    torch_files.read(tmp_path)
  write_shards(tmp_path, weight_map | {"head.weight": file})
  with pytest.raises(ValueError, match=r"first is head\.weight"):
    torch_files.read(tmp_path)
  write_shards(tmp_path, weight_map | {"x": "model-3.safetensors"})
  with pytest.raises(FileNotFoundError, match=r"model-3\.safetensors, which"):
    torch_files.read(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
  with pytest.raises(ValueError, match="has no weight_map"):
    torch_files.read(tmp_path)


def test_without_pytorch_its_files_are_refused_with_the_fix(
  tmp_path, monkeypatch
):
  (tmp_path / "a.pt").write_bytes(b"PK")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ImportError, match=r"a\.pt.*pip install torch"):
    torch_files.read(tmp_path / "a.pt")


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121", "2.5.0a0+git1"])
def test_a_pytorch_that_runs_what_is_stored_is_refused_unused(
  tmp_path, monkeypatch, version
):
  def load(*args, **kwargs):
    pytest.fail("the file was opened")

  old = types.SimpleNamespace(__version__=version, load=load)
  monkeypatch.setitem(sys.modules, "torch", old)
  (tmp_path / "a.pt").write_bytes(b"PK")
  message = rf"PyTorch {re.escape(version)} may run .*a\.pt; this needs 2\.6"
  with pytest.raises(ImportError, match=message):
    torch_files.read(tmp_path / "a.pt")


@pytest.mark.parametrize("version", ["2.6.0", "2.11.0+cpu", "3.0"])
def test_a_later_pytorch_reads_tensors(tmp_path, monkeypatch, version):
  def load(path, *, map_location, weights_only):
    assert weights_only
    return {}

  new = types.SimpleNamespace(__version__=version, load=load)
  monkeypatch.setitem(sys.modules, "torch", new)
  (tmp_path / "a.pt").write_bytes(b"PK")
  assert torch_files.read(tmp_path / "a.pt").tensors == {}


def torch_tensors(torch):
  return {
    name: torch.tensor(tensor.astype(np.float32)).to(
      getattr(torch, tensor.dtype.name)
    )
    for name, tensor in TENSORS.items()
  }


@pytest.mark.parametrize("wrapper", [None, *torch_files.WRAPPERS])
@pytest.mark.parametrize("suffix", torch_files.TORCH_SUFFIXES)
def test_state_dicts_of_pytorch_are_read(tmp_path, wrapper, suffix):
  torch = pytest.importorskip("torch")
  state = torch_tensors(torch)
  stored = state if wrapper is None else {wrapper: state, "epoch": 3}
  torch.save(stored, tmp_path / f"a{suffix}")
  assert_same(torch_files.read(tmp_path / f"a{suffix}").tensors)


def test_a_folder_of_pytorch_files_is_read(tmp_path):
  torch = pytest.importorskip("torch")
  names = ["pytorch_model-1.bin", "pytorch_model-2.bin"]
  weight_map = {name: names[i % 2] for i, name in enumerate(TENSORS)}
  state = torch_tensors(torch)
  for file in names:
    inside = {n: state[n] for n, f in weight_map.items() if f == file}
    torch.save(inside, tmp_path / file)
  write_shards(tmp_path, weight_map, suffix="bin")
  assert_same(torch_files.read(tmp_path).tensors)
  torch.save(state, tmp_path / "pytorch_model.bin")
  found = torch_files.read(tmp_path)
  assert [f.name for f in found.files] == ["pytorch_model.bin"]


class Touch:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, "w")


def test_a_pickle_is_not_run_and_what_is_no_tensor_refused(tmp_path):
  torch = pytest.importorskip("torch")
  torch.save({"x": Touch(str(tmp_path / "ran"))}, tmp_path / "a.pt")
  with pytest.raises(ValueError, match=r"a\.pt: .*more than tensors"):
    torch_files.read(tmp_path / "a.pt")
  assert not (tmp_path / "ran").exists()
  state = torch_tensors(torch)
  for stored, message in (
    (state | {"epoch": 3}, "epoch is a int and no tensor"),
    ({"model": state, "state_dict": state}, "keep one"),
    ([state], "holds a list"),
  ):
    torch.save(stored, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
      torch_files.read(tmp_path / "a.pt")
  (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:100])
  with pytest.raises(ValueError, match=r"a\.pt: .*damaged"):
    torch_files.read(tmp_path / "a.pt")
