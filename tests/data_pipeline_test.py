"""Order and crops depend on seed and step only; every clip is evaluated."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from audiomosaic_jax.data import audio_io, pipeline, sources, wrappers

NUM_CLIPS = 11
CLIP = 16


class Ramps(sources.Source):
  """Clip i counts up from 1000 i, so that a crop shows where it came from."""

  def __init__(self, lengths, bad=()):
    self.lengths = list(lengths)
    self.ids = [str(i) for i in range(len(self.lengths))]
    self.class_names = ("even", "odd")
    self.multi_hot = False
    self.bad = set(bad)

  @property
  def labels(self):
    return np.arange(len(self), dtype=np.int32) % 2

  def __getitem__(self, index):
    if index in self.bad:
      raise audio_io.BadClipError(self.ids[index], "silent")
    pcm = np.arange(self.lengths[index]) + 1000 * index + 1
    return {
      "waveform": (pcm / 32768).astype(np.float32),
      "label": np.int32(index % 2),
      "id": np.int32(index),
    }


@pytest.fixture(scope="module", autouse=True)
def _flags():
  # Grain's workers ask absl for a flag.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture
def iterate():
  """Makes iterators and closes them at the end."""
  opened = []

  def make(source=None, **changes):
    arguments = dict(
      seed=0,
      batch_size=4,
      clip_samples=CLIP,
      crop="random",
      pad="repeat",
      process_index=0,
      process_count=1,
      num_threads=2,
      prefetch_size=2,
      num_workers=0,
      weights=None,
    )
    if source is None:
      source = Ramps([40] * NUM_CLIPS)
    opened.append(pipeline.train_iterator(source, **{**arguments, **changes}))
    return opened[-1]

  yield make
  for iterator in opened:
    iterator.close()


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    assert set(batch) == set(other) == {"waveform", "label", "id"}
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])


def test_a_batch_has_fixed_shapes_and_16_bits(iterate):
  batch = next(iterate())
  assert batch["waveform"].shape == (4, CLIP)
  assert batch["waveform"].dtype == np.int16
  assert batch["label"].dtype == batch["id"].dtype == np.int32
  np.testing.assert_array_equal(batch["label"], batch["id"] % 2)
  np.testing.assert_array_equal(batch["waveform"][:, 0] // 1000, batch["id"])


def test_every_epoch_is_another_permutation(iterate):
  ids = np.concatenate([b["id"] for b in take(iterate(), 11)])
  epochs = ids.reshape(4, NUM_CLIPS)
  for epoch in epochs:
    assert sorted(epoch) == list(range(NUM_CLIPS))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_same_clip_is_cropped_elsewhere_in_another_epoch(iterate):
  batches = take(iterate(), 44)
  starts = {}
  for batch in batches:
    for index, row in zip(batch["id"], batch["waveform"], strict=True):
      assert (np.diff(row) == 1).all()
      starts.setdefault(int(index), []).append(int(row[0]) - 1000 * index - 1)
  everything = np.concatenate(list(starts.values()))
  assert everything.min() == 0 and everything.max() == 40 - CLIP
  assert min(len(set(values)) for values in starts.values()) > 3


def test_the_seed_decides_order_and_crops(iterate):
  first, again = take(iterate(), 5), take(iterate(num_threads=7), 5)
  assert_same(again, first)
  other = take(iterate(seed=1), 5)
  assert any(
    (a["id"] != b["id"]).any() for a, b in zip(first, other, strict=True)
  )


@pytest.mark.parametrize(
  "process_count, num_workers", [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2)]
)
def test_the_global_batch_does_not_depend_on_processes_or_workers(
  iterate, process_count, num_workers
):
  expected = take(iterate(batch_size=8), 6)
  parts = [
    take(
      iterate(
        batch_size=8 // process_count,
        process_index=index,
        process_count=process_count,
        num_workers=num_workers,
      ),
      6,
    )
    for index in range(process_count)
  ]
  joined = [
    {name: np.concatenate([p[name] for p in batch]) for name in batch[0]}
    for batch in zip(*parts, strict=True)
  ]
  assert_same(joined, expected)


def test_bad_clips_are_replaced_alike_for_any_number_of_processes(iterate):
  def source():
    return wrappers.TolerantSource(
      Ramps([40] * NUM_CLIPS, bad=[2, 5]),
      max_bad_fraction=0.5,
      report_path=None,
    )

  expected = take(iterate(source(), batch_size=4), 8)
  assert not {2, 5} & set(np.concatenate([b["id"] for b in expected]).tolist())
  for index in range(2):
    half = take(
      iterate(source(), batch_size=2, process_index=index, process_count=2), 8
    )
    for batch, whole in zip(half, expected, strict=True):
      np.testing.assert_array_equal(
        batch["waveform"], whole["waveform"][2 * index : 2 * index + 2]
      )


def test_too_many_bad_clips_reach_the_training_loop(iterate):
  source = wrappers.TolerantSource(
    Ramps([40] * 10, bad=range(5)), max_bad_fraction=0.1, report_path=None
  )
  with pytest.raises(wrappers.TooManyBadClipsError, match="2 of 10"):
    take(iterate(source), 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumes_in_the_middle_of_an_epoch(iterate, num_workers):
  expected = take(iterate(), 9)
  interrupted = iterate(num_workers=num_workers)
  take(interrupted, 4)
  state = interrupted.get_state()
  assert state == {"next_index": 4}
  # The state fits any other number of workers.
  resumed = iterate(num_workers=2 - num_workers)
  resumed.set_state(state)
  assert_same(take(resumed, 5), expected[4:])


def test_an_iterator_goes_to_any_step_and_back(iterate):
  expected = take(iterate(), 9)
  iterator = iterate()
  for step in (7, 2, 0):
    pipeline.set_step(iterator, step)
    assert_same(take(iterator, 2), expected[step : step + 2])
  pipeline.grain.experimental.set_next_index(iterator, 5)
  assert pipeline.grain.experimental.get_next_index(iterator) == 5
  assert_same([next(iterator)], expected[5:6])


def test_a_closed_iterator_says_so(iterate):
  iterator = iterate()
  next(iterator)
  iterator.close()
  with pytest.raises(ValueError, match="closed"):
    next(iterator)


def test_fewer_clips_than_a_batch_fill_it(iterate):
  batch = next(iterate(Ramps([40] * 3), batch_size=8))
  assert sorted(batch["id"][:3]) == sorted(batch["id"][3:6]) == [0, 1, 2]


def test_a_short_clip_is_padded_or_repeated(iterate):
  source = Ramps([5] * 4)
  padded = next(iterate(source, pad="pad"))
  for index, row in zip(padded["id"], padded["waveform"], strict=True):
    expected = [*range(1000 * index + 1, 1000 * index + 6), *[0] * 11]
    assert row.tolist() == expected
  phases = set()
  for batch in take(iterate(source), 10):
    rows = batch["waveform"] - 1000 * batch["id"][:, None] - 1
    np.testing.assert_array_equal(rows, (rows[:, :1] + np.arange(CLIP)) % 5)
    phases |= set(rows[:, 0].tolist())
  assert phases == set(range(5))


def test_crop_start_takes_the_beginning(iterate):
  for length in (40, 5):
    batch = next(iterate(Ramps([length] * 4), crop="start"))
    np.testing.assert_array_equal(
      batch["waveform"][:, 0], 1000 * batch["id"] + 1
    )


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(crop="middle"), "choose 'random' or 'start'"),
    (dict(pad="zeros"), "choose 'pad' or 'repeat'"),
    (dict(batch_size=0), "batch_size 0 per process"),
    (dict(process_index=2, process_count=2), "not in 0 to 1"),
    (dict(source=Ramps([])), "nothing to train on"),
  ],
)
def test_settings_that_cannot_work_are_refused(iterate, changes, message):
  with pytest.raises(ValueError, match=message):
    iterate(**changes)


def evaluate(source, **changes):
  arguments = dict(
    batch_size=4, clip_samples=CLIP, hop_samples=8, max_windows=None, pad="pad"
  )
  return list(pipeline.eval_batches(source, **{**arguments, **changes}))


def test_evaluation_sees_every_sample_of_every_clip_once_per_window():
  lengths = [40, 5, 16, 17, 33]
  batches = evaluate(Ramps(lengths))
  assert {b["waveform"].shape for b in batches} == {(4, CLIP)}
  assert {b["waveform"].dtype for b in batches} == {np.dtype(np.int16)}
  joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  valid = joined["valid"]
  count = valid.sum()
  assert valid[:count].all() and not joined["waveform"][count:].any()
  clips = joined["clip"][:count]
  assert (np.diff(clips) >= 0).all() and set(clips) == set(range(5))
  np.testing.assert_array_equal(joined["label"][:count], clips % 2)
  for index, length in enumerate(lengths):
    seen = joined["waveform"][:count][clips == index]
    seen = set(seen.ravel().tolist()) - {0}
    first = 1000 * index + 1
    assert seen == set(range(first, first + length))


def test_windows_cover_the_end_and_can_be_thinned_out():
  def starts(length, max_windows=None):
    return pipeline.window_starts(
      length, clip_samples=16, hop_samples=8, max_windows=max_windows
    ).tolist()

  assert starts(5) == starts(16) == [0]
  assert starts(17) == [0, 1]
  assert starts(32) == [0, 8, 16]
  assert starts(41) == [0, 8, 16, 24, 25]
  assert starts(41, 3) == [0, 16, 25]
  assert starts(41, 1) == [0]


def test_evaluation_does_not_depend_on_the_batch_size():
  def rows(batch_size):
    return [
      (int(clip), row.tolist())
      for batch in evaluate(Ramps([40, 5, 30]), batch_size=batch_size)
      for clip, row, valid in zip(
        batch["clip"], batch["waveform"], batch["valid"], strict=True
      )
      if valid
    ]

  assert rows(1) == rows(4) == rows(64)


def test_evaluation_stops_at_a_bad_clip_or_leaves_it_out():
  source = Ramps([16] * 4, bad=[1])
  with pytest.raises(audio_io.BadClipError, match="1: silent"):
    evaluate(source)
  (batch,) = evaluate(
    wrappers.TolerantSource(source, max_bad_fraction=0.5, report_path=None)
  )
  assert batch["clip"][batch["valid"]].tolist() == [0, 2, 3]


def test_batches_are_made_without_jax_flax_or_tensorflow():
  # Grain imports jax where there is one, so jax is made impossible to import.
  code = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("jax", "jaxlib", "flax", "tensorflow"):
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from audiomosaic_jax.data import datasets, pipeline
from audiomosaic_jax.data import beam, prepare, prepare_output
source = datasets.guard(
  datasets.make_dataset("demo", "pretrain", sample_rate_hz=16_000),
  cache_bytes=0, max_bad_fraction=0.0, report_path=None)
iterator = pipeline.train_iterator(
  source, seed=0, batch_size=2, clip_samples=16_000, crop="random",
  pad="repeat", process_index=0, process_count=1, num_threads=1,
  prefetch_size=1, num_workers=0, weights=None)
assert next(iterator)["waveform"].any(axis=1).all()
iterator.close()
assert not {"jax", "flax", "tensorflow"} & set(sys.modules)
print("fine")
"""
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert result.stdout.strip() == "fine", result.stderr
