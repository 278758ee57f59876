import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_audiomosaic_test import FULL_SIZE, build

from audiomosaic_jax import torch_params

GOLDEN = pathlib.Path(__file__).parent / "golden"


def shapes_of(model, fbank_shape):
  return jax.eval_shape(
    lambda key: model.init(key, jnp.zeros(fbank_shape), None, train=False),
    jax.random.key(0),
  )


@pytest.fixture(scope="module")
def checkpoint():
  """The reference names and tensors of the small pretraining run."""
  z = np.load(GOLDEN / "pretrain.npz")
  start = "param/"
  return {k.removeprefix(start): z[k] for k in z.files if k.startswith(start)}


@pytest.fixture(scope="module")
def target():
  model = build(
    grid=(16, 8),
    encoder={"width": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0},
    projector={"hidden_features": 512, "out_features": 32},
  )
  return shapes_of(model, (1, 256, 128))


@pytest.mark.parametrize(
  "prefix", ["", "module.", "_orig_mod.", "module._orig_mod."]
)
def test_round_trip_gives_back_every_byte_under_every_prefix(
  checkpoint, target, prefix
):
  wrapped = {prefix + name: tensor for name, tensor in checkpoint.items()}
  variables, ignored = torch_params.from_torch(wrapped, target, ignore=())
  back = torch_params.to_torch(variables, ignored=ignored)
  assert set(back) == set(checkpoint)
  for name, tensor in checkpoint.items():
    assert back[name].dtype == tensor.dtype
    assert back[name].shape == tensor.shape
    assert back[name].tobytes() == tensor.tobytes()


def test_ignored_tensors_are_named(checkpoint, target):
  head = {"head.weight": np.zeros((3, 48), np.float32)}
  _, ignored = torch_params.from_torch(checkpoint | head, target, ignore=())
  assert sorted(ignored) == [
    "head.weight",
    "projector.1.num_batches_tracked",
    "projector.4.num_batches_tracked",
  ]


def test_filled_variables_have_the_shapes_of_the_model(checkpoint, target):
  variables, _ = torch_params.from_torch(checkpoint, target, ignore=())
  assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
    lambda x: (x.shape, x.dtype), target
  )


def test_blocks_are_stacked_and_matrices_transposed(checkpoint, target):
  variables, _ = torch_params.from_torch(checkpoint, target, ignore=())
  encoder = variables["params"]["encoder"]
  for i in range(2):
    np.testing.assert_array_equal(
      encoder["blocks"]["attn"]["qkv"]["kernel"][i],
      checkpoint[f"blocks.{i}.attn.qkv.weight"].T,
    )
  stats = variables["batch_stats"]["projector"]["norm_0"]
  np.testing.assert_array_equal(
    stats["var"], checkpoint["projector.1.running_var"]
  )


def test_encoder_alone_can_be_imported_if_the_rest_is_ignored(
  checkpoint, target
):
  encoder = {"params": {"encoder": target["params"]["encoder"]}}
  variables, ignored = torch_params.from_torch(
    checkpoint, encoder, ignore=(r"projector\..*", r"fc_norm\..*")
  )
  assert set(variables["params"]) == {"encoder"}
  assert "fc_norm.weight" in ignored


def test_full_size_names_and_shapes_are_those_of_the_published_model():
  published = json.loads((GOLDEN / "import_shapes.json").read_text())
  published = published["pretrain"]
  table = torch_params.rename_table(
    shapes_of(build(**FULL_SIZE), (1, 1024, 128))
  )
  actual = {name: entry.shape for entry in table for name in entry.names}
  tensors = published["state_dict"]
  tensors = (
    {t["name"]: t for t in tensors} if isinstance(tensors, list) else tensors
  )
  expected = {
    name: tuple(tensor["shape"])
    for name, tensor in tensors.items()
    if not name.endswith("num_batches_tracked")
  }
  assert actual == expected
  count = sum(
    len(e.names) * np.prod(e.shape, dtype=int)
    for e in table
    if e.path[0] == "params"
  )
  assert count == published["total_parameters"] == 86_111_232


def change(name, tensor):
  return lambda state: state | {name: tensor}


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (
      change("blocks.1.attn.qkv.weight", np.zeros((144, 47), np.float32)),
      r"blocks\.1\.attn\.qkv\.weight.*blocks/attn/qkv/kernel.*"
      r"\(144, 47\).*\(144, 48\)",
    ),
    (
      change("pos_embed", np.zeros((1, 65, 48), np.float32)),
      r"pos_embed.*\(1, 65, 48\).*\(1, 129, 48\)",
    ),
    (
      change("patch_embed.proj.weight", np.zeros((48, 1, 8, 32), np.float32)),
      r"patch_embed\.proj\.weight.*\(48, 1, 8, 32\).*\(48, 1, 16, 16\)",
    ),
    (
      change("fc_norm.bias", np.zeros(48, np.float16)),
      r"fc_norm\.bias.*float16.*float32.*convert",
    ),
    (
      change("blocks.2.norm1.weight", np.zeros(48, np.float32)),
      r"1 tensors of the checkpoint.*blocks\.2\.norm1\.weight.*ignore",
    ),
    (
      lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc2.bias"},
      r"1 tensors that the model needs.*blocks\.1\.mlp\.fc2\.bias",
    ),
    (
      lambda s: s | {"module.cls_token": s["cls_token"]},
      r"module\.cls_token are both cls_token.*two models",
    ),
  ],
)
def test_anything_that_does_not_fit_is_refused_by_name(
  checkpoint, target, edit, message
):
  with pytest.raises(ValueError, match=message):
    torch_params.from_torch(edit(checkpoint), target, ignore=())


def test_a_leaf_unknown_to_the_table_is_refused_by_name():
  variables = {"params": {"aasist": {"kernel": np.zeros((2, 3))}}}
  with pytest.raises(
    ValueError, match=r"params/aasist/kernel \(2, 3\).*MODULES"
  ):
    torch_params.rename_table(variables)


def test_every_kind_of_module_in_the_table_is_known():
  for _, kind in torch_params.MODULES.values():
    assert kind in torch_params.KINDS
