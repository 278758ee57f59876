"""Captions that a model writes, against those that people wrote."""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import tqdm

from audiomosaic_jax import files, tables
from audiomosaic_jax.data import audio_io, caption_tables, wrappers
from audiomosaic_jax.language import base, captions, chat, published

ConfigDict = ml_collections.ConfigDict
COLUMNS = ("cider", "bleu_1", "bleu_4", "rouge_l")
NOTE = """\
Published figures are SPICE, which needs Java and a parser (`captions.spice`);
nothing here stands in for it."""


def evaluate(
  talker: chat.Chat, name: str, workdir: pathlib.Path
) -> dict[str, Any]:
  """Lets a model caption a set, and measures it.

  Args:
    talker: the model.
    name: of the set in `evaluation.captions`.
    workdir: receives captions/<name>.jsonl, a line for each clip.

  Returns:
    Metrics of the corpus, "clips", and "missing" and "bad" ones.
  """
  settings = talker.config.evaluation
  chosen = settings.captions[name]
  clips, missing = load_clips(talker.config, name, workdir)
  if 0 < settings.max_clips < len(clips):
    drawn = wrappers.draw(len(clips), settings.max_clips, talker.config.seed)
    clips = [clips[index] for index in drawn]
  sampling = talker.sampling_of(max_new_tokens=settings.max_new_tokens)
  written, bad = [], 0
  quiet = jax.process_index() != 0
  with tqdm.tqdm(
    total=len(clips), desc=name, unit="clip", disable=quiet
  ) as bar:
    for start in range(0, len(clips), settings.batch_size):
      group = clips[start : start + settings.batch_size]
      heard = [clip for clip in group if _readable(talker, clip)]
      bad += len(group) - len(heard)
      bar.update(len(group))
      if not heard:
        continue
      # Filled up, so that one program is compiled.
      paths = [clip.path for clip in heard]
      paths += paths[:1] * (settings.batch_size - len(paths))
      answers = talker.ask_all(
        paths, [chosen.instruction] * len(paths), sampling=sampling
      )
      written += zip(heard, answers[: len(heard)], strict=True)
  found = captions.measure(
    [answer for _, answer in written],
    [clip.captions for clip, _ in written],
  )
  if not quiet:
    lines = [
      json.dumps({"path": c.path, "written": a, "captions": c.captions})
      for c, a in written
    ]
    path = workdir / "captions" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "\n".join(lines) + "\n")
  return {**found, "clips": len(written), "missing": missing, "bad": bad}


def load_clips(
  config: ConfigDict, name: str, workdir: pathlib.Path
) -> tuple[list[caption_tables.Captioned], int]:
  """Returns the clips of a set that are there, and how many are not.

  Raises:
    FileNotFoundError: as `caption_tables.read`.
    ValueError: as `caption_tables.read`.
  """
  chosen = config.evaluation.captions[name]
  table = base.within(workdir, chosen.table)
  return caption_tables.read(table, chosen.folder)


def make_table(results: dict[str, dict[str, Any]]) -> tables.Table:
  """Returns sets by metrics, with the SPICE that others report."""
  rows = []
  for name, found in results.items():
    others = published.CAPTIONS.get(name, ())
    rows.append(
      [
        name,
        str(found["clips"]),
        *(f"{found[column]:.3f}" for column in COLUMNS),
        *([f"SPICE {value}" for value in others] or ["-"] * 2),
      ]
    )
  return tables.Table(
    "captions, CIDEr of 10 at most, the others of 1",
    ["set", "clips", *COLUMNS, *published.MODELS],
    rows,
  )


def _readable(talker: chat.Chat, clip: caption_tables.Captioned) -> bool:
  """Whether a clip can be heard; says so if not."""
  try:
    talker.read(clip.path)
  except audio_io.BadClipError as error:
    print(f"left out: {error}", flush=True)
    return False
  return True
