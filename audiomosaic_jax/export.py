r"""Exports an encoder for programs that know nothing of this project.

  python -m audiomosaic_jax.export --encoder=runs/demo --output=exported \
    --format=params,safetensors,stablehlo,onnx,savedmodel,tflite

What is exported takes waveforms and returns embeddings, spectrogram and all:

  params       params.npz            numpy, no pickle
  safetensors  encoder.safetensors   the same by name
  stablehlo    encoder.stablehlo     jax.export; CPU, CUDA and TPU, any length
  onnx         encoder.onnx          onnxruntime; any batch of one length
  savedmodel   savedmodel/           TensorFlow; any length
  tflite       encoder.tflite        TFLite; one clip of one length

Beside them are config.json, model_card.md, parity.json and parity.md. Each
file is run in its own runtime, in a process of its own, on recordings that
come with the package, and must say what the encoder says: within 1e-4, TFLite
and the frames of ONNX within 1e-3. A file that does not keeps the ending
.unverified, and the command fails. Formats can be added to a folder later.

onnx needs the extra audiomosaic-jax[export], savedmodel and tflite need
audiomosaic-jax[export-tf]; stablehlo needs flatbuffers, of [export].
"""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence

import jax
from absl import app, flags, logging

from audiomosaic_jax import (
  export_card,
  export_formats,
  export_parity,
  files,
)
from audiomosaic_jax.encoder import Encoder
from audiomosaic_jax.encoder_files import load_encoder
from audiomosaic_jax.export_formats import Format

UNVERIFIED = ".unverified"
UNKNOWN_LICENCE = (
  "not stated; whoever trained them decides, within the terms of the "
  "training data"
)


def export_encoder(
  encoder: Encoder,
  output: str | os.PathLike,
  formats: Sequence[Format],
  *,
  length_s: float | None,
  licence: str | None,
  training_data: str | None,
) -> dict[str, dict]:
  """Writes an encoder in some formats, and checks each.

  Args:
    encoder: in float32.
    output: folder, new or with an export of the same encoder.
    formats: of `export_formats.choose`.
    length_s: of the clips of formats with a fixed length; None is a window.
    licence: of the weights, for the model card; None says it is not known.
    training_data: for the model card; None takes what the config says.

  Returns:
    Format -> entry of parity.json, of all formats in the folder.

  Raises:
    ValueError: too short a length, another dtype than float32, or the folder
      has an export of another encoder.
    RuntimeError: a file does not say what the encoder says.
  """
  output = pathlib.Path(output).expanduser()
  samples = fixed_samples(encoder, length_s)
  dtype = encoder.model.encoder.dtype
  if dtype != "float32":
    raise ValueError(
      f"the encoder computes in {dtype}, and other runtimes round otherwise; "
      'load it with dtype="float32"'
    )
  identity = export_card.identity(encoder)
  parity = output / export_parity.PARITY_FILE
  if (output / export_card.CONFIG_FILE).exists() and not parity.exists():
    raise ValueError(
      f"{output} has a {export_card.CONFIG_FILE} and is no export; give "
      "another --output"
    )
  output.mkdir(parents=True, exist_ok=True)
  # First of all, so that a failure leaves what is known as an export.
  entries = export_parity.record(output, identity, {})
  config = json.dumps(export_card.config_of(encoder), indent=1)
  files.write_text(output / export_card.CONFIG_FILE, config + "\n")
  for form in formats:
    entry = _export(form, encoder, output, samples)
    entries = export_parity.record(output, identity, {form.name: entry})
    card = export_card.card(
      encoder,
      entries,
      licence=licence or UNKNOWN_LICENCE,
      training_data=training_data or export_card.training_data_of(encoder),
    )
    files.write_text(output / export_card.CARD_FILE, card)
  missed = [form.name for form in formats if not entries[form.name]["passed"]]
  if missed:
    raise RuntimeError(
      "parity is missed, files keep the ending "
      f"{UNVERIFIED}: {'; '.join(_verdict(n, entries[n]) for n in missed)}"
    )
  return entries


def fixed_samples(encoder: Encoder, length_s: float | None) -> int:
  """Returns the samples of a clip where its length is fixed.

  Args:
    encoder: the encoder.
    length_s: in seconds; None is one window.

  Raises:
    ValueError: shorter than a frame.
  """
  geometry = encoder.geometry
  if length_s is None:
    return geometry.span(geometry.max_columns)
  samples = round(length_s * geometry.sample_rate_hz)
  if samples < geometry.length:
    raise ValueError(
      f"length_s is {length_s:g}, {samples} samples, but a frame has "
      f"{geometry.length}; give at least "
      f"{geometry.length / geometry.sample_rate_hz:g}"
    )
  return samples


def _export(
  form: Format, encoder: Encoder, output: pathlib.Path, samples: int
) -> dict:
  """Writes a file, checks it, and gives it its name if it is right."""
  path = output / form.file
  unverified = path.with_name(path.name + UNVERIFIED)
  _remove(unverified)
  form.write(encoder, unverified, samples)
  entry = export_parity.measure(form, unverified, encoder, samples)
  # An older file of this name would no longer be what the entry is about.
  _remove(path)
  if entry["passed"]:
    unverified.replace(path)
  print(_verdict(form.name, entry))
  return entry


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _verdict(name: str, entry: dict) -> str:
  """Returns one line about a format."""
  found = ", ".join(
    f"{output} {value:.1e} of {entry['allowed'][output]:g}"
    for output, value in entry["max_abs_difference"].items()
  )
  mark = "ok" if entry["passed"] else "MISSED"
  return (
    f"{name}: {entry['file']}, {entry['bytes'] / 1e6:.1f} MB, largest "
    f"difference of what is allowed: {found}: {mark}"
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    "encoder", None, "Workdir of a run, a folder in it, or an import."
  )
  flags.DEFINE_string("output", None, "Folder to write to.")
  flags.DEFINE_list(
    "format",
    None,
    f"Which, with commas between: {', '.join(export_formats.FORMATS)}.",
  )
  flags.DEFINE_float(
    "length_s",
    None,
    "Length of the clips that onnx and tflite take; the other formats take "
    "any. Default: one window of the encoder.",
    lower_bound=0.0,
  )
  flags.DEFINE_string(
    "licence", None, "Licence of the weights, for the model card."
  )
  flags.DEFINE_string(
    "training_data",
    None,
    "What the encoder was trained on, for the model card. Default: the data "
    "set in its config.",
  )
  flags.mark_flags_as_required(["encoder", "output", "format"])


def main(argv: list[str]) -> None:
  """Runs the command; what a person can mend is told in one message."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  given = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  # All files are compared on the CPU, where float32 is float32.
  jax.config.update("jax_platforms", "cpu")
  try:
    formats = export_formats.choose(given.format)
    export_encoder(
      load_encoder(given.encoder),
      given.output,
      formats,
      length_s=given.length_s,
      licence=given.licence,
      training_data=given.training_data,
    )
  except (OSError, ValueError, ImportError, RuntimeError) as error:
    raise SystemExit(f"error: {error}") from None
  print(f"written to {given.output}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
