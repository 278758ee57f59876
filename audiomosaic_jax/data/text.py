"""Questions and answers as tokens: OpenAQA files, the prompt, the tokenizer.

A record asks something about a clip, or about nothing:

  {"instruction": ..., "input": ..., "audio_id": ..., "dataset": ...,
   "task": ..., "output": ...}

Reference: the published training code; token ids of its prompts are the same.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

IGNORED = -100
REPLACEMENT = "\ufffd"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# Role -> what it is called in files, and what it is where none says.
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
INSTALL = "install the package {name}: pip install 'audiomosaic-jax[lm]'"


class Record(NamedTuple):
  """A question and its answer.

  Attributes:
    instruction: what is asked.
    input: further text of the question, or "".
    audio_id: path of the clip; "" or "empty" is none.
    dataset: where the clip is from.
    task: kind of question.
    output: the answer.
  """

  instruction: str
  input: str
  audio_id: str
  dataset: str
  task: str
  output: str

  @property
  def has_audio(self) -> bool:
    """Whether there is a clip to hear."""
    return self.audio_id not in ("", "empty")


def read_records(paths: Iterable[str | pathlib.Path]) -> list[Record]:
  """Reads files of questions: a JSON list each, or an object per line.

  Args:
    paths: of the files.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not JSON, or a record lacks a field; says which.
  """
  return [record for path in paths for record in _read_file(path)]


def _read_file(path: str | pathlib.Path) -> list[Record]:
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; give a file of questions in the form of OpenAQA"
    )
  content = path.read_text(encoding="utf-8")
  try:
    if content.lstrip().startswith("["):
      rows = json.loads(content)
    else:
      # Not splitlines: it cuts at U+2028 too, which JSON may hold as it is.
      lines = content.split("\n")
      rows = [json.loads(line) for line in lines if line.strip()]
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  records = []
  for number, row in enumerate(rows, 1):
    missing = [name for name in Record._fields if name not in row]
    if missing:
      raise ValueError(
        f"record {number} of {path} lacks {', '.join(missing)}; it has "
        f"{', '.join(row)}"
      )
    records.append(Record(*(str(row[name]) for name in Record._fields)))
  return records


def render(instruction: str, input: str = "") -> str:
  """Returns the prompt that an answer follows, "alpaca_short" of LTU."""
  further = f"### Input:\n{input}\n\n" if input else ""
  return f"### Instruction:\n{instruction}\n\n{further}### Response:\n"


class Tokenizer:
  """Text to ids and back, without special tokens.

  Attributes:
    vocab_size: tokens.
    bos_id: begins a text.
    eos_id: ends an answer.
    pad_id: fills up a batch.
  """

  def __init__(self, encoder: Any, special: Mapping[str, int]):
    """Wraps what a package opened; see `open_tokenizer`."""
    self._encoder = encoder
    self.vocab_size = encoder.vocab_size
    self.bos_id = special["bos_token"]
    self.eos_id = special["eos_token"]
    self.pad_id = special["unk_token"]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text."""
    return self._encoder.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; special ones are left out."""
    skipped = (self.bos_id, self.eos_id, self.pad_id)
    return self._encoder.decode([i for i in ids if i not in skipped])


class StreamDecoder:
  """Turns ids into pieces of text that are whole, as they come.

  A character may be made of several tokens; it is given once it is complete.
  """

  def __init__(self, tokenizer: Tokenizer):
    """Starts an answer."""
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._given = ""

  def push(self, token: int) -> str:
    """Takes an id; returns the text that is new and complete."""
    self._ids.append(token)
    text = self._tokenizer.decode(self._ids)
    if text.endswith(REPLACEMENT) or not text.startswith(self._given):
      return ""
    piece = text[len(self._given) :]
    self._given = text
    return piece

  def finish(self) -> str:
    """Returns what was held back."""
    return self._tokenizer.decode(self._ids)[len(self._given) :]


def open_tokenizer(path: str | pathlib.Path) -> Tokenizer:
  """Opens a tokenizer on this machine.

  Args:
    path: tokenizer.json, a SentencePiece model, or a folder with one of them.

  Raises:
    FileNotFoundError: there is none.
    ValueError: a package is missing, or the special tokens are not known.
  """
  path = pathlib.Path(path).expanduser()
  folder = path if path.is_dir() else path.parent
  if path.is_dir():
    found = [path / name for name in TOKENIZER_FILES if (path / name).exists()]
    if not found:
      raise FileNotFoundError(
        f"{path} has none of {TOKENIZER_FILES}; give the folder of the "
        "tokenizer, or its file"
      )
    path = found[0]
  elif not path.exists():
    raise FileNotFoundError(f"{path} does not exist; give a tokenizer")
  encoder = (_Fast if path.suffix == ".json" else _SentencePiece)(path)
  special = {
    role: _special_id(encoder, role, name, folder)
    for role, name in SPECIAL.items()
  }
  return Tokenizer(encoder, special)


class _Fast:
  """A tokenizer.json, by the package tokenizers."""

  def __init__(self, path: pathlib.Path):
    try:
      import tokenizers
    except ImportError as error:
      raise ValueError(INSTALL.format(name="tokenizers")) from error
    self._inner = tokenizers.Tokenizer.from_file(str(path))
    self.vocab_size = self._inner.get_vocab_size()

  def encode(self, text: str) -> list[int]:
    return self._inner.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    return self._inner.decode(list(ids), skip_special_tokens=False)

  def id_of(self, token: str) -> int | None:
    return self._inner.token_to_id(token)


class _SentencePiece:
  """A tokenizer.model, by the package sentencepiece."""

  def __init__(self, path: pathlib.Path):
    try:
      import sentencepiece
    except ImportError as error:
      raise ValueError(INSTALL.format(name="sentencepiece")) from error
    self._inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
    self.vocab_size = self._inner.vocab_size()

  def encode(self, text: str) -> list[int]:
    return self._inner.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._inner.decode(list(ids))

  def id_of(self, token: str) -> int | None:
    found = self._inner.piece_to_id(token)
    return None if self._inner.id_to_piece(found) != token else found


def _special_id(
  encoder: Any, role: str, otherwise: str, folder: pathlib.Path
) -> int:
  """Returns the id of a special token, as the folder's files name it."""
  name = otherwise
  for file in CONFIG_FILES:
    if (folder / file).exists():
      said = json.loads((folder / file).read_text(encoding="utf-8")).get(role)
      said = said.get("content") if isinstance(said, dict) else said
      name = said or name
      break
  # Llama 3 has no <unk>; its end fills up as well as anything.
  found = encoder.id_of(name)
  if found is None and role == "unk_token":
    return _special_id(encoder, "eos_token", SPECIAL["eos_token"], folder)
  if found is None:
    raise ValueError(
      f"the tokenizer in {folder} has no {role} {name!r}; put the "
      f"{CONFIG_FILES[0]} that came with it beside it"
    )
  return found


def encode_prompt(
  instruction: str,
  input: str,
  tokenizer: Tokenizer,
) -> list[int]:
  """Returns the ids that an answer follows, the first one bos."""
  return [tokenizer.bos_id, *tokenizer.encode(render(instruction, input))]


def encode_answer(answer: str, tokenizer: Tokenizer) -> list[int]:
  """Returns the ids of an answer after its prompt, without an end."""
  prompt = render("", "")
  whole = tokenizer.encode(prompt + answer)
  return whole[len(tokenizer.encode(prompt)) :]


def encode_example(
  record: Record,
  tokenizer: Tokenizer,
  *,
  cutoff: int,
  response_only: bool,
) -> tuple[list[int], list[int]]:
  """Returns what the decoder reads in training, and what it is to predict.

  Args:
    record: question and answer.
    tokenizer: of the base.
    cutoff: ids at most. What is longer loses its end, and gets no eos.
    response_only: the question is not to be predicted.

  Returns:
    (ids, labels), equally long; labels are IGNORED where not predicted.
  """
  prompt = render(record.instruction, record.input)
  ids = [tokenizer.bos_id, *tokenizer.encode(prompt + record.output)][:cutoff]
  if len(ids) < cutoff:
    ids.append(tokenizer.eos_id)
  asked = 0
  if response_only:
    asked = min(len(ids), 1 + len(tokenizer.encode(prompt)))
  return ids, [IGNORED] * asked + ids[asked:]


def train_tokenizer(
  texts: Sequence[str], vocab_size: int, path: pathlib.Path
) -> None:
  """Learns a byte-pair encoding of texts, for a base that has none.

  Args:
    texts: to learn from.
    vocab_size: tokens at most; 259 are the bytes and the special ones.
    path: of the tokenizer.json to write.

  Raises:
    ValueError: tokenizers is not installed.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError(INSTALL.format(name="tokenizers")) from error
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=["<unk>", "<s>", "</s>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(texts, trainer)
  inner.save(str(path))
