"""Order and crops depend on seed and step only, however they are read."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from ramps import Ramps

from audiomosaic_jax.data import pipeline, wrappers

NUM_CLIPS = 11
CLIP = 16


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


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [34, 37, 48])
def test_a_batch_read_in_pieces_has_its_clips_in_order(
  iterate, batch_size, num_workers
):
  single = take(iterate(batch_size=1), 3 * batch_size)
  expected = [
    {
      name: np.concatenate([clip[name] for clip in single[start:][:batch_size]])
      for name in ("waveform", "label", "id")
    }
    for start in range(0, 3 * batch_size, batch_size)
  ]
  batches = iterate(batch_size=batch_size, num_workers=num_workers)
  assert_same(take(batches, 3), expected)
  pipeline.set_step(batches, 1)
  assert_same(take(batches, 2), expected[1:])


class CountedRamps(Ramps):
  """Ramps that remember which were read."""

  def __init__(self, lengths):
    super().__init__(lengths)
    self.read = []

  def __getitem__(self, index):
    self.read.append(index)
    return super().__getitem__(index)


def test_what_is_read_ahead_does_not_grow_with_the_threads(iterate):
  source = CountedRamps([40] * NUM_CLIPS)
  batch_size, num_threads, prefetch_size = 256, 8, 2
  batches = iterate(
    source,
    batch_size=batch_size,
    num_threads=num_threads,
    prefetch_size=prefetch_size,
  )
  next(batches)
  reads = -1
  while reads < len(source.read):
    reads = len(source.read)
    time.sleep(0.3)
  # The one that was taken, and one that waits for room.
  batches_read = prefetch_size + 2
  pieces = 2 * num_threads + 1
  assert reads >= (prefetch_size + 1) * batch_size
  assert reads <= batches_read * batch_size + pieces * pipeline.PIECE_CLIPS


@pytest.mark.parametrize("wrong", [{"num_threads": 0}, {"prefetch_size": 0}])
def test_a_reader_without_threads_or_room_is_refused(iterate, wrong):
  with pytest.raises(ValueError, match="must be at least 1"):
    iterate(**wrong)


def test_a_batch_does_not_keep_the_recordings_it_was_cut_from():
  recording = np.zeros(10 * CLIP, np.int16)
  crop = pipeline.Crop(clip_samples=CLIP, crop="random", pad="repeat")
  clip = crop.random_map({"waveform": recording}, np.random.default_rng(0))
  assert not np.shares_memory(clip["waveform"], recording)


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
