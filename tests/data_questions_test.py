"""Questions pass the pipeline of clips as clips do."""

import json
import pathlib

import numpy as np
import pytest
import soundfile

from audiomosaic_jax.data import datasets, pipeline, questions, text, wrappers
from audiomosaic_jax.data.text import IGNORED, Record

TOKENIZER = pathlib.Path(__file__).parent / "golden" / "prompt"


def record(audio_id, answer="a dog barks."):
  return Record("What is it?", "", audio_id, "toy", "caption", answer)


def source_of(records, root, **changes):
  settings = {
    "audio_root": str(root),
    "tokenizer": text.open_tokenizer(TOKENIZER),
    "cutoff": 60,
    "response_only": True,
    "sample_rate_hz": 16_000,
  }
  return questions.QuestionSource(records, **(settings | changes))


def write_clip(path, level=0.5):
  soundfile.write(path, np.full(8000, level, np.float32), 16_000)


def batches_of(source, batch_size):
  return pipeline.train_iterator(
    source,
    seed=0,
    batch_size=batch_size,
    clip_samples=4000,
    crop="start",
    pad="pad",
    process_index=0,
    process_count=1,
    num_threads=1,
    prefetch_size=1,
    num_workers=0,
    weights=None,
  )


def test_a_batch_holds_sound_text_and_who_is_heard(tmp_path):
  write_clip(tmp_path / "a.wav")
  records = [record("a.wav"), record("empty", "nothing."), record("")]
  source = datasets.guard(
    source_of(records, tmp_path),
    cache_bytes=2**20,
    max_bad_fraction=0.0,
    report_path=None,
  )
  batch = next(batches_of(source, 3))
  arrays = questions.to_arrays(batch, (16, 40, 60))
  for row in range(3):
    number = int(batch["id"][row])
    ids, labels = text.encode_example(
      records[number],
      text.open_tokenizer(TOKENIZER),
      cutoff=60,
      response_only=True,
    )
    assert arrays["ids"][row][arrays["valid"][row]].tolist() == ids
    assert arrays["labels"][row][: len(ids)].tolist() == labels
    assert (arrays["labels"][row][len(ids) :] == IGNORED).all()
    heard = number == 0
    assert arrays["has_audio"][row] == heard
    assert arrays["waveform"][row].any() == heard


@pytest.mark.parametrize(
  ("count", "length"), [(3, 16), (16, 16), (17, 40), (40, 40), (55, 60)]
)
def test_texts_are_padded_to_the_first_bucket_that_holds_them(count, length):
  label = np.full((2, 2, 55), questions.PADDING, np.int32)
  label[:, 1] = IGNORED
  label[1, :, :count] = 7
  label[0, :, :2] = 5
  batch = {
    "label": label,
    "waveform": np.zeros((2, 4), np.int16),
    "has_audio": np.ones(2, bool),
  }
  arrays = questions.to_arrays(batch, (16, 40, 60))
  for name in ("ids", "labels", "valid"):
    assert arrays[name].shape == (2, length)
  assert arrays["valid"].sum(axis=1).tolist() == [2, count]


def test_bad_clips_are_replaced_and_listed_and_silence_is_not_bad(tmp_path):
  write_clip(tmp_path / "good.wav")
  (tmp_path / "bad.wav").write_bytes(b"not audio")
  records = [record("bad.wav"), record("good.wav"), record("")]
  report = tmp_path / "bad.jsonl"
  guarded = datasets.guard(
    source_of(records, tmp_path),
    cache_bytes=0,
    max_bad_fraction=0.4,
    report_path=report,
  )
  assert [int(guarded[i]["id"]) for i in range(3)] == [1, 1, 2]
  (line,) = report.read_text().splitlines()
  assert json.loads(line)["path"].endswith("bad.wav")
  strict = datasets.guard(
    source_of(records, tmp_path),
    cache_bytes=0,
    max_bad_fraction=0.1,
    report_path=None,
  )
  with pytest.raises(wrappers.TooManyBadClipsError, match="1 of 3 clips"):
    strict[0]


@pytest.mark.parametrize("audio_id", ["../a.wav", "b/../../a.wav", "/a.wav"])
def test_no_id_leads_out_of_its_folder(tmp_path, audio_id):
  with pytest.raises(ValueError, match=r"leads out of data\.audio_root"):
    source_of([record(audio_id)], tmp_path)
  assert source_of([record(audio_id)], "").path(0) == audio_id


def test_packaged_notes_are_asked_about_twice_and_by_their_names(tmp_path):
  notes = datasets.labelled("valid", data_dir="demo", sample_rate_hz=16_000)
  records = questions.demo_records("valid", seed=0)
  heard = [r for r in records if r.has_audio]
  assert len(heard) == 2 * len(notes)
  for index, (label,) in enumerate(notes.label_sets):
    for asked in heard[2 * index : 2 * index + 2]:
      assert asked.audio_id == str(notes.path(index))
      assert notes.class_names[label] in asked.output
  assert records == questions.demo_records("valid", seed=0)
  assert records != questions.demo_records("valid", seed=1)
  path = tmp_path / "valid.json"
  questions.write_records(records, path)
  assert text.read_records([path]) == records
