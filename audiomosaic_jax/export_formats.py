"""The formats that an encoder is exported to, and what each can do.

A tool-chain that cannot take a clip of unknown length gets a fixed one, one
that cannot take a batch gets single clips; `Format` says so, and the model
card repeats it.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from audiomosaic_jax import export_program
from audiomosaic_jax.encoder import Encoder

PLATFORMS = ("cpu", "cuda", "tpu")
# What onnxruntime reads since 1.14; below it sums take their axes otherwise.
ONNX_OPSET = 18
# The formats that hold parameters and no program.
PARAMETERS = ("params", "safetensors")


@dataclasses.dataclass(frozen=True)
class Format:
  """A format and its limits.

  Attributes:
    name: as on the command line.
    file: name of the file or folder that is written.
    write: (encoder, path, samples) writes it; `samples` is the length of a
      clip where that is fixed.
    packages: modules that writing or checking it needs.
    extra: of this package, which installs them.
    tolerance: largest difference from the encoder that is accepted.
    frames_tolerance: the same for frames. They hang on single bands, and far
      below the loudest band the FFT of the encoder itself is off in float32:
      with exact spectrograms its frames are as far away.
    any_length: takes clips of any length.
    any_batch: takes any number of clips at once.
    contents: what the file holds, for the model card.
  """

  name: str
  file: str
  write: Callable[[Encoder, pathlib.Path, int], None]
  packages: tuple[str, ...]
  extra: str
  tolerance: float
  frames_tolerance: float
  any_length: bool
  any_batch: bool
  contents: str


def choose(names: Sequence[str]) -> list[Format]:
  """Returns formats by name, if what they need is installed.

  Raises:
    ValueError: no such format, or none.
    ImportError: a package is missing; the message names the extra.
  """
  unknown = [name for name in names if name not in FORMATS]
  if unknown or not names:
    raise ValueError(
      f"format {', '.join(unknown) or '(none)'} is unknown; choose from "
      f"{', '.join(FORMATS)}"
    )
  chosen = [FORMATS[name] for name in dict.fromkeys(names)]
  for form in chosen:
    check_installed(form)
  return chosen


def check_installed(form: Format) -> None:
  """Raises ImportError if a package that a format needs is missing."""
  missing = [p for p in form.packages if not importlib.util.find_spec(p)]
  if missing:
    raise ImportError(
      f"format {form.name} needs {', '.join(missing)}; install "
      f"audiomosaic-jax[{form.extra}]"
    )


def flat_variables(encoder: Encoder) -> dict[str, np.ndarray]:
  """Returns all parameters and statistics by name, such as
  "params/encoder/pos_embed"."""
  flat = traverse_util.flatten_dict(encoder.variables, sep="/")
  return {name: np.ascontiguousarray(flat[name]) for name in sorted(flat)}


def write_params(encoder: Encoder, path: pathlib.Path, samples: int) -> None:
  """Writes the variables for numpy.load, without pickle."""
  del samples
  with path.open("wb") as file:
    np.savez(file, **flat_variables(encoder))


def write_safetensors(
  encoder: Encoder, path: pathlib.Path, samples: int
) -> None:
  """Writes the variables as tensors under their names."""
  del samples
  import safetensors.numpy

  tensors = flat_variables(encoder)
  path.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "flax"}))


def write_stablehlo(encoder: Encoder, path: pathlib.Path, samples: int) -> None:
  """Writes one program for all platforms, any batch and any length."""
  del samples
  program = export_program.make_program(encoder, export_program.fft_log_mel)
  shape = export.symbolic_shape(
    "b, s", constraints=[f"s >= {encoder.geometry.length}"]
  )
  exported = export.export(jax.jit(program), platforms=PLATFORMS)(
    jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  path.write_bytes(exported.serialize())


def write_onnx(encoder: Encoder, path: pathlib.Path, samples: int) -> None:
  """Writes a graph for any number of clips of one length."""
  import jax2onnx

  program = export_program.make_program(encoder, export_program.conv_log_mel)
  names = export_program.output_names(encoder)

  def outputs(waveform):
    found = program(waveform)
    return [found[name] for name in names]

  shape = export.symbolic_shape(f"b, {samples}")
  waveform = jax.ShapeDtypeStruct(shape, jnp.float32)
  # Traced before jax2onnx replaces functions of jax.numpy with its own, which
  # Flax's scan does not bear.
  traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(outputs)(waveform))
  # They print their progress, and log what does not fit the installed JAX,
  # used or not.
  for name in ("jax2onnx", "onnx_ir"):
    logging.getLogger(name).setLevel(logging.ERROR)
  with contextlib.redirect_stdout(io.StringIO()):
    graph = jax2onnx.to_onnx(
      traced,
      [waveform],
      model_name="audiomosaic",
      opset=ONNX_OPSET,
      input_names=["waveform"],
      output_names=list(names),
    )
  # In one file: jax2onnx itself would put large tensors beside it.
  path.write_bytes(graph.SerializeToString())


def write_savedmodel(
  encoder: Encoder, path: pathlib.Path, samples: int
) -> None:
  """Writes a TensorFlow module for any batch and any length."""
  del samples
  tf = _tensorflow()
  module = tf.Module()
  module.embed = _tf_function(
    export_program.make_program(encoder, export_program.fft_log_mel),
    (None, None),
    polymorphic_shapes=["(b, s)"],
    polymorphic_constraints=[f"s >= {encoder.geometry.length}"],
  )
  tf.saved_model.save(module, str(path), signatures=module.embed)


def write_tflite(encoder: Encoder, path: pathlib.Path, samples: int) -> None:
  """Writes a model of TFLite's own operations for one clip of one length."""
  tf = _tensorflow()
  module = tf.Module()
  module.embed = _tf_function(
    export_program.make_program(encoder, export_program.conv_log_mel),
    (1, samples),
  )
  converter = tf.lite.TFLiteConverter.from_concrete_functions(
    [module.embed.get_concrete_function()], module
  )
  converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
  path.write_bytes(converter.convert())


def _tf_function(
  program: Callable, shape: tuple[int | None, ...], **options: Any
) -> Callable:
  """Returns a program as a function of TensorFlow."""
  from jax.experimental import jax2tf

  tf = _tensorflow()
  return tf.function(
    jax2tf.convert(program, with_gradient=False, **options),
    autograph=False,
    input_signature=[tf.TensorSpec(shape, tf.float32, name="waveform")],
  )


def _tensorflow():
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import tensorflow

  return tensorflow


FORMATS = {
  form.name: form
  for form in (
    Format(
      name="params",
      file="params.npz",
      write=write_params,
      packages=(),
      extra="",
      tolerance=1e-4,
      frames_tolerance=1e-4,
      any_length=True,
      any_batch=True,
      contents="parameters by name, numpy.load without pickle",
    ),
    Format(
      name="safetensors",
      file="encoder.safetensors",
      write=write_safetensors,
      packages=("safetensors",),
      extra="export",
      tolerance=1e-4,
      frames_tolerance=1e-4,
      any_length=True,
      any_batch=True,
      contents="parameters by name",
    ),
    Format(
      name="stablehlo",
      file="encoder.stablehlo",
      write=write_stablehlo,
      packages=("flatbuffers",),
      extra="export",
      tolerance=1e-4,
      frames_tolerance=1e-4,
      any_length=True,
      any_batch=True,
      contents="program of jax.export for CPU, CUDA and TPU",
    ),
    Format(
      name="onnx",
      file="encoder.onnx",
      write=write_onnx,
      packages=("jax2onnx", "onnx", "onnxruntime"),
      extra="export",
      tolerance=1e-4,
      frames_tolerance=1e-3,
      any_length=False,
      any_batch=True,
      contents=f"graph of opset {ONNX_OPSET}",
    ),
    Format(
      name="savedmodel",
      file="savedmodel",
      write=write_savedmodel,
      packages=("tensorflow",),
      extra="export-tf",
      tolerance=1e-4,
      frames_tolerance=1e-4,
      any_length=True,
      any_batch=True,
      contents="TensorFlow SavedModel, signature serving_default",
    ),
    Format(
      name="tflite",
      file="encoder.tflite",
      write=write_tflite,
      packages=("tensorflow", "ai_edge_litert"),
      extra="export-tf",
      tolerance=1e-3,
      frames_tolerance=1e-3,
      any_length=False,
      any_batch=False,
      contents="TFLite model of built-in operations",
    ),
  )
}
