"""What `configs/instruct.py:debug` starts from: a random Llama, and questions.

Written as a real base and a real OpenAQA file would be, so that all that
follows reads them as it would read those.
"""

import csv
import pathlib
from collections.abc import Sequence

import jax
import ml_collections

from audiomosaic_jax import cluster, files
from audiomosaic_jax.data import questions, text
from audiomosaic_jax.language import base, llama_weights
from audiomosaic_jax.models import llama_config
from audiomosaic_jax.models.llama import Llama

ConfigDict = ml_collections.ConfigDict
SPLITS = ("train", "valid", "test")
SHARD_BYTES = 2**30


def write(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Writes what the config asks for and is not there yet.

  Process 0 does; the others return when it has.
  """
  if config.data.demo:
    if jax.process_index() == 0:
      _write_missing(config, workdir)
    cluster.wait_for_all("what the demo starts from is there")


def _write_missing(config: ConfigDict, workdir: pathlib.Path) -> None:
  folder = pathlib.Path(base.within(workdir, config.data.folder))
  if not folder.exists():
    write_questions(folder, config.seed)
  if config.base.random:
    place = pathlib.Path(base.within(workdir, config.base.folder))
    if not place.exists():
      write_base(place, folder, config)


def write_questions(folder: pathlib.Path, seed: int) -> None:
  """Writes train.json, valid.json and test.json about the packaged notes."""
  temporary = files.temporary_path(folder)
  temporary.mkdir(parents=True)
  for split in SPLITS:
    records = questions.demo_records(split, seed=seed)
    questions.write_records(records, temporary / f"{split}.json")
  write_captions(questions.demo_records("test", seed=seed), temporary)
  temporary.rename(folder)


def write_captions(
  records: Sequence[text.Record], folder: pathlib.Path
) -> None:
  """Writes captions.csv: what is answered to the question for a caption."""
  with (folder / "captions.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("path", "caption"))
    writer.writerows(
      (record.audio_id, record.output)
      for record in records
      if "caption" in record.instruction
    )


def write_base(
  place: pathlib.Path, questions_folder: pathlib.Path, config: ConfigDict
) -> None:
  """Writes a random Llama with a tokenizer that learned from the questions."""
  records = text.read_records([questions_folder / "train.json"])
  texts = [text.render(r.instruction, r.input) + r.output for r in records]
  settings = config.base.random.to_dict()
  attributes = llama_config.from_hf_config(settings)
  kept = config.model.llama.to_dict() | {"lora_rank": 0, "use_kernel": None}
  model = Llama(**attributes, **kept)
  one = jax.numpy.zeros((1, 1), jax.numpy.int32)
  params = model.init(
    jax.random.key(config.seed), one, one == 0, train=False, method="from_ids"
  )["params"]
  params = jax.tree.map_with_path(_enlarge, params)
  # A folder of that name is taken for a whole base.
  temporary = files.temporary_path(place)
  llama_weights.write_folder(
    params, settings, temporary, shard_bytes=SHARD_BYTES
  )
  text.train_tokenizer(
    texts, settings["vocab_size"], temporary / text.TOKENIZER_FILES[0]
  )
  temporary.rename(place)


def _enlarge(path: tuple, leaf: jax.Array) -> jax.Array:
  """Returns a kernel of unit gain, which training would have brought about.

  Left as they are drawn, the logits of a narrow decoder stay within 3 of each
  other whatever it hears, and no answer can be likely.
  """
  if path[-1].key not in ("kernel", "lm_head"):
    return leaf
  return leaf * (leaf.shape[-2] ** -0.5 / leaf.std())
