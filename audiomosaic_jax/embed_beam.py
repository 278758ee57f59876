"""The shards of an embedding job as an Apache Beam pipeline.

Workers need this package and must see recordings, encoder and output under the
same paths, such as a network file system; each loads the encoder once.
"""

import functools
import pathlib
from collections.abc import Sequence

from audiomosaic_jax import embed_shards


def run(
  job: embed_shards.Job, runner: str, runner_options: Sequence[str]
) -> None:
  """Embeds the shards that are missing, and returns when all are there.

  Args:
    job: what to embed.
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
      | beam.Create(job.missing())
      # Or the runner fuses the steps, and one worker gets all.
      | beam.Reshuffle()
      # Not the list of recordings, which may be too long for a pipeline.
      | beam.Map(functools.partial(embed_shard, job.folder, job.settings))
    )


def embed_shard(
  folder: pathlib.Path, settings: embed_shards.Settings, shard: int
) -> None:
  """Embeds a shard of an opened job, on whichever worker."""
  embed_shards.read_job(folder, settings).embed_shard(shard)
