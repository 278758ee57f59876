"""Weights follow their formula; draws are balanced, distinct and repeatable."""

import itertools
import pickle

import numpy as np
import pytest
from absl import flags

from audiomosaic_jax.data import pipeline, sampling, sources

CLIP = 8


class Numbered(sources.Source):
  """Clip i is the constant i + 1."""

  def __init__(self, size):
    self.ids = [f"clip{i}" for i in range(size)]
    self.class_names = ()
    self.multi_hot = False

  @property
  def labels(self):
    return np.full(len(self), -1, np.int32)

  def __getitem__(self, index):
    waveform = np.full(CLIP, (index + 1) / 32768, np.float32)
    return {
      "waveform": waveform,
      "label": np.int32(-1),
      "id": np.int32(index),
    }


@pytest.fixture
def iterate():
  opened = []

  def make(size, weights, **changes):
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
      weights=weights,
    )
    opened.append(
      pipeline.train_iterator(Numbered(size), **{**arguments, **changes})
    )
    return opened[-1]

  yield make
  for iterator in opened:
    iterator.close()


def ids(iterator, num_batches):
  batches = itertools.islice(iterator, num_batches)
  return np.concatenate([batch["id"] for batch in batches])


def draws(weights, seed=0):
  clips = pipeline.grain.MapDataset.source(Numbered(4))
  size = len(getattr(weights, "weights", weights))
  if size != 4:
    clips = pipeline.grain.MapDataset.source(Numbered(size))
  return sampling.WeightedDraws(clips, weights, seed=seed)


def test_a_weight_is_the_sum_of_the_rarities_of_its_classes():
  label_sets = [(0,), (0, 1), (0,), (), (1, 2)]
  rarity = [1000 / 3.01, 1000 / 2.01, 1000 / 1.01]
  np.testing.assert_allclose(
    sampling.clip_weights(label_sets, 4),
    [rarity[0], rarity[0] + rarity[1], rarity[0], 0, rarity[1] + rarity[2]],
  )


def test_clips_are_drawn_in_proportion_to_their_weights():
  weights = np.array([0.0, 1.0, 2.0, 5.0])
  stream = draws(weights)
  counts = np.bincount([stream.clip(k) for k in range(8_000)], minlength=4)
  assert counts[0] == 0
  # Four standard deviations of a binomial count.
  share = weights / weights.sum()
  np.testing.assert_array_less(
    np.abs(counts - 8_000 * share),
    4 * np.sqrt(8_000 * share * (1 - share)) + 1e-9,
  )


def test_rare_and_common_classes_come_equally_often(iterate):
  label_sets = [(0,)] * 90 + [(1,)] * 10
  weights = sampling.clip_weights(label_sets, 2)
  drawn = ids(iterate(100, weights), 500)
  assert abs(np.mean(drawn < 90) - 0.5) < 0.05


@pytest.mark.parametrize(
  "process_count, num_workers, distinct",
  [
    *((2, 0, False), (4, 0, False), (1, 2, False)),
    *((2, 0, True), (4, 0, True), (1, 2, True)),
  ],
)
def test_the_global_batch_does_not_depend_on_processes_or_workers(
  iterate, process_count, num_workers, distinct
):
  if not flags.FLAGS.is_parsed():  # Grain's workers ask absl for a flag.
    flags.FLAGS.mark_as_parsed()
  weights = np.arange(1.0, 12)
  if distinct:
    weights = sampling.WithoutReplacement(weights, 6)
  expected = ids(iterate(11, weights, batch_size=8), 4).reshape(4, 8)
  size = 8 // process_count
  parts = [
    ids(
      iterate(
        11,
        weights,
        batch_size=size,
        process_index=index,
        process_count=process_count,
        num_workers=num_workers,
      ),
      4,
    ).reshape(4, size)
    for index in range(process_count)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize("distinct", [False, True])
def test_a_weighted_run_resumes_where_it_stopped(iterate, distinct):
  weights = np.arange(1.0, 12)
  if distinct:
    weights = sampling.WithoutReplacement(weights, 6)
  expected = ids(iterate(11, weights), 9)
  again = iterate(11, weights)
  pipeline.set_step(again, 4)
  np.testing.assert_array_equal(ids(again, 5), expected[16:])
  other = ids(iterate(11, weights, seed=1), 9)
  assert (other != expected).any()


def test_draws_without_replacement_are_distinct_within_an_epoch():
  weights = np.array([1.0, 100.0, 0.0, 1.0, 1.0, 1.0])
  stream = draws(sampling.WithoutReplacement(weights, 3))
  epochs = np.array([stream.clip(k) for k in range(1_500)]).reshape(500, 3)
  assert all(len(set(epoch)) == 3 for epoch in epochs.tolist())
  assert not (epochs == 2).any()
  # The first draw of an epoch has the probabilities of a single draw.
  assert abs(np.mean(epochs[:, 0] == 1) - 100 / 104) < 0.04
  assert len({tuple(epoch) for epoch in epochs.tolist()}) > 20
  # Any order of asking gives the same clips.
  fresh = draws(sampling.WithoutReplacement(weights, 3))
  assert [fresh.clip(k) for k in (1_400, 5, 800, 2)] == [
    epochs.flat[k] for k in (1_400, 5, 800, 2)
  ]
  assert pickle.loads(pickle.dumps(fresh)).clip(7) == epochs.flat[7]


def test_no_weights_change_nothing(iterate):
  epochs = ids(iterate(12, None), 6).reshape(2, 12)
  assert all(sorted(epoch) == list(range(12)) for epoch in epochs)


@pytest.mark.parametrize(
  "weights, message",
  [
    (np.ones(3), r"shape \(3,\) do not fit 4 clips"),
    (np.zeros(4), "all weights are 0"),
    (np.array([1, np.nan, 1, 1]), "weight 1 is nan"),
    (np.array([1, 1, -2.0, 1]), "weight 2 is -2"),
    (
      sampling.WithoutReplacement(np.array([1.0, 0, 0, 1]), 3),
      "3 draws without replacement from 2 clips .* use 1 to 2",
    ),
    (sampling.WithoutReplacement(np.ones(4), 0), "use 1 to 4"),
  ],
)
def test_weights_that_cannot_work_are_refused(iterate, weights, message):
  with pytest.raises(ValueError, match=message):
    iterate(4, weights)


def test_weights_are_read_by_name_and_not_by_position(tmp_path):
  path = tmp_path / "weights.csv"
  sampling.write_weights(path, ["a", "b, c", "d"], [0.1, 2.0, 0.0])
  np.testing.assert_array_equal(
    sampling.read_weights(path, ["d", "a", "b, c"]), [0.0, 0.1, 2.0]
  )
  with pytest.raises(ValueError, match=r"no weight for 1 of 2 clips.*'e'"):
    sampling.read_weights(path, ["a", "e"])
  path.write_text("id,weight\na,1\nb,heavy\n")
  with pytest.raises(ValueError, match="line 3: weight 'heavy'"):
    sampling.read_weights(path, ["a"])
