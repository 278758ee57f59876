"""Which settings make another run."""

import tiny_supervised as tiny

from audiomosaic_jax import (
  results,
)


def test_settings_that_change_no_result_do_not_make_another_run():
  config = tiny.fine_tuning()
  place = results.Place("main", None, 0, 0)
  before = results.fingerprint(config, place)
  config.data.pipeline.update(num_threads=7, prefetch_size=9, num_workers=3)
  config.data.guard.cache_bytes = 5
  config.evaluation.update(confidence=0.9, num_resamples=7)
  config.name = "other"
  assert results.fingerprint(config, place) == before
  config.data.pipeline.pad = "repeat"
  assert results.fingerprint(config, place) != before
