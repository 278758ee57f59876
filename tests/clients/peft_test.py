"""Adapters and merged decoders, in the packages that people load them with."""

import numpy as np
import pytest

from audiomosaic_jax import weight_files
from audiomosaic_jax.language import llama_weights, peft_adapters
from audiomosaic_jax.models import lora
from tests import tiny_llama

pytestmark = pytest.mark.slow
BASE = "llama_tiny"
ATOL = 2e-4


@pytest.fixture(scope="module")
def ours():
  """Returns a decoder with adapters that do something, and its parameters."""
  model = tiny_llama.stored(
    BASE,
    lora_rank=4,
    lora_alpha=8.0,
    lora_targets=("q_proj", "v_proj", "down_proj"),
  )
  drawn = lora.split(tiny_llama.random_params(model))[0]
  return model, lora.join(drawn, tiny_llama.stored_params(BASE))


@pytest.fixture(scope="module")
def logits(ours):
  """Returns ids and what we make of them."""
  model, params = ours
  ids = np.random.default_rng(0).integers(0, 128, (2, 9)).astype(np.int32)
  found = tiny_llama.logits_of(model, params, ids, ids >= 0)
  plain = tiny_llama.logits_of(
    tiny_llama.stored(BASE), tiny_llama.stored_params(BASE), ids, ids >= 0
  )
  assert np.abs(np.asarray(found) - np.asarray(plain)).max() > 0.1
  return ids, np.asarray(found)


def computed(network, ids):
  import torch

  with torch.no_grad():
    return network.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def test_peft_computes_and_returns_the_adapter(ours, logits, tmp_path, verdict):
  import peft
  import transformers

  model, params = ours
  adapters, _ = lora.split(params)
  peft_adapters.write_adapter(adapters, model, BASE, tmp_path / "adapter")
  base = transformers.AutoModelForCausalLM.from_pretrained(
    tiny_llama.GOLDEN / BASE
  )
  network = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
  ids, wanted = logits
  found = computed(network, ids)
  np.testing.assert_allclose(found, wanted, atol=ATOL)
  network.save_pretrained(tmp_path / "again")
  attributes = peft_adapters.read_settings(tmp_path / "again")
  again = peft_adapters.from_tensors(
    peft_adapters.open_adapter(tmp_path / "again"),
    tiny_llama.stored(BASE, **attributes),
  )
  expected = peft_adapters.to_tensors(adapters)
  returned = peft_adapters.to_tensors(again)
  assert set(returned) == set(expected)
  for name, tensor in expected.items():
    np.testing.assert_array_equal(returned[name], tensor)
  difference = np.abs(found - wanted).max()
  verdict("peft", "load, compute, save, read back", f"{difference:.1e}")


def test_transformers_computes_the_merged_decoder(
  ours, logits, tmp_path, verdict
):
  import transformers

  model, params = ours
  folder = tmp_path / "merged"
  llama_weights.write_folder(
    lora.merge(params, alpha=model.lora_alpha),
    llama_weights.read_settings(tiny_llama.GOLDEN / BASE),
    folder,
    shard_bytes=100_000,
  )
  assert len(list(folder.glob("*.safetensors"))) > 1
  assert "lm_head.weight" in weight_files.open_weights(folder)
  network = transformers.AutoModelForCausalLM.from_pretrained(folder)
  ids, wanted = logits
  found = computed(network, ids)
  np.testing.assert_allclose(found, wanted, atol=ATOL)
  difference = np.abs(found - wanted).max()
  verdict("transformers", "merged folder in shards", f"{difference:.1e}")
