r"""Embeds a folder of recordings, of any number and any length.

  python -m audiomosaic_jax.embed --encoder=runs/demo --input=recordings/ \
    --output=out.parquet

--input is a folder, a pattern in quotes ("sites/*/*.flac"), or a CSV with a
column path and maybe start_s and end_s. --output is named after its format:

  out.parquet  a folder of Parquet files, which pandas, Polars, DuckDB, Spark
               and pyarrow read as one table: id, start_s, end_s, embedding,
               and of a classifier logits
  out.npz      the same columns as arrays of NumPy, all in one file
  out.zarr     the same as a Zarr group (pip install 'audiomosaic-jax[zarr]')

A row is a recording; with --segment_s=5 every five seconds of it, and with
--frames every frame. Recordings without usable sound are left out, listed in
--bad and counted; more than --max_bad_fraction of them make the command fail,
after the others are written.

The same command again goes on where it was stopped; what was lost is at most
the shard that was being computed. Several processes, of JAX or of SLURM, share
the shards. With --runner=DirectRunner, DataflowRunner, FlinkRunner or
SparkRunner the shards are an Apache Beam pipeline instead, whose own options
follow "--" (pip install 'audiomosaic-jax[beam]').
"""

import functools
import json
import pathlib
import time

import jax
from absl import app, flags, logging

from audiomosaic_jax import cluster, embed_output, embed_shards, files, heap
from audiomosaic_jax.data import beam, recordings

ENCODER = flags.DEFINE_string(
  "encoder", None, "A workdir, or what was imported."
)
INPUT = flags.DEFINE_string("input", None, "A folder, a pattern or a CSV.")
OUTPUT = flags.DEFINE_string("output", None, ".parquet, .npz or .zarr")
FRAMES = flags.DEFINE_bool("frames", False, "A row for every frame.")
HOP_MS = flags.DEFINE_float(
  "hop_ms", None, "From one frame to the next: 160, 80, 40 or 20."
)
OVERLAP = flags.DEFINE_float(
  "overlap", 0.0, "Part of a window that the next one sees again."
)
SEGMENT_S = flags.DEFINE_float(
  "segment_s", 0.0, "A row for so many seconds; 0 is whole recordings."
)
SEGMENT_HOP_S = flags.DEFINE_float(
  "segment_hop_s", None, "From one segment to the next; default: its length."
)
DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  ["float32", "bfloat16"],
  "Of matrix products; bfloat16 is faster on TPUs and GPUs.",
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Windows at once; more use an accelerator better."
)
NUM_THREADS = flags.DEFINE_integer("num_threads", 4, "Files decoded at once.")
SHARD_SIZE = flags.DEFINE_integer("shard_size", 256, "Recordings per file.")
BAD = flags.DEFINE_string(
  "bad", None, "List of bad recordings; default: OUTPUT.bad.jsonl"
)
MAX_BAD_FRACTION = flags.DEFINE_float(
  "max_bad_fraction", 0.05, "Share of bad recordings that is no failure."
)
KEEP_FREED_MEMORY = flags.DEFINE_bool(
  "keep_freed_memory",
  True,
  "Keep freed memory for the next batch, which is faster on a CPU.",
)
RUNNER = flags.DEFINE_string(
  "runner", "", "A runner of Apache Beam; default: this process."
)

# Seconds between two looks for the shards of other processes.
POLL_S = 2.0
# Looks after which the person who waits is told for what.
REMIND_EVERY = 60


def main(argv: list[str]) -> None:
  """Embeds what is not there yet, then joins it."""
  logging.set_verbosity(logging.WARNING)
  if KEEP_FREED_MEMORY.value:
    heap.keep_freed_memory()
  cluster.initialize_distributed()
  with cluster.ends_alone():
    try:
      bad, total = run(argv[1:])
    except (FileNotFoundError, ValueError, ImportError) as error:
      cluster.end(f"error: {error}")
  if bad > MAX_BAD_FRACTION.value * total:
    raise SystemExit(
      f"error: {bad} of {total} recordings have no usable sound, more than "
      f"--max_bad_fraction={MAX_BAD_FRACTION.value:g}; the others are written"
    )


def run(runner_options: list[str]) -> tuple[int, int]:
  """Does the job of the flags; returns (bad recordings, recordings)."""
  if runner_options and not RUNNER.value:
    raise ValueError(f"unexpected arguments: {' '.join(runner_options)}")
  output = pathlib.Path(OUTPUT.value).expanduser()
  embed_output.check_format(output)
  embed_output.check_absent(output)
  folder = embed_output.parts_folder(output)
  settings = embed_shards.Settings(
    encoder=ENCODER.value,
    dtype=DTYPE.value,
    batch_size=BATCH_SIZE.value,
    frames=FRAMES.value,
    hop_ms=HOP_MS.value,
    overlap=OVERLAP.value,
    segment_s=SEGMENT_S.value,
    segment_hop_s=SEGMENT_HOP_S.value or SEGMENT_S.value,
    num_threads=NUM_THREADS.value,
  )
  found = recordings.find(INPUT.value)
  where = embed_shards.printable(INPUT.value)
  print(f"{len(found):,} recordings in {where}", flush=True)
  job = embed_shards.Job(folder, settings, found, SHARD_SIZE.value)
  job.open()
  # Or one that comes late finds the output of the others.
  cluster.wait_for_all("embedding job is open")
  if RUNNER.value:
    # Not the list of recordings, which may be too long for a pipeline.
    work = functools.partial(embed_shards.embed_shard, folder, settings)
    beam.run_shards(job.missing(), work, RUNNER.value, runner_options)
  else:
    embed_here(job)
  # No process may leave before the last has its shards; process 0 then joins
  # them, and takes them away.
  waited = 0
  while job.missing() and not embed_output.is_joined(job, output):
    if waited % REMIND_EVERY == 0:
      print(f"waiting for {len(job.missing())} shards of others", flush=True)
    waited += 1
    time.sleep(POLL_S)
  if jax.process_index():
    return 0, len(found)
  return finish(job, output), len(found)


def embed_here(job: embed_shards.Job) -> None:
  """Embeds the shards of this process, with a bar for the person who waits."""
  import tqdm

  missing = job.missing()
  count, index = jax.process_count(), jax.process_index()
  own = [shard for shard in missing if shard % count == index]
  if len(missing) < len(job.shards):
    print(
      f"{len(job.shards) - len(missing)} of {len(job.shards)} shards are there",
      flush=True,
    )
  started, seconds = time.monotonic(), 0.0
  total = sum(len(job.shards[shard]) for shard in own)
  with tqdm.tqdm(total=total, unit="recording", smoothing=0.05) as bar:

    def progress(duration_s: float) -> None:
      nonlocal seconds
      seconds += duration_s
      speed = seconds / (time.monotonic() - started)
      bar.set_postfix_str(
        f"{seconds / 3600:.2f} h of sound, {speed:.0f} x real time",
        refresh=False,
      )
      bar.update()

    for shard in own:
      job.embed_shard(shard, progress)


def finish(job: embed_shards.Job, output: pathlib.Path) -> int:
  """Joins the shards and tells what there is; returns the bad recordings."""
  bad = job.bad()
  path = pathlib.Path(BAD.value or f"{output}.bad.jsonl")
  if bad:
    lines = (json.dumps(record) + "\n" for record in bad)
    files.write_text(path, "".join(lines))
    print(f"{len(bad)} recordings were left out: {path}", flush=True)
    for record in bad[:3]:
      line = f"  {record['id']}: {record['reason']}"
      print(embed_shards.printable(line), flush=True)
  rows = embed_output.join(job, output)
  print(f"{rows:,} rows in {output}", flush=True)
  return len(bad)


if __name__ == "__main__":
  flags.mark_flags_as_required(["encoder", "input", "output"])
  app.run(main)
