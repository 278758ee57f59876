"""Published checkpoints, from files of their kind to the folder of a run.

What imported models compute is tested in import_torch_golden_test.py.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from models_heads_test import state_of

from audiomosaic_jax import (
  checkpoint,
  classifier_setup,
  encoder_probe,
  encoder_source,
  experiment,
  import_torch,
  torch_files,
  torch_params,
)
from audiomosaic_jax.models import positions
from audiomosaic_jax.torch_settings import Choices
from configs import finetune

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Sizes that no published task has, of the small reference models.
STATS = (-4.0, 4.5)
THREE_HEADS = Choices(num_heads=3, statistics=STATS)


def load(name):
  return np.load(GOLDEN / f"{name}.npz")


def params_of(z):
  start = "param/"
  return {k.removeprefix(start): z[k] for k in z.files if k.startswith(start)}


def write_file(state, path, *, prefix="", dtype=None):
  """Writes a checkpoint as PyTorch would; returns its path."""
  tensors = {
    prefix + name: tensor.astype(dtype)
    if dtype and tensor.dtype == np.float32
    else tensor
    for name, tensor in state.items()
  }
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  return path


def imported(state, tmp_path, choices=THREE_HEADS, **options):
  """Returns (config, variables) as they lie in the folder of an import."""
  path = write_file(state, tmp_path / "model.safetensors")
  folder = tmp_path / "imported"
  import_torch.write(import_torch.read(path, choices, **options), folder)
  return folder, *loaded(folder)


def loaded(folder):
  config = experiment.load_config(folder)
  abstract = import_torch.abstract_variables(config)
  return config, checkpoint.load_params(folder, abstract)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """Returns (folder, config, variables) of the small pretraining run."""
  return imported(
    params_of(load("pretrain")), tmp_path_factory.mktemp("pretrained")
  )


def report_of(folder):
  return json.loads((folder / "import_report.json").read_text())


@pytest.mark.parametrize("case", ["pretrain", "aasist"])
@pytest.mark.parametrize(
  ("prefix", "dtype"), [("", None), ("module._orig_mod.", None), ("", "half")]
)
def test_the_export_of_a_folder_has_every_byte_of_the_file(
  case, prefix, dtype, tmp_path
):
  z = load("heads" if case == "aasist" else case)
  state = state_of(z, case) if case == "aasist" else params_of(z)
  path = write_file(
    state, tmp_path / "a.safetensors", prefix=prefix, dtype=dtype
  )
  folder = tmp_path / "imported"
  import_torch.write(import_torch.read(path, THREE_HEADS), folder)
  import_torch.export_folder(folder, tmp_path / "b.safetensors")
  assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_variables_are_exported_with_what_was_ignored(tmp_path):
  state = params_of(load("pretrain"))
  path = write_file(state, tmp_path / "a.safetensors")
  found = import_torch.read(path, THREE_HEADS)
  assert sorted(found.ignored) == [
    "projector.1.num_batches_tracked",
    "projector.4.num_batches_tracked",
  ]
  import_torch.export_safetensors(
    found.variables, found.ignored, tmp_path / "b.safetensors"
  )
  assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32_and_the_report_says_so(dtype, tmp_path):
  state = params_of(load("pretrain"))
  dtype = jnp.dtype(dtype)
  path = write_file(state, tmp_path / "a.safetensors", dtype=dtype)
  found = import_torch.read(path, THREE_HEADS)
  leaves = jax.tree.leaves(found.variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
  np.testing.assert_array_equal(
    found.variables["params"]["encoder"]["cls_token"],
    state["cls_token"].astype(dtype).astype(np.float32),
  )
  import_torch.write(found, tmp_path / "imported")
  text = (tmp_path / "imported" / "import_report.md").read_text()
  assert f"| {dtype} | loaded: params/encoder/cls_token, as float32 |" in text


def test_the_report_accounts_for_every_tensor(pretrained):
  folder, config, variables = pretrained
  state = params_of(load("pretrain"))
  report = report_of(folder)
  rows = {row["name"]: row for row in report["tensors"]}
  assert set(rows) == set(state)
  for name, row in rows.items():
    counter = name.endswith("num_batches_tracked")
    assert row["action"] == ("ignored" if counter else "loaded")
    assert row["shape"] == list(state[name].shape)
  assert rows["blocks.1.mlp.fc1.bias"]["to"] == (
    "params/encoder/blocks/mlp/fc1/bias"
  )
  text = (folder / "import_report.md").read_text()
  for name in state:
    assert f"| {name} |" in text
  for words in ("num_heads = 3: chosen", "(2 std)", "preprocess()"):
    assert words in text
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  assert report["num_parameters"] == count
  assert config.normalization == report["normalization"]
  assert report["files"][0]["sha256"] in text


def change(**tensors):
  return lambda state: {
    name: tensor
    for name, tensor in (state | tensors).items()
    if tensor is not None
  }


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (
      change(**{"blocks.1.mlp.fc2.bias": None}),
      r"1 tensors that the model needs.*blocks\.1\.mlp\.fc2\.bias",
    ),
    (
      change(**{"blocks.1.ls1.gamma": np.ones(48, np.float32)}),
      r"1 tensors of the checkpoint have no place.*blocks\.1\.ls1\.gamma",
    ),
    (
      change(**{"blocks.1.norm1.weight": np.ones(47, np.float32)}),
      r"blocks\.1\.norm1\.weight.*\(47,\).*\(48,\)",
    ),
    (
      change(cls_token=np.zeros((1, 1, 48))),
      r"cls_token.*float64.*float32.*convert",
    ),
    (
      change(**{"fc_norm.bias": np.full(48, np.nan, np.float32)}),
      r"fc_norm\.bias holds NaN",
    ),
    (
      change(**{"module.cls_token": np.zeros((1, 1, 48), np.float32)}),
      r"cls_token.*two models",
    ),
  ],
)
def test_what_does_not_fit_is_refused_by_name(edit, message, tmp_path):
  state = edit(params_of(load("pretrain")))
  path = write_file(state, tmp_path / "a.safetensors")
  with pytest.raises(ValueError, match=message):
    import_torch.read(path, THREE_HEADS)


def test_norms_that_aasist_never_trains_are_ignored_by_name(tmp_path):
  state = state_of(load("heads"), "aasist")
  folder, _, _ = imported(state, tmp_path)
  ignored = torch_files.read_tensors(folder / "ignored.safetensors")
  rows = report_of(folder)["tensors"]
  assert {r["name"] for r in rows if r["action"] == "ignored"} == set(ignored)
  assert {"fc_norm.weight", "encoder.1.0.bn1.weight"} <= set(ignored)
  for name, tensor in ignored.items():
    assert tensor.tobytes() == state[name].tobytes()


def test_a_folder_of_the_hub_needs_no_flags(tmp_path):
  z = load("heads")
  described = json.loads(str(z["probe_layer/cfg_json"]))
  settings = described | {
    "model_class": "AudioMosaicLayerProbe",
    "audio_preprocessing": {
      "target_length": 128,
      "num_mel_bins": 128,
      "norm_mean": -6.0,
      "norm_std": 5.0,
      "sample_rate": 16000,
      "frame_shift": 10.0,
    },
  }
  (tmp_path / "config.json").write_text(json.dumps(settings))
  state = state_of(z, "probe_layer")
  names = sorted(state)
  files = {
    "model-1.safetensors": names[::2],
    "model-2.safetensors": names[1::2],
  }
  for file, inside in files.items():
    write_file({name: state[name] for name in inside}, tmp_path / file)
  weight_map = {n: file for file, inside in files.items() for n in inside}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  found = import_torch.read(tmp_path)
  model = found.config.model
  assert (model.head, model.layer) == ("layer", described["probe_layer"])
  assert model.encoder.num_heads == described["num_heads"]
  assert found.config.spectrogram.to_dict() == {
    "num_frames": 128,
    "mean": -6.0,
    "std": 5.0,
  }
  assert torch_params.to_torch(found.variables, ignored={}).keys() == set(names)


def test_positions_are_resized_and_the_export_has_the_old_ones(tmp_path):
  state = params_of(load("pretrain"))
  folder, config, variables = imported(state, tmp_path, num_frames=128)
  assert experiment.token_grid(config) == (8, 8)
  assert config.data.pipeline.clip_samples == 16_000
  expected = positions.resize_positions(
    state["pos_embed"], (16, 8), (8, 8), layout="paper", method="bilinear"
  )
  np.testing.assert_array_equal(
    variables["params"]["encoder"]["pos_embed"], expected
  )
  rows = report_of(folder)["tensors"]
  assert [r["name"] for r in rows if r["action"] == "resized"] == ["pos_embed"]
  import_torch.export_folder(folder, tmp_path / "b.safetensors")
  one, two = tmp_path / "model.safetensors", tmp_path / "b.safetensors"
  assert one.read_bytes() == two.read_bytes()


def test_fine_tuning_takes_the_encoder_of_an_imported_run(pretrained):
  folder, _, variables = pretrained
  config = finetune.get_config("dataset=task")
  config.init.run = str(folder)
  run = encoder_source.find_run(config.init.run)
  lines = encoder_source.complete(config, run)
  assert config.spectrogram.to_dict() == {
    "num_frames": 256,
    "mean": STATS[0],
    "std": STATS[1],
  }
  assert config.model.encoder.pos_layout == "released"
  assert any("model.encoder.width=48 (from" in line for line in lines)
  assert config.init.states[0].startswith("0@")
  model = classifier_setup.build_model(config, 3)
  start = classifier_setup.start_variables(model, config, run, 0)["params"]
  for name in ("encoder", "fc_norm"):
    jax.tree.map(
      np.testing.assert_array_equal, start[name], variables["params"][name]
    )


def test_the_encoder_of_a_classifier_can_be_fine_tuned_again(tmp_path):
  state = state_of(load("heads"), "classifier_avg")
  choices = Choices(num_heads=3, head="none")
  folder, imported_config, variables = imported(state, tmp_path, choices)
  assert imported_config.spectrogram.mean == -6.845978
  config = finetune.get_config("dataset=task")
  config.init.run = str(folder)
  run = encoder_source.find_run(config.init.run)
  encoder_source.complete(config, run)
  model = classifier_setup.build_model(config, 3)
  start = classifier_setup.start_variables(model, config, run, 0)["params"]
  for name in ("encoder", "fc_norm"):
    jax.tree.map(
      np.testing.assert_array_equal, start[name], variables["params"][name]
    )
  assert start["head"]["kernel"].shape == (48, 3)
  import_torch.export_folder(folder, tmp_path / "b.safetensors")
  back = torch_files.read_tensors(tmp_path / "b.safetensors")
  assert back["head.weight"].tobytes() == state["head.weight"].tobytes()


def test_the_quick_probes_read_an_imported_run(pretrained):
  folder, config, variables = pretrained
  read = encoder_probe.load_variables(config, folder)
  jax.tree.map(np.testing.assert_array_equal, read, variables)


def test_nothing_is_written_over_and_nothing_left_half_done(tmp_path):
  path = write_file(params_of(load("pretrain")), tmp_path / "a.safetensors")
  found = import_torch.read(path, THREE_HEADS)
  output = tmp_path / "out"
  output.mkdir()
  (output / "note.txt").write_text("mine")
  with pytest.raises(ValueError, match="out exists; give a new folder"):
    import_torch.write(found, output)
  assert [p.name for p in output.iterdir()] == ["note.txt"]
  (output / "note.txt").unlink()
  # What cannot be described fails after the parameters were written.
  found.report["notes"] = {1}
  with pytest.raises(TypeError):
    import_torch.write(found, output)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "out"]
  found.report["notes"] = []
  import_torch.write(found, output)
  assert sorted(p.name for p in output.iterdir()) == [
    "checkpoints",
    "config.json",
    "ignored.safetensors",
    "import_report.json",
    "import_report.md",
  ]


def test_a_state_dict_of_pytorch_is_imported_like_its_safetensors(tmp_path):
  torch = pytest.importorskip("torch")
  state = params_of(load("pretrain"))
  path = write_file(state, tmp_path / "a.safetensors")
  wrapped = {
    f"module.{name}": torch.tensor(tensor) for name, tensor in state.items()
  }
  torch.save({"model": wrapped, "epoch": 400}, tmp_path / "a.pth")
  one = import_torch.read(path, THREE_HEADS)
  two = import_torch.read(tmp_path / "a.pth", THREE_HEADS)
  assert one.config.to_dict() == two.config.to_dict()
  jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)


@pytest.mark.slow
def test_a_checkpoint_of_full_size_is_imported(tmp_path):
  published = json.loads((GOLDEN / "import_shapes.json").read_text())
  rng = np.random.default_rng(0)
  state = {
    name: np.asarray(rng.random(t["shape"]) + 0.5, t["dtype"])
    for name, t in published["pretrain"]["state_dict"].items()
  }
  folder, config, variables = imported(state, tmp_path, Choices())
  assert report_of(folder)["num_parameters"] == 86_111_232
  assert config.model.encoder.num_heads == 12
  blocks = variables["params"]["encoder"]["blocks"]
  np.testing.assert_array_equal(
    blocks["attn"]["qkv"]["kernel"][7], state["blocks.7.attn.qkv.weight"].T
  )
  import_torch.export_folder(folder, tmp_path / "b.safetensors")
  one, two = tmp_path / "model.safetensors", tmp_path / "b.safetensors"
  assert one.read_bytes() == two.read_bytes()
