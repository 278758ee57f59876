"""Prompts, tokens and labels are those of the published training."""

import json
import pathlib

import pytest

from audiomosaic_jax.data import text

FOLDER = pathlib.Path(__file__).parent / "golden" / "prompt"
GOLDEN = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
FILES = pytest.mark.parametrize("file", text.TOKENIZER_FILES)


@FILES
def test_ids_and_labels_are_the_published_ones(file):
  tokenizer = text.open_tokenizer(FOLDER / file)
  for case in GOLDEN["cases"]:
    record = text.Record(**case["record"])
    prompt = text.render(record.instruction, record.input)
    assert prompt == case["prompt"]
    found = text.encode_prompt(record.instruction, record.input, tokenizer)
    assert found == case["prompt_ids"]
    for response_only, name in (
      (False, "labels_train_on_inputs"),
      (True, "labels_response_only"),
    ):
      ids, labels = text.encode_example(
        record,
        tokenizer,
        cutoff=case["cutoff_len"],
        response_only=response_only,
      )
      assert ids == case["input_ids"]
      assert labels == case[name]


@FILES
def test_decoding_leaves_special_tokens_out(file):
  tokenizer = text.open_tokenizer(FOLDER / file)
  for case in GOLDEN["decode_skip_special"]:
    assert tokenizer.decode(case["ids"]) == case["text"]


@FILES
def test_pieces_of_a_stream_are_whole_characters_and_join_to_the_text(file):
  tokenizer = text.open_tokenizer(FOLDER / file)
  for case in GOLDEN["decode_skip_special"]:
    decoder = text.StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in case["ids"]]
    assert not any(text.REPLACEMENT in piece for piece in pieces)
    assert "".join([*pieces, decoder.finish()]) == case["text"]
  # The last case has characters of three tokens each.
  assert "" in pieces


def test_both_files_are_one_tokenizer():
  fast, piece = (text.open_tokenizer(FOLDER / f) for f in text.TOKENIZER_FILES)
  assert fast.vocab_size == piece.vocab_size
  ids = [(t.bos_id, t.eos_id, t.pad_id) for t in (fast, piece)]
  assert ids == [(1, 2, 0)] * 2


def test_an_answer_is_what_follows_the_prompt():
  tokenizer = text.open_tokenizer(FOLDER)
  record = text.Record("", "", "", "", "", "a dog barks.")
  ids, _ = text.encode_example(
    record, tokenizer, cutoff=100, response_only=True
  )
  prompt = text.encode_prompt("", "", tokenizer)
  answer = text.encode_answer("a dog barks.", tokenizer)
  assert [*prompt, *answer, tokenizer.eos_id] == ids


ROW = {name: "x" for name in text.Record._fields}


@pytest.mark.parametrize(
  "content",
  [json.dumps([ROW, ROW]), json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n"],
  ids=["list", "lines"],
)
def test_a_list_and_lines_are_read_alike(tmp_path, content):
  path = tmp_path / "questions.json"
  path.write_text(content)
  assert text.read_records([path]) == [text.Record(*"xxxxxx")] * 2


def test_a_line_may_hold_what_other_texts_break_lines_at(tmp_path):
  path = tmp_path / "questions.json"
  row = ROW | {"output": "one\u2028two\u0085three"}
  line = json.dumps(row, ensure_ascii=False)
  path.write_bytes(f"{line}\r\n{line}\n".encode())
  assert [r.output for r in text.read_records([path])] == [row["output"]] * 2


def test_a_record_without_a_field_is_named(tmp_path):
  path = tmp_path / "questions.json"
  path.write_text(json.dumps([ROW, {"instruction": "x", "output": "y"}]))
  message = f"record 2 of {path} lacks input, audio_id, dataset, task"
  with pytest.raises(ValueError, match=message):
    text.read_records([path])


def test_what_is_no_json_and_what_is_not_there_is_named(tmp_path):
  path = tmp_path / "questions.json"
  path.write_text("{broken")
  with pytest.raises(ValueError, match=r"questions\.json is not JSON"):
    text.read_records([path])
  with pytest.raises(FileNotFoundError, match=r"other\.json does not exist"):
    text.read_records([tmp_path / "other.json"])


@pytest.mark.parametrize(
  ("audio_id", "heard"), [("a.wav", True), ("", False), ("empty", False)]
)
def test_a_record_says_whether_there_is_a_clip(audio_id, heard):
  assert text.Record("", "", audio_id, "", "", "").has_audio == heard


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"{tmp_path} has none of"):
    text.open_tokenizer(tmp_path)


def test_a_trained_tokenizer_reads_back_every_text(tmp_path):
  texts = ["The sound of a flute.", "Ein Hörbeispiel — 音频"]
  path = tmp_path / "tokenizer.json"
  text.train_tokenizer(texts, 300, path)
  tokenizer = text.open_tokenizer(tmp_path)
  assert tokenizer.vocab_size <= 300
  for line in [*texts, "nie gesehen: ☂"]:
    assert tokenizer.decode(tokenizer.encode(line)) == line
  learned, raw = texts[0], "qzxj"
  assert len(tokenizer.encode(learned)) < len(learned) / 2
  assert len(tokenizer.encode(raw)) == len(raw)
