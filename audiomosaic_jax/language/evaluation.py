"""Tests an audio-language model on sets of closed-ended questions.

Every set is scored three times: with its sound, with the sound of another
clip, and without any. What the second and third do not lose, the model has not
heard. Writes results.json, results.md and predictions in the workdir.
"""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from audiomosaic_jax import files, scores, tables
from audiomosaic_jax.data import datasets, text, wrappers
from audiomosaic_jax.data.sources import Source
from audiomosaic_jax.language import (
  base,
  build,
  captioning,
  chat,
  closed_ended,
  embedders,
  published,
  stages,
)

ConfigDict = ml_collections.ConfigDict
CONDITIONS = {
  "audio": "its audio",
  "other_audio": "another clip's",
  "no_audio": "none",
}
RESULTS, TABLE = "results.json", "results.md"


def run(
  config: ConfigDict, held: base.Base, workdir: pathlib.Path, mesh
) -> dict[str, Any]:
  """Evaluates the last finished stage, prints the table and writes it.

  Args:
    config: of the run.
    held: its base.
    workdir: its folder.
    mesh: the devices.

  Returns:
    What results.json holds: of each set, condition -> metric.
  """
  settings = config.evaluation
  sets = [n for n in settings.sets.order if settings.sets[n].source.data_dir]
  captioned = [n for n in settings.captions.order if settings.captions[n].table]
  asked = (*settings.sets.order, *settings.captions.order)
  if left_out := [n for n in asked if n not in (*sets, *captioned)]:
    print(f"not evaluated, without a data_dir or table: {', '.join(left_out)}")
  if not sets and not captioned:
    return {}
  folder, record = stages.find(config, workdir, "")
  model = build.build_model(config, held.llama)
  talker = chat.Chat(config, held, build.load_own(model, config, folder), mesh)
  results = {
    "about": {"stage": folder.name, "scorer": settings.scorer, **record},
    "sets": {},
    "captions": {},
  }
  # Sets take hours; what is known when the next one fails is written.
  for name in sets:
    clips = load_clips(config, name, workdir)
    results["sets"][name] = evaluate_set(talker, name, clips, workdir)
    shown = _write(results, workdir)
  for name in captioned:
    results["captions"][name] = captioning.evaluate(talker, name, workdir)
    shown = _write(results, workdir)
  if jax.process_index() == 0:
    print(f"{shown}\nwritten: {workdir / TABLE}", flush=True)
  return results


def _write(results: dict[str, Any], workdir: pathlib.Path) -> str:
  """Writes what was found so far; returns its tables for the terminal."""
  page, shown = [], []
  for part, make, published_sets, note in (
    ("sets", make_table, published.CLOSED_ENDED, published.NOT_COMPARABLE),
    ("captions", captioning.make_table, published.CAPTIONS, captioning.NOTE),
  ):
    if results[part]:
      table = make(results[part])
      page.append(tables.markdown(table))
      shown.append(tables.table_text(table))
      if set(published_sets) & set(results[part]):
        page.append(note.format(**results["about"]))
  if jax.process_index() == 0:
    files.write_text(workdir / RESULTS, json.dumps(results, indent=2) + "\n")
    files.write_text(workdir / TABLE, "\n\n".join(page) + "\n")
  return "\n".join(shown)


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Finds out before training what would be missed after it.

  Raises:
    FileNotFoundError: the folder or the table of a set is not there, or none
      of the clips of a table.
    ValueError: an unknown scorer, or a table that cannot be used.
  """
  settings = config.evaluation
  if settings.scorer not in SCORERS:
    raise ValueError(
      f"evaluation.scorer {settings.scorer!r} is unknown; use one of "
      f"{tuple(SCORERS)}"
    )
  sets, captioned = settings.sets, settings.captions
  places = {name: sets[name].source.data_dir for name in sets.order}
  places |= {name: captioned[name].table for name in captioned.order}
  for name, place in places.items():
    path = pathlib.Path(base.within(workdir, place)).expanduser()
    if place not in ("", "demo") and not path.exists():
      raise FileNotFoundError(
        f"{path} of set {name} does not exist; give the place where it is, or "
        "leave the set out of evaluation.sets.order or .captions.order"
      )
  for name in captioned.order:
    if captioned[name].table:
      captioning.load_clips(config, name, workdir)


def load_clips(config: ConfigDict, name: str, workdir: pathlib.Path) -> Source:
  """Returns the clips of a set, a drawn part of them if so configured."""
  chosen, settings = config.evaluation.sets[name], config.evaluation
  source = datasets.make_dataset(
    split=chosen.split or None,
    sample_rate_hz=config.fbank.sample_rate_hz,
    **chosen.source.to_dict(),
  )
  if 0 < settings.max_clips < len(source):
    drawn = wrappers.draw(len(source), settings.max_clips, config.seed)
    source = wrappers.SubsetSource(source, drawn)
  report = workdir / f"bad_clips_{name}.jsonl"
  return datasets.guard(source, **config.data.guard, report_path=report)


def evaluate_set(
  talker: chat.Chat, name: str, clips: Source, workdir: pathlib.Path
) -> dict[str, Any]:
  """Scores a set under each condition, and measures it."""
  settings = talker.config.evaluation
  answers = [answer_of(label, settings) for label in clips.class_names]
  score = SCORERS[settings.scorer](talker, answers)
  kept: list[int] = []
  heard = score(_waveforms(talker, clips, name, kept), True)
  silence = score(iter([talker.read(None)]), False)
  rows = {
    "audio": heard,
    # A score depends on what is heard alone: every clip gets that of another.
    "other_audio": np.roll(heard, len(heard) // 2, axis=0),
    "no_audio": np.repeat(silence, len(heard), axis=0),
  }
  targets = np.zeros((len(kept), len(answers)))
  for row, index in zip(targets, kept, strict=True):
    row[list(clips.label_sets[index])] = 1
  metric = settings.sets[name].metric
  found = {
    condition: scores.measure(
      scores.Evaluation(values, targets),
      (metric,),
      num_resamples=settings.num_resamples,
      confidence=settings.confidence,
      seed=talker.config.seed,
      groups=clips.groups and [clips.groups[index] for index in kept],
    )[metric]
    for condition, values in rows.items()
  }
  if jax.process_index() == 0:
    _write_predictions(workdir, name, clips, kept, rows)
  return {"metric": metric, "clips": len(kept), **found}


def answer_of(label: str, settings: ConfigDict) -> str:
  """Returns what the model would say of a label, "dog_bark" in words."""
  return settings.answer.format(label=label.replace("_", " ").lower())


def likelihood_scorer(talker: chat.Chat, answers: Sequence[str]) -> Callable:
  """Returns (waveforms [N, S], heard) -> [N, C] log-likelihoods."""
  settings = talker.config.evaluation
  tokenizer = talker.tokenizer
  question = text.encode_prompt(settings.instruction, "", tokenizer)
  rows = [
    [*text.encode_answer(answer, tokenizer), tokenizer.eos_id]
    for answer in answers
  ]
  score = functools.partial(
    closed_ended.likelihoods,
    talker.model,
    talker.params,
    question=jnp.asarray(question),
    answers=jnp.asarray(closed_ended.pad_answers(rows)),
    answers_at_once=min(settings.answers_at_once, len(rows)),
    per_token=settings.per_token,
  )

  def score_all(waveforms: Iterator[np.ndarray], heard: bool) -> np.ndarray:
    found = []
    for batch, count in _batches(waveforms, settings.batch_size):
      has_audio = jnp.full(len(batch), heard)
      fbank = talker.spectrogram(batch)
      rows = np.asarray(score(fbank=fbank, has_audio=has_audio))
      found.append(rows[:count])
    return np.concatenate(found)

  return score_all


def similarity_scorer(talker: chat.Chat, answers: Sequence[str]) -> Callable:
  """Returns (waveforms [N, S], heard) -> [N, C] cosines of written answers."""
  settings = talker.config.evaluation
  embedder = embedders.open_embedder(settings.embedder, talker)
  sampling = talker.sampling_of(max_new_tokens=settings.max_new_tokens)

  def score_all(waveforms: Iterator[np.ndarray], heard: bool) -> np.ndarray:
    written = []
    for batch, count in _batches(waveforms, settings.batch_size):
      clips = [clip if heard else None for clip in batch]
      asked = [settings.instruction] * len(batch)
      written += talker.ask_all(clips, asked, sampling=sampling)[:count]
    return closed_ended.similarities(embedder, written, answers)

  return score_all


# Name -> (talker, answers) -> scores of what is heard.
SCORERS = {"likelihood": likelihood_scorer, "similarity": similarity_scorer}


def make_table(results: dict[str, Any]) -> tables.Table:
  """Returns sets by conditions, in percent, with what others report."""
  rows = []
  for name, found in results.items():
    known = published.CLOSED_ENDED.get(name, ())
    cells = [_percent(found[condition]) for condition in CONDITIONS]
    others = [f"{value:.1f}" for value in known] or ["-"] * 2
    about = f"{found['metric']}, {found['clips']} clips"
    rows.append([name, about, *cells, *others])
  return tables.Table(
    "closed-ended questions, % [interval over clips]",
    ["set", "metric", *CONDITIONS.values(), *published.MODELS],
    rows,
  )


def _percent(found: dict[str, float]) -> str:
  value = f"{100 * found['value']:.1f}"
  if "low" not in found:
    return value
  return f"{value} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _waveforms(
  talker: chat.Chat, clips: Source, name: str, kept: list[int]
) -> Iterator[np.ndarray]:
  """Yields what is heard of each clip that can be read, and notes which."""
  quiet = jax.process_index() != 0
  for index in tqdm.tqdm(range(len(clips)), name, unit="clip", disable=quiet):
    clip = clips[index]
    # Another one stands in for a bad clip.
    if int(clip["id"]) == index:
      kept.append(index)
      yield talker.read(clip["waveform"])


def _batches(waveforms: Iterator[np.ndarray], size: int):
  """Yields (batch of one size, rows of it that count)."""
  while rows := list(itertools.islice(waveforms, size)):
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    yield np.stack(filled), len(rows)


def _write_predictions(
  workdir: pathlib.Path,
  name: str,
  clips: Source,
  kept: Sequence[int],
  rows: dict[str, np.ndarray],
) -> None:
  """Writes a line per clip: what it is, and what was found likeliest."""

  def line(row: int, index: int) -> str:
    names = clips.class_names
    found = {
      key: names[int(values[row].argmax())] for key, values in rows.items()
    }
    labels = [names[label] for label in clips.label_sets[index]]
    return json.dumps({"id": str(clips.ids[index]), "labels": labels, **found})

  path = workdir / "predictions" / f"{name}.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [line(row, index) for row, index in enumerate(kept)]
  files.write_text(path, "\n".join(lines) + "\n")
