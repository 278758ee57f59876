"""The shards of a job of preparing audio as an Apache Beam pipeline.

Workers need this package and must see the clips and the output under the same
paths: in a bucket, or on a network file system.
"""

import functools
import os
from collections.abc import Sequence

from audiomosaic_jax.data import prepare_shards
from audiomosaic_jax.data.prepare_job import Job


def run(job: Job, runner: str, runner_options: Sequence[str]) -> None:
  """Writes the shards that are missing, and returns when all are there.

  Args:
    job: what to write.
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
  write = functools.partial(prepare_shards.write_shard, os.fspath(job.folder))
  with beam.Pipeline(options=options) as pipeline:
    _ = (
      pipeline
      | beam.Create(job.missing())
      # Or the runner fuses the steps, and one worker gets all.
      | beam.Reshuffle()
      | beam.Map(write)
    )
