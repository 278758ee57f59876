"""Exported encoders say what the encoder says, each in its own runtime."""

import dataclasses
import functools
import json
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import tiny_encoder as tiny
import tiny_supervised
from export_program_test import (
  assert_close_to,
  make_encoder,
  place,
  recordings,
)
from jax import export as jax_export

from audiomosaic_jax import (
  checkpoint,
  classifier_setup,
  encoder_source,
  experiment,
  export,
  export_card,
  export_formats,
  export_parity,
  export_program,
  export_run,
)

RATE_HZ = tiny.RATE_HZ
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "use_params.py"
to_folder = functools.partial(
  export.export_encoder, length_s=None, licence=None, training_data=None
)


@pytest.fixture(scope="module")
def encoder():
  return make_encoder()


@pytest.fixture(scope="module")
def other():
  return make_encoder(seed=1)


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
  """(folder, entries) of the formats that need no other runtime."""
  pytest.importorskip("flatbuffers")
  folder = tmp_path_factory.mktemp("exported")
  names = ("params", "safetensors", "stablehlo")
  return folder, to_folder(encoder, folder, export_formats.choose(names))


def test_files_say_what_the_encoder_says_in_a_process_of_their_own(exported):
  _, entries = exported
  for entry in entries.values():
    assert entry["passed"] and entry["clips"] == 6
    assert len(entry["lengths"]) == 3
    assert 0 < max(entry["max_abs_difference"].values()) < 2e-5
  assert entries["stablehlo"]["runtime"].keys() == {
    *("python", "flatbuffers", "jax", "numpy")
  }


def test_tensors_are_those_of_the_encoder_bit_for_bit(encoder, exported):
  import safetensors.numpy

  folder, _ = exported
  expected = export_formats.flat_variables(encoder)
  found = safetensors.numpy.load_file(folder / "encoder.safetensors")
  with np.load(folder / "params.npz") as stored:
    for tensors in (found, dict(stored)):
      assert tensors.keys() == expected.keys()
      for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_one_program_is_for_all_platforms_and_refuses_less_than_a_frame(
  encoder, exported
):
  file = exported[0] / "encoder.stablehlo"
  program = jax_export.deserialize(bytearray(file.read_bytes()))
  assert program.platforms == ("cpu", "cuda", "tpu")
  clips = np.concatenate([recordings(400)] * 3)
  assert_close_to(encoder, program.call(clips), clips, 5e-6)
  with pytest.raises(ValueError, match=r"shapes|s >= 400"):
    program.call(clips[:, :399])


def test_the_card_names_what_a_user_must_know(encoder, exported):
  folder, entries = exported
  text = (folder / "model_card.md").read_text()
  spectrogram = encoder.config.spectrogram
  for words in (
    f"mean = {spectrogram.mean}, std = {spectrogram.std}",
    "(fbank - mean) / (2 std)",
    "Licence of the weights: not stated",
    "recordings that come with AudioMosaic-JAX",
    "float32 [B, 32]",
    "`encoder.stablehlo`",
    "export.deserialize",
    '"weight_decay"',
  ):
    assert words in text
  parity = json.loads((folder / "parity.json").read_text())
  assert parity["formats"] == entries
  assert "stablehlo" in (folder / "parity.md").read_text()


def test_no_folder_of_the_machine_is_told():
  tree = {"a": ("/data/audioset", "C:\\data\\x", "b/c"), "d": {"e": 1}}
  assert export_card.without_folders(tree) == {
    "a": ["audioset", "x", "b/c"],
    "d": {"e": 1},
  }


@pytest.mark.parametrize("kind", ["other weights", "NaN"])
def test_a_file_that_says_something_else_fails(encoder, other, kind, tmp_path):
  if kind == "NaN":
    variables = jax.tree.map(lambda x: x * np.float32("nan"), other.variables)
    other = place(encoder.config, variables)
  form = export_formats.FORMATS["params"]
  wrong = dataclasses.replace(
    form, write=lambda _, path, samples: form.write(other, path, samples)
  )
  with pytest.raises(RuntimeError, match=r"parity is missed.*params"):
    to_folder(encoder, tmp_path, [wrong])
  assert (tmp_path / "params.npz.unverified").exists()
  assert not (tmp_path / "params.npz").exists()
  stored = json.loads((tmp_path / "parity.json").read_text())
  assert not stored["formats"]["params"]["passed"]
  assert "NO" in (tmp_path / "parity.md").read_text()
  assert "**not accepted**" in (tmp_path / "model_card.md").read_text()


def test_a_file_that_does_not_run_is_an_error_and_can_be_tried_again(
  encoder, other, tmp_path
):
  params = export_formats.FORMATS["params"]
  form = dataclasses.replace(
    params,
    write=lambda _, path, samples: path.write_bytes(b"no archive"),
  )
  with pytest.raises(RuntimeError, match=r"params.npz.unverified does not run"):
    to_folder(encoder, tmp_path, [form])
  with pytest.raises(ValueError, match="holds an export of encoder"):
    to_folder(other, tmp_path, [params])
  assert to_folder(encoder, tmp_path, [params])["params"]["passed"]


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_the_card_has_logits_if_the_program_has(head):
  config = tiny_supervised.fine_tuning(argument=f"dataset=task,head={head}")
  encoder_source.complete(config, None)
  model = classifier_setup.build_model(config, 3)
  variables = classifier_setup.start_variables(model, config, None, 0)
  classifier = place(config, jax.device_get(variables), ("a", "b", "c"))
  card = export_card.card(classifier, {}, licence="", training_data="")
  assert ("`logits` | float32 [B, 3]" in card) == (head == "linear")
  outputs = export_program.output_names(classifier)
  assert ("logits" in outputs) == (head == "linear")


def test_formats_are_added_and_another_encoder_is_refused(
  encoder, other, exported
):
  folder, entries = exported
  again = export_formats.choose(["params"])
  added = to_folder(encoder, folder, again)
  assert list(added) == list(entries)
  with pytest.raises(ValueError, match="holds an export of encoder"):
    to_folder(other, folder, again)


def test_what_cannot_be_exported_is_told_before_anything_is_written(
  encoder, tmp_path
):
  output, params = tmp_path / "out", export_formats.choose(["params"])
  half = place(encoder.config, encoder.variables, dtype="bfloat16")
  with pytest.raises(ValueError, match=r'bfloat16.*dtype="float32"'):
    to_folder(half, output, params)
  with pytest.raises(ValueError, match=r"320 samples.*at least 0.025"):
    to_folder(encoder, output, params, length_s=0.02)
  assert not output.exists()
  config = tmp_path / "config.json"
  config.write_text("{}")
  with pytest.raises(ValueError, match=r"is no export; give another"):
    to_folder(encoder, tmp_path, params)
  assert config.read_text() == "{}"
  with pytest.raises(ValueError, match=r"caffe is unknown; choose from params"):
    export_formats.choose(["params", "caffe"])
  with pytest.raises(ValueError, match="unknown"):
    export_formats.choose([])
  lacking = dataclasses.replace(
    export_formats.FORMATS["onnx"], packages=("onnx_of_tomorrow",)
  )
  with pytest.raises(
    ImportError, match=r"of_tomorrow.*audiomosaic-jax\[export"
  ):
    export_formats.check_installed(lacking)


def test_every_format_has_a_runtime():
  assert export_run.RUNTIMES.keys() == export_formats.FORMATS.keys()
  assert export_run.FORBIDDEN.keys() == export_formats.FORMATS.keys()


def test_the_command_exports_a_run_and_the_example_reads_it(encoder, tmp_path):
  run, output = tmp_path / "run", tmp_path / "out"
  experiment.save_config(encoder.config, run)
  with checkpoint.Checkpointer(
    run / "checkpoints", keep_last=1, keep_every=0
  ) as saved:
    state = jax.tree.map(jnp.asarray, encoder.variables)
    saved.save(1, state, {})
  command = [sys.executable, "-m", "audiomosaic_jax.export"]
  command += [f"--encoder={run}", f"--output={output}", "--format=params"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "params: params.npz" in done.stdout
  clip, embedding = tmp_path / "clip.wav", tmp_path / "embedding.npy"
  samples = recordings(50_000)[0]
  soundfile.write(clip, samples, RATE_HZ, subtype="FLOAT")
  example = [sys.executable, EXAMPLE, output, clip, embedding]
  subprocess.run(example, check=True)
  expected = encoder.embed(samples, RATE_HZ).embedding
  np.testing.assert_allclose(np.load(embedding), expected, atol=2e-5)


@pytest.mark.parametrize("pooling", ["cls", "fusion"])
def test_the_example_pools_as_the_encoder_does(pooling):
  encoder = make_encoder(**{"model.pooling": pooling})
  embed = runpy.run_path(str(EXAMPLE))["embed"]
  config = export_card.config_of(encoder)
  [samples] = recordings(30_000)[:1]
  found = jax.jit(lambda x: embed(config, encoder.variables["params"], x))(
    samples
  )
  expected = encoder.embed(samples, RATE_HZ).embedding
  np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("length_s", "width"), [(None, 32), (0.4, 32), (3.0, 512)]
)
def test_onnx_says_what_the_encoder_says(length_s, width, tmp_path):
  onnx = pytest.importorskip("onnx")
  pytest.importorskip("jax2onnx")
  encoder = make_encoder(**{"model.encoder.width": width})
  formats = export_formats.choose(["onnx"])
  entry = to_folder(encoder, tmp_path, formats, length_s=length_s)["onnx"]
  assert "jax" not in entry["runtime"]
  [file] = tmp_path.glob("encoder*")  # Large tensors are not beside it.
  onnx.checker.check_model(file)
  clips = np.concatenate([recordings(entry["lengths"][0])] * 3)
  # Other batches than that of the parity.
  for some in (clips[:5], clips[:1]):
    [outputs], _ = export_parity.run_elsewhere("onnx", file, [some])
    assert_close_to(encoder, outputs, some, 5e-4)


@pytest.mark.slow
def test_a_savedmodel_says_what_the_encoder_says(encoder, tmp_path):
  pytest.importorskip("tensorflow")
  formats = export_formats.choose(["savedmodel"])
  entry = to_folder(encoder, tmp_path, formats)["savedmodel"]
  assert 0 < max(entry["max_abs_difference"].values()) < 5e-5
  assert entry["clips"] == 6
  assert "jax" not in entry["runtime"] and "tensorflow" in entry["runtime"]


@pytest.mark.slow
@pytest.mark.parametrize("length_s", [None, 0.4, 3.0])
def test_tflite_says_what_the_encoder_says(encoder, length_s, tmp_path):
  pytest.importorskip("tensorflow")
  pytest.importorskip("ai_edge_litert")
  formats = export_formats.choose(["tflite"])
  entry = to_folder(encoder, tmp_path, formats, length_s=length_s)["tflite"]
  assert 0 < entry["max_abs_difference"]["embedding"] < 2e-5
  assert entry["runtime"].keys() == {"python", "ai_edge_litert", "numpy"}
