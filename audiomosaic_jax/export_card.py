"""What an exported encoder is: config.json and model_card.md."""

import hashlib
import importlib.metadata
import inspect
import json
import ntpath
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from audiomosaic_jax import embed_program, export_formats, export_run
from audiomosaic_jax.encoder import Encoder

CONFIG_FILE, CARD_FILE = "config.json", "model_card.md"


def config_of(encoder: Encoder) -> dict[str, Any]:
  """Returns what is needed to use the parameters, and how they were made.

  Args:
    encoder: the encoder.

  Returns:
    "fbank" and "spectrogram", arguments of `features`; "encoder", arguments of
    `models.vit.ViT`; "pooling" and "use_fc_norm" of the pooled tokens;
    "class_names" of a classifier; "training", the config of the run, with the
    last part of every path that was one of the machine.
  """
  model, config = encoder.model, encoder.config
  own = config.model.encoder.to_dict()
  return {
    "fbank": config.fbank.to_dict(),
    "spectrogram": config.spectrogram.to_dict(),
    "encoder": {name: getattr(model.encoder, name) for name in sorted(own)}
    | {"grid": model.encoder.grid},
    "pooling": model.pooling,
    "use_fc_norm": model.use_fc_norm,
    "class_names": encoder.class_names,
    "training": without_folders(config.to_dict()),
  }


def without_folders(tree: Any) -> Any:
  """Returns nested values with only the last part of absolute paths."""
  if isinstance(tree, Mapping):
    return {name: without_folders(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [without_folders(value) for value in tree]
  if isinstance(tree, str) and (os.path.isabs(tree) or ntpath.isabs(tree)):
    return ntpath.basename(tree.rstrip("/\\"))
  return tree


def identity(encoder: Encoder) -> str:
  """Returns a hash of the parameters and of what they are used with."""
  about = config_of(encoder)
  del about["training"]
  about["variables"] = embed_program.fingerprint(
    encoder.variables, encoder.config
  )
  text = json.dumps(about, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def card(
  encoder: Encoder,
  entries: Mapping[str, Mapping[str, Any]],
  *,
  licence: str,
  training_data: str,
) -> str:
  """Returns the model card as Markdown.

  Args:
    encoder: the encoder.
    entries: format -> entry of parity.json.
    licence: of the weights.
    training_data: what the encoder was trained on.
  """
  sections = (
    _summary(encoder, licence, training_data),
    _signature(encoder),
    _formats(encoder, entries),
    _input(encoder),
    _use(entries),
    _config(encoder),
  )
  return "\n".join(sections)


def markdown_table(
  columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
  """Returns a table as Markdown."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _summary(encoder: Encoder, licence: str, training_data: str) -> str:
  settings = encoder.model.encoder
  version = importlib.metadata.version("audiomosaic-jax")
  return f"""\
# Audio encoder (AudioMosaic)

A Vision Transformer on log-mel spectrograms, exported for other programs: it
takes a waveform, and returns an embedding of the clip and one for every frame.

* Depth {settings.depth}, width {settings.width}, {settings.num_heads} heads,
  patches of {settings.patch_size} x {settings.patch_size}
* Method: AudioMosaic, contrastive masked audio representation learning,
  arXiv 2605.14231. Exported by AudioMosaic-JAX {version} (code: MIT licence).
* Licence of the weights: {licence}
* Training data: {training_data}
* Identity: {identity(encoder)}, a hash of weights and front end
"""


def _signature(encoder: Encoder) -> str:
  geometry = encoder.geometry
  frame_ms = 1e3 * geometry.length / geometry.sample_rate_hz
  rows = [
    (
      "input `waveform`",
      "float32 [B, S]",
      f"mono, {geometry.sample_rate_hz} Hz, in [-1, 1], S at least "
      f"{geometry.length} ({frame_ms:g} ms)",
    ),
    (
      "`embedding`",
      f"float32 [B, {encoder.embedding_width}]",
      "mean over the clip",
    ),
    (
      "`frames`",
      f"float32 [B, T, {encoder.width}]",
      f"one for every {encoder.hop_ms:g} ms: N = 1 + (S - {geometry.length}) "
      f"// {geometry.shift}, T = ceil(N / {geometry.patch_size})",
    ),
  ]
  # Heads other than the linear one are not part of what is exported.
  if encoder.model.num_classes:
    about = ("`logits`", f"float32 [B, {encoder.model.num_classes}]")
    rows.append((*about, "of the classes in config.json"))
  table = markdown_table(("", "type and shape", ""), rows)
  window = geometry.span(geometry.max_columns)
  return f"""\
## Signature

{table}
The encoder sees {encoder.window_s:g} s ({window} samples) at once.
A longer clip is cut into such windows, and the embedding is their mean, each
weighted by its columns of patches. In the last window, columns of patches
without a frame of the clip are seen by neither attention nor pooling. Do not
lengthen clips with zeros: silence is sound, and changes the embedding.
"""


def _formats(encoder: Encoder, entries: Mapping[str, Mapping[str, Any]]) -> str:
  rows = []
  for name, entry in entries.items():
    form = export_formats.FORMATS[name]
    [samples, *_] = entry["lengths"]
    seconds = samples / encoder.sample_rate_hz
    fixed = f"S = {samples} ({seconds:g} s)"
    found = entry["max_abs_difference"]
    worst = f"{found['embedding']:.1e}, {found['frames']:.1e}"
    rows.append(
      (
        f"`{form.file}`",
        form.contents,
        "any" if form.any_length else fixed,
        "any" if form.any_batch else "B = 1",
        worst + ("" if entry["passed"] else " **not accepted**"),
      )
    )
  columns = ("file", "what it is", "length", "batch", "differences")
  text = """\
The differences are the largest of embedding and of frames from the encoder in
JAX, over recordings; parity.md has them in full. ONNX and TFLite take clips of
one length, since their converters cannot cut a clip of unknown length into
windows: export again with --length_s for another. TFLite's takes one clip at a
time. Parameters are constants of the programs; matrix products have the default
precision of the platform, which on GPUs and TPUs is below float32. jax.export
promises that its files can be read for half a year, so keep the parameters too.
"""
  return f"## Files\n\n{markdown_table(columns, rows)}\n{text}"


def _input(encoder: Encoder) -> str:
  fbank, fitted = encoder.config.fbank, encoder.config.spectrogram
  return f"""\
## What the encoder hears

The waveform goes in as it is; the programs hold this front end, Kaldi's log-mel
filter bank:

* frames of {fbank.frame_length_ms:g} ms every {fbank.frame_shift_ms:g} ms
* mean removed, pre-emphasis {fbank.preemphasis:g}, symmetric Hann window
* {fbank.num_mel_bins} bands, {fbank.low_freq_hz:g} to {fbank.high_freq_hz:g} Hz
* natural logarithm of the energies, at least 2^-23

Then

    x = (fbank - mean) / (2 std),   mean = {fitted.mean}, std = {fitted.std}

It divides by **two** standard deviations. Frames that are missing from the last
window are zeros of fbank before this, -mean / (2 std) after it. In ONNX and
TFLite frames, window and Fourier transform are one convolution.
"""


def _use(entries: Mapping[str, Mapping[str, Any]]) -> str:
  parts = [
    "## Use\n\nThe functions that were run for parity.md; `clips` are arrays "
    "[B, S].\nFor the parameters see examples/use_params.py of "
    "AudioMosaic-JAX.\n"
  ]
  for name in entries:
    if name not in export_formats.PARAMETERS:
      source = inspect.getsource(export_run.RUNTIMES[name])
      parts.append(f"```python\n{textwrap.dedent(source)}```\n")
  return "\n".join(parts)


def _config(encoder: Encoder) -> str:
  training = json.dumps(config_of(encoder)["training"], indent=1)
  return (
    "## Config of the training\n\n"
    f"<details>\n\n```json\n{training}\n```\n\n</details>\n"
  )


def training_data_of(encoder: Encoder) -> str:
  """Returns what the config of a run says of its data."""
  if "data" not in encoder.config:
    return "not known; the encoder came without it"
  data = without_folders(encoder.config.data.to_dict())
  if "source" not in data:
    return "not known; the encoder was imported"
  source = data["source"]
  if source["name"] == "demo":
    return (
      "the recordings that come with AudioMosaic-JAX; makers and licences are "
      "in its audiomosaic_jax/data/demo_audio/README.md"
    )
  return ", ".join(f"{k} {v}" for k, v in source.items() if v)
