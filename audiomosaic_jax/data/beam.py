"""Shards of a job on Apache Beam, whose workers each do some of them.

Workers need this package and must see what a job reads and writes under the
same paths: in a bucket, or on a network file system.
"""

from collections.abc import Callable, Sequence
from typing import Any


def run_shards(
  shards: Sequence[int],
  work: Callable[[int], Any],
  runner: str,
  runner_options: Sequence[str],
) -> None:
  """Does the work of every shard, and returns when all is done.

  Args:
    shards: their numbers.
    work: of a number; it is pickled, so it should hold paths and no data.
    runner: name of a runner of Beam.
    runner_options: its own options, such as --direct_num_workers=4.

  Raises:
    ImportError: Beam is not installed.
  """
  try:
    import apache_beam as beam
    from apache_beam.options import pipeline_options
  except ImportError:
    raise ImportError(
      f"--runner={runner} needs Apache Beam: "
      "pip install 'audiomosaic-jax[beam]'"
    ) from None
  options = pipeline_options.PipelineOptions(
    [f"--runner={runner}", *runner_options], save_main_session=False
  )
  with beam.Pipeline(options=options) as pipeline:
    _ = (
      pipeline
      | beam.Create(shards)
      # Or the runner fuses the steps, and one worker gets all.
      | beam.Reshuffle()
      | beam.Map(work)
    )
