"""Whether an exported file says what the encoder says, and where it stands.

The file runs in its own runtime in a process of its own (`export_run.py`), on
recordings that come with the package, and is compared with the encoder.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from audiomosaic_jax import (
  export_card,
  export_formats,
  export_program,
  export_run,
  files,
)
from audiomosaic_jax.data import audio_io, datasets
from audiomosaic_jax.encoder import Encoder
from audiomosaic_jax.export_formats import Format

PARITY_FILE, PARITY_TEXT = "parity.json", "parity.md"
CLIPS_PER_LENGTH = 2
# Of the window: part of one, exactly one, and several with a part.
WINDOWS = (0.4, 1.0, 2.3)


def lengths(encoder: Encoder, form: Format, samples: int) -> list[int]:
  """Returns the lengths of clips, in samples, that a format is checked on."""
  if not form.any_length:
    return [samples]
  window = encoder.geometry.span(encoder.geometry.max_columns)
  return [
    max(round(part * window), encoder.geometry.length) for part in WINDOWS
  ]


def demo_clips(
  sample_rate_hz: int, num_samples: Sequence[int]
) -> list[np.ndarray]:
  """Returns recordings of speech, music and effects that come along.

  Args:
    sample_rate_hz: rate of the result.
    num_samples: the lengths; a recording that is shorter is repeated.

  Returns:
    [clips, length] float32 for each length, other recordings for each.
  """
  folder = datasets.DEMO_DIR / "pretrain"
  paths = sorted(folder.rglob("*.opus"))
  count = CLIPS_PER_LENGTH * len(num_samples)
  chosen = [paths[i * len(paths) // count] for i in range(count)]
  clips = []
  for i, length in enumerate(num_samples):
    some = chosen[CLIPS_PER_LENGTH * i :][:CLIPS_PER_LENGTH]
    loaded = [
      audio_io.load_audio(path, sample_rate_hz=sample_rate_hz) for path in some
    ]
    clips.append(np.stack([np.resize(clip, length) for clip in loaded]))
  return clips


def measure(
  form: Format, path: pathlib.Path, encoder: Encoder, samples: int
) -> dict[str, Any]:
  """Compares a file with the encoder that it was made of.

  Args:
    form: what `path` is.
    path: of the file; that of parameters has its config.json beside it.
    encoder: the encoder.
    samples: length of a clip where that is fixed.

  Returns:
    The entry of parity.json.

  Raises:
    RuntimeError: its runtime failed, or has not all outputs.
  """
  clips = demo_clips(encoder.sample_rate_hz, lengths(encoder, form, samples))
  outputs, versions = run_elsewhere(form.name, path, clips)
  wanted = export_program.output_names(encoder)
  if form.name in export_formats.PARAMETERS:
    wanted = wanted[:2]
  worst = {name: 0.0 for name in wanted}
  for waveform, found in zip(clips, outputs, strict=True):
    if missing := set(wanted) - set(found):
      raise RuntimeError(f"{path.name} has no output {sorted(missing)}")
    live = encoder.embed_batch(list(waveform), encoder.sample_rate_hz)
    for name in wanted:
      expected = np.stack([getattr(row, name) for row in live])
      if found[name].shape != expected.shape:
        raise RuntimeError(
          f"{name} of {path.name} has shape {found[name].shape}, the encoder "
          f"gives {expected.shape}"
        )
      difference = float(np.max(np.abs(found[name] - expected)))
      # NaN stays, whatever comes later.
      worst[name] = float(np.maximum(worst[name], difference))
  allowed = {
    name: form.frames_tolerance if name == "frames" else form.tolerance
    for name in wanted
  }
  return {
    "file": form.file,
    "bytes": size_of(path),
    "max_abs_difference": worst,
    "allowed": allowed,
    "passed": all(worst[name] <= allowed[name] for name in wanted),
    "clips": sum(map(len, clips)),
    "lengths": [c.shape[1] for c in clips],
    "sample_rate_hz": encoder.sample_rate_hz,
    "runtime": versions,
  }


def run_elsewhere(
  name: str, path: pathlib.Path, clips: Sequence[np.ndarray]
) -> tuple[list[dict[str, np.ndarray]], dict[str, str]]:
  """Runs a file in a new process.

  Args:
    name: of its format.
    path: of the file.
    clips: batches of waveforms.

  Returns:
    (outputs of each batch, versions of what the process had imported).

  Raises:
    RuntimeError: the process failed; the message has the end of its output.
  """
  with tempfile.TemporaryDirectory() as folder:
    given, made = (os.path.join(folder, f"{n}.npz") for n in ("in", "out"))
    np.savez(given, *clips)
    # Safe path: the modules beside the script are not for import.
    command = [sys.executable, "-P", export_run.__file__, name, str(path)]
    done = subprocess.run(
      [*command, given, made],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )
    if done.returncode:
      raise RuntimeError(
        f"{path.name} does not run: exit status {done.returncode}\n"
        f"{done.stderr[-2000:]}"
      )
    with np.load(made) as stored:
      versions = json.loads(str(stored["versions"]))
      outputs = [{} for _ in clips]
      for key in stored.files:
        output, _, index = key.partition("/")
        if index:
          outputs[int(index)][output] = stored[key]
  return outputs, versions


def size_of(path: pathlib.Path) -> int:
  """Returns the bytes of a file, or of all files in a folder."""
  found = [path] if path.is_file() else path.rglob("*")
  return sum(file.stat().st_size for file in found if file.is_file())


def record(
  folder: pathlib.Path, identity: str, entries: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
  """Adds entries to parity.json and parity.md.

  Args:
    folder: of the export.
    identity: of the encoder.
    entries: format -> what `measure` returned.

  Returns:
    All entries that are there now.

  Raises:
    ValueError: the folder holds an export of another encoder.
  """
  known = previous(folder, identity) | entries
  text = json.dumps({"encoder": identity, "formats": known}, indent=1)
  files.write_text(folder / PARITY_FILE, text + "\n")
  files.write_text(folder / PARITY_TEXT, table(known))
  return known


def previous(folder: pathlib.Path, identity: str) -> dict[str, dict[str, Any]]:
  """Returns the entries of earlier exports; arguments as of `record`."""
  path = folder / PARITY_FILE
  if not path.exists():
    return {}
  stored = json.loads(path.read_text())
  if stored["encoder"] != identity:
    raise ValueError(
      f"{folder} holds an export of encoder {stored['encoder']}, not of "
      f"{identity}; give another --output, or remove the folder"
    )
  return stored["formats"]


def table(entries: dict[str, dict[str, Any]]) -> str:
  """Returns the entries as Markdown."""
  rows = [
    (
      name,
      f"`{entry['file']}`",
      f"{entry['bytes'] / 1e6:.1f} MB",
      *(
        f"{entry['max_abs_difference'][output]:.1e} of "
        f"{entry['allowed'][output]:g}"
        if output in entry["allowed"]
        else "-"
        for output in export_program.OUTPUTS
      ),
      "yes" if entry["passed"] else "NO",
      _recordings(entry),
      ", ".join(f"{k} {v}" for k, v in entry["runtime"].items()),
    )
    for name, entry in entries.items()
  ]
  header = ("format", "file", "size", *export_program.OUTPUTS)
  header += ("passed", "recordings", "runtime")
  return (
    "# Parity\n\nLargest absolute difference from the encoder in JAX, of what "
    "is allowed, over\nrecordings that come with the package. Each file ran on "
    "the CPU in a process of\nits own.\n\n"
    + export_card.markdown_table(header, rows)
  )


def _recordings(entry: dict[str, Any]) -> str:
  seconds = [n / entry["sample_rate_hz"] for n in entry["lengths"]]
  return f"{entry['clips']} of {', '.join(f'{s:.2f}' for s in seconds)} s"
