"""Files of torch.save are read without PyTorch, and nothing in them is run.

The stored file is of PyTorch 2.14; the arrays beside it are what it holds.
"""

import os
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from audiomosaic_jax import sharding, torch_files, torch_zip, weight_files
from audiomosaic_jax.language import llama_weights
from tests import tiny_llama

STORED = tiny_llama.GOLDEN / "torch_zip.bin"


def rewritten(path, change):
  """Writes the stored file with some entries changed; returns its path."""
  with zipfile.ZipFile(STORED) as old, zipfile.ZipFile(path, "w") as new:
    for name in old.namelist():
      content = change(name.partition("/")[2], old.read(name))
      if content is not None:
        new.writestr(name, content)
  return path


def with_pickle(path, content):
  return rewritten(path, lambda n, x: content if n == "data.pkl" else x)


def test_every_kind_of_tensor_is_read(golden):
  expected = golden("torch_zip.npz")
  read = torch_zip.read_views(STORED)
  assert set(read) == set(expected)
  for name, array in read.items():
    assert array.shape == expected[name].shape
    np.testing.assert_array_equal(
      array.astype(expected[name].dtype), expected[name]
    )
    assert not array.flags.writeable
  assert read["brain"].dtype == ml_dtypes.bfloat16
  assert read["half"].dtype == np.float16


def test_slices_are_read_alone(golden):
  expected = golden("torch_zip.npz")
  tensors = weight_files.open_weights(STORED)
  index = (slice(1, 3), slice(2, 6))
  for name in ("turned", "plain"):
    part = tensors[name].read(index)
    np.testing.assert_array_equal(part, expected[name][index])
  np.testing.assert_array_equal(
    weight_files.read_whole(tensors["part"]), expected["part"]
  )


def test_rewriting_the_archive_changes_nothing(tmp_path):
  path = rewritten(tmp_path / "a.bin", lambda name, content: content)
  for name, array in torch_zip.read_views(STORED).items():
    np.testing.assert_array_equal(torch_zip.read_views(path)[name], array)


class Harm:
  """What an attacker would store."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_function_in_the_file_is_refused_and_not_run(tmp_path, protocol):
  made = tmp_path / "made"
  content = pickle.dumps({"x": Harm(made)}, protocol=protocol)
  path = with_pickle(tmp_path / "a.bin", content)
  with pytest.raises(ValueError, match=r"cannot read .*more than tensors"):
    torch_zip.read_views(path)
  assert not made.exists()
  pickle.loads(content)
  assert made.exists()


def test_a_function_is_named():
  content = pickle.dumps({"x": Harm("nowhere")}, protocol=2)
  with pytest.raises(ValueError, match=r"mkdir, which is not run"):
    torch_zip._follow(content, STORED)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (pickle.dumps({"x": 3}, protocol=2), "x is a int and no tensor"),
    (pickle.dumps([1], protocol=2), "list, not a state dict"),
    (b"\x80\x02}q\x00", "cannot read"),
    (b"", "cannot read"),
    (b"\x80\x02.", "cannot read"),
    (b"\x80\x02h\x07.", "cannot read"),
  ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, words):
  path = with_pickle(tmp_path / "a.bin", content)
  with pytest.raises(ValueError, match=words):
    torch_zip.read_views(path)


def test_tensors_do_not_reach_beyond_their_bytes(tmp_path):
  path = rewritten(
    tmp_path / "a.bin",
    lambda name, x: x[:-4] if name.startswith("data/0") else x,
  )
  with pytest.raises(ValueError, match="reaches beyond its bytes"):
    torch_zip.read_views(path)
  path = rewritten(
    tmp_path / "b.bin",
    lambda name, x: None if name.startswith("data/0") else x,
  )
  with pytest.raises(ValueError, match="missing or compressed"):
    torch_zip.read_views(path)


def test_negative_strides_and_offsets_are_refused(tmp_path):
  with zipfile.ZipFile(STORED) as archive:
    name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
    content = archive.read(name)
  # The strides of `plain`, (5, 1), as they are written: a tuple of two bytes.
  strides = b"K\x05K\x01\x86"
  assert strides in content
  # -1 takes four bytes more as a signed integer.
  changed = content.replace(strides, b"J\xff\xff\xff\xffK\x01\x86", 1)
  with pytest.raises(ValueError, match="reaches beyond its bytes"):
    torch_zip.read_views(with_pickle(tmp_path / "a.bin", changed))
  changed = content.replace(strides, b"K\x7fK\x01\x86", 1)
  with pytest.raises(ValueError, match="reaches beyond its bytes"):
    torch_zip.read_views(with_pickle(tmp_path / "b.bin", changed))


def test_other_files_are_refused(tmp_path):
  path = tmp_path / "a.bin"
  path.write_bytes(b"\x80\x02.")
  with pytest.raises(ValueError, match="not a zip archive"):
    torch_zip.read_views(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.txt", "x")
  with pytest.raises(ValueError, match=r"0 data\.pkl"):
    torch_zip.read_views(path)
  path = rewritten(path, lambda n, x: b"big" if n == "byteorder" else x)
  with pytest.raises(ValueError, match="big-endian"):
    torch_zip.read_views(path)


def test_a_decoder_of_pytorch_files_is_that_of_safetensors(tmp_path):
  torch = pytest.importorskip("torch")
  name = tiny_llama.FOLDERS[0]
  stored = torch_files.read(tiny_llama.GOLDEN / name).tensors
  state = {key: torch.from_numpy(x) for key, x in stored.items()}
  torch.save(state, tmp_path / "pytorch_model.bin")
  mesh = sharding.make_mesh(tensor=2)
  params = llama_weights.read_params(
    weight_files.open_weights(tmp_path), tiny_llama.stored(name), mesh
  )
  jax.tree.map(
    np.testing.assert_array_equal, params, tiny_llama.stored_params(name)
  )
