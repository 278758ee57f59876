"""Runs an exported encoder in its own runtime, as a program elsewhere would.

  python -P export_run.py FORMAT FILE CLIPS.npz OUTPUTS.npz

A script of its own, which imports nothing but the runtime: what it computes,
the file can do without this project. (`params` and `safetensors` hold no
program; for them it is the Vision Transformer of this project, as in
examples/use_params.py.)
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

import numpy as np


def run_stablehlo(path, clips):
  """Needs jax and flatbuffers."""
  import jax
  from jax import export

  program = export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
  encoder = jax.jit(program.call)
  return [encoder(waveform) for waveform in clips]


def run_onnx(path, clips):
  """Needs onnxruntime."""
  import onnxruntime

  # What the optimiser removes is no concern of who runs the file.
  onnxruntime.set_default_logger_severity(3)
  session = onnxruntime.InferenceSession(
    str(path), providers=["CPUExecutionProvider"]
  )
  names = [output.name for output in session.get_outputs()]
  rows = [session.run(names, {"waveform": waveform}) for waveform in clips]
  return [dict(zip(names, row, strict=True)) for row in rows]


def run_savedmodel(path, clips):
  """Needs tensorflow."""
  import tensorflow as tf

  loaded = tf.saved_model.load(str(path))
  encoder = loaded.signatures["serving_default"]
  return [encoder(waveform=tf.constant(waveform)) for waveform in clips]


def run_tflite(path, clips):
  """Needs ai_edge_litert."""
  from ai_edge_litert.interpreter import Interpreter

  interpreter = Interpreter(model_path=str(path))
  encoder = interpreter.get_signature_runner()
  outputs = []
  for waveform in clips:  # It takes one clip at a time.
    rows = [encoder(waveform=row[None]) for row in waveform]
    outputs.append({k: np.concatenate([r[k] for r in rows]) for k in rows[0]})
  return outputs


def run_params(path, clips):
  """Needs this project: models.vit, and features for the spectrogram."""
  config = json.loads(pathlib.Path(path).with_name("config.json").read_text())
  return embed_clips(config, dict(np.load(path)), clips)


def run_safetensors(path, clips):
  """Needs safetensors and this project, as `run_params`."""
  import safetensors.numpy

  config = json.loads(pathlib.Path(path).with_name("config.json").read_text())
  tensors = safetensors.numpy.load(pathlib.Path(path).read_bytes())
  return embed_clips(config, tensors, clips)


def embed_clips(config, flat, clips):
  """Returns the outputs of batches of clips; flat holds tensors by name."""
  import jax
  from flax import traverse_util

  run = jax.jit(functools.partial(embed, config))
  params = traverse_util.unflatten_dict(flat, sep="/")["params"]
  outputs = []
  for waveform in clips:
    rows = [run(params, row) for row in waveform]
    embedding, frames = map(np.stack, zip(*rows, strict=True))
    outputs.append({"embedding": embedding, "frames": frames})
  return outputs


def embed(config, params, waveform):
  """Returns the embedding [D] and the frames [T, D] of a clip [S]."""
  import jax.numpy as jnp

  from audiomosaic_jax import features
  from audiomosaic_jax.models.layers import NORMS
  from audiomosaic_jax.models.vit import ViT

  vit = ViT(**config["encoder"])
  columns, bands = vit.grid
  fbank = features.log_mel_fbank(waveform, **config["fbank"])
  embeddings, frames = [], []
  for start in range(0, len(fbank), columns * vit.patch_size):
    window = fbank[start : start + columns * vit.patch_size]
    x = features.standardize(window, **config["spectrogram"])
    # Columns without a frame of the clip are seen by no token.
    count = -(-len(window) // vit.patch_size)
    valid = jnp.arange(columns * bands)[None] < count * bands
    tokens = vit.apply(
      {"params": params["encoder"]}, x[None], None, train=False, valid=valid
    )[0]
    first = int(vit.class_token)
    patches = tokens[first : first + count * bands]
    pooled = {
      "mean": tokens[: first + count * bands].mean(axis=0),
      "mean_no_cls": patches.mean(axis=0),
      "cls": tokens[0],
      "fusion": jnp.concatenate([tokens[0], patches.mean(axis=0)]),
    }[config["pooling"]]
    rows = patches.reshape(count, bands, -1).mean(axis=1)
    if config["use_fc_norm"]:
      norm = NORMS[vit.norm](dtype="float32")
      pooled = norm.apply({"params": params["fc_norm"]}, pooled)
      if config["pooling"] != "fusion":  # Its norm has twice as many channels.
        rows = norm.apply({"params": params["fc_norm"]}, rows)
    embeddings += count * [pooled]  # As often as it has columns.
    frames.append(rows)
  return jnp.stack(embeddings).mean(axis=0), jnp.concatenate(frames)


def main(name, path, clips, outputs):
  """Computes the outputs of all clips and notes what computed them."""
  for module in FORBIDDEN[name]:
    sys.modules[module] = None  # Importing it raises ImportError.
  with np.load(clips) as stored:
    waveforms = [stored[key] for key in stored.files]
  found = RUNTIMES[name](path, waveforms)
  arrays = {
    f"{output}/{i}": np.asarray(row[output])
    for i, row in enumerate(found)
    for output in row
  }
  np.savez(outputs, versions=json.dumps(imported_versions()), **arrays)


def imported_versions():
  """Returns the versions of Python and of those of PACKAGES in memory."""
  versions = {"python": platform.python_version()}
  for name in PACKAGES:
    if module := sys.modules.get(name):
      own = getattr(module, "__version__", None)
      versions[name] = own or importlib.metadata.version(name)
  return versions


# What is worth noting when it was imported.
PACKAGES = (
  *("ai_edge_litert", "audiomosaic_jax", "flatbuffers", "flax", "jax"),
  *("numpy", "onnxruntime", "safetensors", "tensorflow"),
)

RUNTIMES = {
  "params": run_params,
  "safetensors": run_safetensors,
  "stablehlo": run_stablehlo,
  "onnx": run_onnx,
  "savedmodel": run_savedmodel,
  "tflite": run_tflite,
}

# What a format promises to do without, though some runtimes import it when
# they find it.
FORBIDDEN = {
  "params": ("tensorflow",),
  "safetensors": ("tensorflow",),
  "stablehlo": ("audiomosaic_jax", "flax", "tensorflow"),
  "onnx": ("audiomosaic_jax", "flax", "jax", "tensorflow"),
  "savedmodel": ("audiomosaic_jax", "flax", "jax"),
  "tflite": ("audiomosaic_jax", "flax", "jax", "tensorflow"),
}

if __name__ == "__main__":
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  main(*sys.argv[1:])
