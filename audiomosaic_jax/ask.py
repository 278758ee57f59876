"""Asks a finished audio-language model about a recording.

  python -m audiomosaic_jax.ask --model=runs/ask clip.wav "What is happening?"
  python -m audiomosaic_jax.ask --model=runs/ask clip.wav

The second form takes one question after the other, until an empty line or the
end of the input; `/listen FILE` changes the recording. Without a recording the
text alone is read.
"""

import sys
import time
from collections.abc import Iterable, Iterator

from absl import app, flags, logging

from audiomosaic_jax.data import audio_io

MODEL = flags.DEFINE_string(
  "model", None, "Workdir of a run of configs/instruct.py."
)
STAGE = flags.DEFINE_string(
  "stage", "", "A stage of it, such as stage_2; the last finished by default."
)
BASE = flags.DEFINE_string(
  "base", "", "Folder of the Llama, if it is not where it was in training."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws, where there are any.")
TEMPERATURE = flags.DEFINE_float(
  "temperature", None, "0 takes the likeliest token; the run's by default."
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", None, "Of an answer, at most; the run's by default."
)
LISTEN = "/listen "


def main(argv: list[str]) -> None:
  """Loads the model and answers."""
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 3:
    raise app.UsageError(
      f"unexpected arguments: {' '.join(argv[3:])}; give a recording and a "
      "question in quotes"
    )
  try:
    answer_all(*argv[1:])
  except (FileNotFoundError, ValueError) as error:
    raise SystemExit(f"error: {error}") from None


def answer_all(recording: str | None = None, question: str = "") -> None:
  """Answers one question, or those that are typed."""
  # What cannot be heard is found out before the model is loaded.
  length_s = 0.0
  if recording is not None:
    length_s = audio_io.duration_s(recording)
  from audiomosaic_jax.language import chat

  talker = chat.load_chat(
    MODEL.value, stage=STAGE.value, base_folder=BASE.value
  )
  changes = {
    "temperature": TEMPERATURE.value,
    "max_new_tokens": MAX_NEW_TOKENS.value,
  }
  if length_s > talker.window_s:
    print(
      f"[hears the first {talker.window_s:.1f} of {length_s:.1f} s]",
      file=sys.stderr,
    )
  sampling = talker.sampling_of(
    **{name: x for name, x in changes.items() if x is not None}
  )
  if question:
    say(talker.stream(recording, question, sampling=sampling, seed=SEED.value))
    return
  for question, heard in typed(recording):
    try:
      say(talker.stream(heard, question, sampling=sampling, seed=SEED.value))
    except audio_io.BadClipError as error:
      print(f"error: {error}")


def say(pieces: Iterable[str]) -> None:
  """Prints an answer as it comes, and how fast it came."""
  started, first_s, count = time.monotonic(), None, 0
  for piece in pieces:
    first_s = first_s or time.monotonic() - started
    print(piece, end="", flush=True)
    count += 1
  print(flush=True)
  rest_s = time.monotonic() - started - (first_s or 0)
  if sys.stderr.isatty():
    speed = f"{(count - 2) / rest_s:.0f} tokens/s" if count > 2 else ""
    print(f"[first token {first_s:.1f} s  {speed}]", file=sys.stderr)


def typed(recording: str | None) -> Iterator[tuple[str, str | None]]:
  """Yields (question, recording), until an empty line or the end."""
  prompt = "> " if sys.stdin.isatty() else ""
  while True:
    try:
      line = input(prompt).strip()
    except EOFError:
      return
    if line.startswith(LISTEN):
      recording = line.removeprefix(LISTEN).strip()
    elif line:
      yield line, recording
    else:
      return


if __name__ == "__main__":
  flags.mark_flags_as_required(["model"])
  app.run(main)
