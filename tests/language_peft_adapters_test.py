"""Adapters of PEFT are read whole, written alike, and refused if other."""

import json

import jax
import numpy as np
import pytest

from audiomosaic_jax import weight_files
from audiomosaic_jax.language import peft_adapters
from tests import tiny_llama
from tests.models_lora_test import stored

FOLDERS = pytest.mark.parametrize("name", tiny_llama.FOLDERS)
FILE = peft_adapters.WEIGHTS_FILES[0]


def in_memory(tensors):
  return {
    name: weight_files.Tensor(x.shape, x.__getitem__)
    for name, x in tensors.items()
  }


@FOLDERS
def test_an_adapter_read_and_written_is_the_same_file(tmp_path, name):
  model, adapters = stored(name)
  theirs = tiny_llama.GOLDEN / name / "peft_adapter"
  peft_adapters.write_adapter(adapters, model, "base", tmp_path / "a")
  assert (tmp_path / "a" / FILE).read_bytes() == (theirs / FILE).read_bytes()
  assert peft_adapters.read_settings(
    tmp_path / "a"
  ) == peft_adapters.read_settings(theirs)
  described = json.loads((theirs / peft_adapters.CONFIG_FILE).read_text())
  written = json.loads((tmp_path / "a" / peft_adapters.CONFIG_FILE).read_text())
  note = "base_model_name_or_path"
  assert written.pop(note) == "base"
  assert {key: described[key] for key in written} == written


def test_names_may_lack_the_prefix_and_carry_the_adapters_name():
  name = tiny_llama.FOLDERS[0]
  model, adapters = stored(name)
  tensors = {
    key.removeprefix(peft_adapters.PREFIX).replace(
      ".weight", ".default.weight"
    ): x
    for key, x in peft_adapters.to_tensors(adapters).items()
  }
  tensors["model.audio_proj.1.weight"] = np.zeros((2, 2), np.float32)
  read = peft_adapters.from_tensors(in_memory(tensors), model)
  jax.tree.map(np.testing.assert_array_equal, read, adapters)


def test_tensors_that_are_missing_or_too_many_are_named():
  model, adapters = stored(tiny_llama.FOLDERS[0])
  tensors = peft_adapters.to_tensors(adapters)
  gone = sorted(tensors)[3]
  fewer = in_memory({key: x for key, x in tensors.items() if key != gone})
  plain = gone.removeprefix(peft_adapters.PREFIX)
  with pytest.raises(ValueError, match=f"{plain}, missing"):
    peft_adapters.from_tensors(fewer, model)
  more = {**tensors, gone.replace("layers.0", "layers.00"): tensors[gone]}
  with pytest.raises(ValueError, match=r"layers\.00.*not of this model"):
    peft_adapters.from_tensors(in_memory(more), model)


def test_an_adapter_of_another_rank_is_refused_with_both_shapes():
  name = tiny_llama.FOLDERS[0]
  _, adapters = stored(name)
  other = tiny_llama.stored(name, lora_rank=2)
  tensors = in_memory(peft_adapters.to_tensors(adapters))
  with pytest.raises(ValueError, match=r"\(4, 64\), wanted \(2, 64\)"):
    peft_adapters.from_tensors(tensors, other)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
    ({"use_dora": True}, "use_dora True"),
    ({"use_rslora": True}, "use_rslora True"),
    ({"bias": "all"}, "bias 'all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"target_modules": ["lm_head"]}, r"target_modules \['lm_head'\]"),
    ({"target_modules": ".*_proj"}, "target_modules"),
  ],
)
def test_other_adapters_are_refused_by_name(tmp_path, change, words):
  theirs = tiny_llama.GOLDEN / tiny_llama.FOLDERS[0] / "peft_adapter"
  settings = json.loads((theirs / peft_adapters.CONFIG_FILE).read_text())
  changed = json.dumps({**settings, **change})
  (tmp_path / peft_adapters.CONFIG_FILE).write_text(changed)
  with pytest.raises(ValueError, match=words):
    peft_adapters.read_settings(tmp_path)


def test_a_folder_without_an_adapter_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
    peft_adapters.read_settings(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
    peft_adapters.open_adapter(tmp_path)
