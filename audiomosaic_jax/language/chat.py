"""Questions about recordings, answered by a finished run.

  chat = load_chat("runs/ask")
  chat.ask("clip.wav", "What is happening?")
  for piece in chat.stream("clip.wav", "What is happening?"):
    print(piece, end="", flush=True)

A recording is heard from its beginning, as long as the model's window; without
one (None) the text alone is read.
"""

import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from audiomosaic_jax import experiment, sharding
from audiomosaic_jax.data import audio_io, text
from audiomosaic_jax.encoder import check_samples
from audiomosaic_jax.language import base, build, generate, partition, stages
from audiomosaic_jax.models.audio_lm import AudioLM

ConfigDict = ml_collections.ConfigDict
Audio = str | os.PathLike | np.ndarray | None
Params = dict[str, Any]

# Prompts are padded to a multiple, so that few programs are compiled.
LENGTH_STEP = 16
# Decoded after the window: its last samples, resampled, take part of it.
RESAMPLED_S = 0.5


class Prompts(NamedTuple):
  """What a batch of questions is to the decoder.

  Attributes:
    embeds: [B, N, H] audio and text.
    valid: [B, N] False for padding.
    ids: [B, P] of the text; -1 for padding.
  """

  embeds: jax.Array
  valid: jax.Array
  ids: jax.Array


class Chat:
  """A model that answers.

  Attributes:
    config: of the run.
    model: the audio-language model.
    params: of it, base included.
    tokenizer: of the base.
    window_s: how much of a recording it hears.
  """

  def __init__(
    self, config: ConfigDict, held: base.Base, own: Params, mesh: Any
  ):
    """Puts together what was learned and the base it was learned with.

    Args:
      config: of the run.
      held: its base.
      own: parameters of a finished stage.
      mesh: the devices that the base is on.
    """
    self.config, self.tokenizer = config, held.tokenizer
    self.model: AudioLM = build.build_model(config, held.llama)
    self._everywhere = sharding.replicated(mesh)
    # From the host, as other processes cannot take from a device of this one.
    own = jax.device_put(jax.device_get(own), self._everywhere)
    llama = partition.join(own["llama"], held.params)
    self.params = {**own, "llama": llama}
    # Of few clips: one device is enough.
    one = sharding.make_mesh(jax.local_devices()[:1])
    self._spectrogram = jax.jit(build.make_spectrogram(config, one))
    self._prompt = jax.jit(functools.partial(self.model.apply, method="prompt"))
    samples = config.data.pipeline.clip_samples
    self.window_s = samples / config.fbank.sample_rate_hz

  def ask(
    self,
    audio: Audio,
    question: str,
    *,
    sampling: generate.Sampling,
    seed: int = 0,
  ) -> str:
    """Returns the answer to one question, as `ask_all`."""
    return self.ask_all([audio], [question], sampling=sampling, seed=seed)[0]

  def ask_all(
    self,
    clips: Sequence[Audio],
    questions: Sequence[str],
    *,
    sampling: generate.Sampling,
    seed: int = 0,
  ) -> list[str]:
    """Answers a batch of questions.

    At a temperature of 0 each is answered as if it were alone; otherwise what
    is drawn depends on its place in the batch.

    Args:
      clips: as of `read`.
      questions: one for each.
      sampling: see `sampling_of`.
      seed: of the draws, if there are any.

    Raises:
      audio_io.BadClipError: as `read`.
      ValueError: as `read`.
    """
    prompts = self.prompts(clips, questions)
    tokens = generate.generate(
      self.model.llama,
      self.params["llama"],
      *prompts,
      jax.random.key(seed),
      sampling,
    )
    return [self.tokenizer.decode(row.tolist()) for row in np.asarray(tokens)]

  def stream(
    self,
    audio: Audio,
    question: str,
    *,
    sampling: generate.Sampling,
    seed: int = 0,
  ) -> Iterator[str]:
    """Yields the answer of `ask` piece by piece, as it is found."""
    decoder = text.StreamDecoder(self.tokenizer)
    for tokens in generate.stream(
      self.model.llama,
      self.params["llama"],
      *self.prompts([audio], [question]),
      jax.random.key(seed),
      sampling,
    ):
      yield decoder.push(int(tokens[0]))
    yield decoder.finish()

  def prompts(
    self, clips: Sequence[Audio], questions: Sequence[str]
  ) -> Prompts:
    """Returns what the decoder reads of clips and questions."""
    waveforms = np.stack([self.read(clip) for clip in clips])
    heard = np.array([clip is not None for clip in clips])
    rows = [
      text.encode_prompt(question, "", self.tokenizer) for question in questions
    ]
    longest = max(map(len, rows))
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    ids = np.full((len(rows), length), -1, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
      row[: len(tokens)] = tokens
    embeds, valid = self._prompt(
      {"params": self.params},
      self.spectrogram(waveforms),
      jnp.asarray(np.maximum(ids, 0)),
      jnp.asarray(ids >= 0),
      jnp.asarray(heard),
    )
    return Prompts(embeds, valid, jnp.asarray(ids))

  def spectrogram(self, waveforms: np.ndarray) -> jax.Array:
    """Returns what the encoder takes [B, T, F] of int16 [B, S]."""
    fbank = jax.device_get(self._spectrogram(waveforms))
    return jax.device_put(fbank, self._everywhere)

  def read(self, audio: Audio) -> np.ndarray:
    """Returns int16 [S]: the window that is heard of a recording.

    Args:
      audio: a file, of which no more is decoded; or samples [n] at the rate of
        the model, floating point in [-1, 1] or int16; None is silence.

    Raises:
      audio_io.BadClipError: a file without usable sound in that window.
      ValueError: samples of more than one channel, another type, NaN or none.
    """
    pipeline = self.config.data.pipeline
    if audio is None:
      return np.zeros(pipeline.clip_samples, np.int16)
    rate_hz = self.config.fbank.sample_rate_hz
    if isinstance(audio, str | os.PathLike):
      audio = audio_io.load_audio(
        audio, sample_rate_hz=rate_hz, end_s=self.window_s + RESAMPLED_S
      )
    else:
      audio = check_samples(audio, rate_hz)
    clip = audio_io.fit_length(
      audio, pipeline.clip_samples, mode=pipeline.pad, offset=0
    )
    return audio_io.as_pcm16(clip)

  def sampling_of(self, **changes: Any) -> generate.Sampling:
    """Returns how the run's config draws tokens, with changes."""
    settings = self.config.generation.to_dict() | changes
    return generate.Sampling(
      **settings,
      eos_ids=(self.tokenizer.eos_id,),
      pad_id=self.tokenizer.pad_id,
    )


def load_chat(
  workdir: str | os.PathLike, *, stage: str = "", base_folder: str = ""
) -> Chat:
  """Loads the last finished stage of a run.

  Args:
    workdir: of a run of `configs/instruct.py`.
    stage: another stage, such as "stage_2".
    base_folder: where the base is, if it has moved.

  Raises:
    FileNotFoundError: no run, no stage, or no base.
    ValueError: another base than the one it was trained on.
  """
  workdir = pathlib.Path(workdir).expanduser()
  config = experiment.load_config(workdir)
  if config.mode != "instruct":
    raise ValueError(
      f"{workdir} is the folder of a run of mode {config.mode!r}, which does "
      "not answer; give one of configs/instruct.py"
    )
  if base_folder:
    config.base.update(folder=base_folder, tokenizer="")
  folder, record = stages.find(config, workdir, stage)
  # Every device has its part of each product: none gathers kernels for each
  # token of an answer.
  mesh = sharding.make_mesh(tensor=jax.device_count())
  held = base.open_base(
    **base.place(config, workdir), mesh=mesh, **config.model.llama
  )
  base.check(record["base"], base.fingerprint_of(held.params), folder)
  model = build.build_model(config, held.llama)
  return Chat(config, held, build.load_own(model, config, folder), mesh)
