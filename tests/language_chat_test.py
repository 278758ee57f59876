"""Answers, and the likelihood of answers, one by one and in batches."""

import copy
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from audiomosaic_jax import (
  ask,
  encoder_files,
  encoder_source,
  evaluate,
  instruct,
  losses,
  sharding,
  torch_files,
  weight_files,
)
from audiomosaic_jax.data import audio_io, questions, text
from audiomosaic_jax.language import (
  audio_weights,
  build,
  captioning,
  chat,
  closed_ended,
  embedders,
  evaluation,
  export,
  peft_adapters,
)
from audiomosaic_jax.models import lora
from tests import tiny_instruct

WORKDIR = []


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
  """A model that knows nothing, with adapters that do something."""
  workdir = tmp_path_factory.mktemp("chat")
  WORKDIR.append(workdir)
  config = tiny_instruct.tiny_config(workdir)
  mesh = sharding.make_mesh(jax.devices()[:1])
  held = tiny_instruct.open_base(config, workdir, mesh)
  model = build.build_model(config, held.llama)
  own = build.init_own(model, config, None, jax.random.key(3))
  own["llama"] = jax.tree.map(
    lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape),
    own["llama"],
  )
  return chat.Chat(config, held, own, mesh)


def notes(count):
  records = questions.demo_records("valid", seed=0)
  return [record.audio_id for record in records[: 2 * count : 2]]


ASKED = ("What?", "Which instrument is playing, and how loud is it?", "Who?")


def test_a_batch_of_questions_is_answered_as_one_by_one(talker):
  sampling = talker.sampling_of(max_new_tokens=8)
  clips = [*notes(2), None]
  together = talker.ask_all(clips, ASKED, sampling=sampling)
  alone = [
    talker.ask(clip, asked, sampling=sampling)
    for clip, asked in zip(clips, ASKED, strict=True)
  ]
  assert together == alone
  assert len(set(together)) == 3


def test_of_a_long_recording_the_window_alone_is_decoded(
  talker, tmp_path, monkeypatch
):
  rate_hz, read, decoded = 44_100, soundfile.SoundFile.read, []
  samples = 0.1 * np.random.default_rng(0).normal(size=20 * rate_hz)
  path = tmp_path / "long.wav"
  soundfile.write(path, samples, rate_hz, subtype="FLOAT")
  whole = audio_io.load_audio(path, sample_rate_hz=16_000)
  expected = audio_io.as_pcm16(whole[:20_720]).astype(np.int32)

  def count(self, frames=-1, **kwargs):
    decoded.append(frames)
    return read(self, frames, **kwargs)

  monkeypatch.setattr(soundfile.SoundFile, "read", count)
  found = talker.read(path)
  assert sum(decoded) < 2 * rate_hz * talker.window_s
  # The last sample, too, is what it was: to one step of 16 bits.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1)


def test_the_length_of_a_recording_is_told_from_its_header(
  tmp_path, monkeypatch, capsys
):
  path = tmp_path / "long.wav"
  soundfile.write(path, np.ones(16_000 * 12), 16_000)
  monkeypatch.setattr(soundfile.SoundFile, "read", None)
  said = types.SimpleNamespace(
    window_s=10.0,
    sampling_of=lambda **changes: None,
    stream=lambda heard, question, **settings: iter([heard]),
  )
  monkeypatch.setattr(chat, "load_chat", lambda *args, **kwargs: said)
  with flagsaver.flagsaver(model="a run"):
    flags.FLAGS(["ask"])
    ask.answer_all(str(path), "What?")
    told = capsys.readouterr()
    assert told.out.strip() == str(path)
    assert "[hears the first 10.0 of 12.0 s]" in told.err
    with pytest.raises(audio_io.BadClipError, match=r"gone\.wav: no such file"):
      ask.answer_all(str(tmp_path / "gone.wav"), "What?")
    path.write_bytes(b"no audio")
    with pytest.raises(audio_io.BadClipError, match="cannot decode"):
      ask.answer_all(str(path), "What?")


@pytest.mark.parametrize(
  ("samples", "message"),
  [
    (np.zeros(9_000, np.int32), "int32.*int16"),
    (np.r_[np.nan, np.zeros(9_000)], "1 NaN.*of 9001"),
    (np.zeros((9_000, 2), np.float32), r"\(9000, 2\).*channels"),
    (np.zeros(0, np.float32), "empty waveform"),
  ],
)
def test_samples_that_are_no_sound_are_refused(talker, samples, message):
  with pytest.raises(ValueError, match=message):
    talker.read(samples)


def test_samples_of_16_bits_are_heard_as_they_are(talker):
  samples = np.arange(-32_768, 32_768, 3, dtype=np.int16)[:20_720]
  np.testing.assert_array_equal(talker.read(samples), samples)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stream_joins_to_the_answer(talker, temperature):
  sampling = talker.sampling_of(max_new_tokens=8, temperature=temperature)
  (clip,) = notes(1)
  pieces = talker.stream(clip, ASKED[0], sampling=sampling, seed=5)
  answer = talker.ask(clip, ASKED[0], sampling=sampling, seed=5)
  assert "".join(pieces) == answer


def test_likelihoods_are_those_of_the_whole_text(talker):
  clips = notes(2)
  waveforms = np.stack([talker.read(clip) for clip in clips])
  question = text.encode_prompt(ASKED[0], "", talker.tokenizer)
  rows = [
    text.encode_answer(answer, talker.tokenizer)
    for answer in ("Harp.", "A loud organ.", "A horn.")
  ]
  heard = jnp.array([True, False])
  fbank = talker.spectrogram(waveforms)
  whole = jax.jit(
    lambda params, *given: talker.model.apply(
      {"params": params}, *given, train=False
    )
  )
  for per_token in (False, True):
    found = closed_ended.likelihoods(
      talker.model,
      talker.params,
      fbank,
      heard,
      jnp.asarray(question),
      jnp.asarray(closed_ended.pad_answers(rows)),
      answers_at_once=2,
      per_token=per_token,
    )
    for column, row in enumerate(rows):
      ids = jnp.tile(jnp.array([*question, *row]), (2, 1))
      logits = whole(talker.params, fbank, ids, ids >= 0, heard)
      for clip in range(2):
        labels = ids[clip : clip + 1].at[:, : len(question)].set(-100)
        total, count = losses.next_token(logits[clip : clip + 1], labels)
        assert count == len(row)
        expected = -total / (count if per_token else 1)
        assert found[clip, column] == pytest.approx(float(expected), rel=1e-4)


def test_scores_of_a_set_do_not_depend_on_the_batch(talker):
  waveforms = [talker.read(clip) for clip in notes(3)]
  settings = talker.config.evaluation
  answers = ["The harp.", "The organ.", "The bass."]
  scores = {}
  for size in (2, 3):
    settings.batch_size = size
    score = evaluation.likelihood_scorer(talker, answers)
    scores[size] = score(iter(waveforms), True)
  assert scores[2].shape == (3, 3)
  np.testing.assert_allclose(scores[2], scores[3], rtol=1e-4)


def test_similarity_finds_the_label_that_was_written(talker):
  embedder = embedders.open_embedder("llama", talker)
  labels = ["the sound of rain", "a bell", "dogs"]
  cosines = closed_ended.similarities(embedder, labels, labels)
  np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
  assert cosines.argmax(axis=1).tolist() == [0, 1, 2]


def test_captioned_clips_are_drawn_with_the_seed(talker, monkeypatch):
  def ask_all(self, clips, asked, **settings):
    return ["a note"] * len(clips)

  own = copy.copy(talker)
  own.config = talker.config.copy_and_resolve_references()
  own.config.evaluation.max_clips = 2

  def drawn(seed):
    own.config.seed = seed
    captioning.evaluate(own, "demo", WORKDIR[0])
    lines = (WORKDIR[0] / "captions" / "demo.jsonl").read_text().splitlines()
    return tuple(json.loads(line)["path"] for line in lines)

  monkeypatch.setattr(chat.Chat, "ask_all", ask_all)
  found = [drawn(seed) for seed in range(5)]
  assert {len(paths) for paths in found} == {2}
  assert len(set(found)) > 1
  assert drawn(3) == found[3]


def test_an_embedder_that_is_not_there_is_named(talker, tmp_path):
  with pytest.raises(FileNotFoundError, match="is no folder"):
    embedders.open_embedder(str(tmp_path / "model"), talker)
  with pytest.raises(ValueError, match="pip install sentence-transformers"):
    embedders.open_embedder(str(tmp_path), talker)


def test_an_unknown_scorer_is_named(talker):
  config = talker.config.copy_and_resolve_references()
  config.evaluation.scorer = "guess"
  with pytest.raises(ValueError, match="'guess' is unknown; use one of"):
    evaluation.check(config, WORKDIR[0])


def test_typed_lines_are_questions_and_recordings(monkeypatch):
  lines = iter(["What?", "/listen b.wav", "And now?", ""])
  monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
  found = list(ask.typed("a.wav"))
  assert found == [("What?", "a.wav"), ("And now?", "b.wav")]


def test_a_folder_that_does_not_answer_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"mode": "pretrain"}')
  with pytest.raises(
    ValueError, match="mode 'pretrain', which does not answer"
  ):
    chat.load_chat(tmp_path)


# Distinct notes, and an answer for each that only its sound tells.
ANSWERS = ("harp", "organ", "brass", "piano", "reed", "bass", "flute", "bell")


@pytest.mark.slow
def test_distinct_clips_are_answered_and_permuted_ones_are_not(
  tmp_path, capsys
):
  """The overfitting control: what is learned is in the sound."""
  clips = notes(8)
  config = tiny_instruct.tiny_config(tmp_path)
  config.stages.order = ("stage_1",)
  # Projector and adapters learn, the encoder stays random.
  config.stages.stage_1.update(
    trainable=(r"projector/.*", r"llama/.*/lora_[ab]"),
    base_lr=1e-2,
    epochs=250.0,
  )
  config.model.llama.update(
    lora_rank=8,
    lora_targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
  )
  config.checkpoint.save_every, config.log_every = 1000, 50
  config.data.pipeline.crop = "start"
  config.evaluation.sets.order = config.evaluation.captions.order = ()
  records = [
    text.Record("Which?", "", clip, "notes", "closed", answer)
    for clip, answer in zip(clips, ANSWERS, strict=True)
  ]
  questions.write_records(records, tmp_path / "questions" / "train.json")
  assert instruct.run(config, tmp_path)
  talker = chat.load_chat(tmp_path)
  sampling = talker.sampling_of(max_new_tokens=8)

  def right(heard):
    asked = ["Which?"] * len(heard)
    found = talker.ask_all(heard, asked, sampling=sampling)
    return sum(map(str.__eq__, found, ANSWERS))

  assert right(clips) == 8
  assert right(clips[1:] + clips[:1]) == 0
  assert right([None] * 8) <= 1


def test_an_exported_model_is_the_model(talker, tmp_path):
  base_folder = talker.config.base.folder.format(workdir=WORKDIR[0])
  difference = export.export(
    talker,
    tmp_path / "exported",
    base_folder=base_folder,
    shard_bytes=10**9,
  )
  assert difference <= export.TOLERANCE
  folder = tmp_path / "exported"
  about = json.loads((folder / "audio_config.json").read_text())
  assert about["num_audio_tokens"] == 4
  assert about["prompt"].startswith("### Instruction:\n{instruction}")
  tensors = weight_files.open_weights(folder / "audio.safetensors")
  again = audio_weights.from_tensors(tensors, talker.params)
  jax.tree.map(
    np.testing.assert_array_equal,
    again,
    {name: talker.params[name] for name in again},
  )
  copied = text.open_tokenizer(folder / "llama")
  assert copied.encode("The harp.") == talker.tokenizer.encode("The harp.")
  with pytest.raises(FileExistsError, match="exported is there"):
    export.export(talker, folder, base_folder=base_folder, shard_bytes=1)


def test_a_tokenizer_of_its_own_is_the_one_that_is_exported(tmp_path):
  folder = tmp_path / "own"
  folder.mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json", "weights.bin"):
    (folder / name).touch()
  (folder / "llama.spm").touch()
  assert export.tokenizer_files(folder) == {
    name: folder / name for name in ("tokenizer.json", "tokenizer_config.json")
  }
  # A file has in a folder the name that it is looked for by.
  assert export.tokenizer_files(folder / "llama.spm") == {
    "tokenizer.model": folder / "llama.spm",
    "tokenizer_config.json": folder / "tokenizer_config.json",
  }
  (folder / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"own has none of .*tokenizer"):
    export.tokenizer_files(folder)


def test_the_command_exports_with_the_tokenizer_of_the_run(
  talker, tmp_path, monkeypatch
):
  given = {}
  config = talker.config.copy_and_resolve_references()
  config.base.update(folder="llama", tokenizer="{workdir}/tokens")
  monkeypatch.setattr(
    export.chat,
    "load_chat",
    lambda *args, **kwargs: types.SimpleNamespace(config=config),
  )
  monkeypatch.setattr(
    export, "export", lambda *args, **kwargs: given.update(kwargs) or 0.0
  )
  values = flags.FlagValues()
  texts = {"model": str(tmp_path), "output": "x", "stage": "", "base": ""}
  arguments = {
    name: flags.DEFINE_string(name, value, "", flag_values=values)
    for name, value in texts.items()
  }
  arguments["shard_gib"] = flags.DEFINE_float(
    "shard_gib", 1.0, "", flag_values=values
  )
  values.mark_as_parsed()
  export.main(["export"], arguments)
  assert given["base_folder"] == "llama"
  assert given["tokenizer"] == str(tmp_path / "tokens")


def test_a_folder_that_answers_is_no_encoder(tmp_path):
  (tmp_path / "config.json").write_text(
    json.dumps({"mode": "instruct", "init": {"run": "runs/first"}})
  )
  for read in (
    encoder_source.find_run,
    encoder_files.load_encoder,
    lambda path: evaluate.run(ConfigDict(), pathlib.Path(path)),
  ):
    with pytest.raises(ValueError, match="holds a model that answers"):
      read(str(tmp_path))


def test_published_weights_are_where_a_model_starts(talker, tmp_path):
  own = {name: talker.params[name] for name in ("encoder", "projector")}
  adapters, _ = lora.split(talker.params["llama"])
  tensors = audio_weights.to_tensors(own) | {
    name.replace(".weight", ".default.weight"): x
    for name, x in peft_adapters.to_tensors(adapters).items()
  }
  path = tmp_path / "extra_weights.safetensors"
  torch_files.write_tensors(tensors, path)
  config = talker.config.copy_and_resolve_references()
  config.init.weights = str(path)
  found = build.init_own(talker.model, config, None, jax.random.key(9))
  jax.tree.map(np.testing.assert_array_equal, found, {**own, "llama": adapters})
