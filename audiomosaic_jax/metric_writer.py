"""Metrics of a run: TensorBoard, one JSON line per step, and progress.

clu's writers need TensorFlow for one file only, its TensorBoard writer. Where
TensorFlow is absent, `use_tensorboardx` puts a writer built on tensorboardX in
that place, after which all of clu works (`clu.periodic_actions` too).
"""

import importlib.util
import json
import math
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from etils import epath

METRICS_FILE = "metrics.jsonl"
PARAMETERS_FILE = "parameters.txt"

_CLU_SUMMARY_WRITER = "clu.metric_writers.summary_writer"


def use_tensorboardx() -> None:
  """Lets clu write TensorBoard files where TensorFlow is not installed.

  Does nothing where it is, or when called again. Must run before the first
  import of `clu.metric_writers` or `clu.periodic_actions`.
  """
  if importlib.util.find_spec("tensorflow") is not None:
    return
  if _CLU_SUMMARY_WRITER in sys.modules:
    return
  import tensorboardX

  class SummaryWriter:
    """The part of clu's TensorBoard writer that the project uses."""

    def __init__(self, logdir: str):
      self._writer = tensorboardX.SummaryWriter(logdir)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
      for name, value in scalars.items():
        self._writer.add_scalar(name, float(value), step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
      for name, text in texts.items():
        self._writer.add_text(name, text, step)

    def flush(self) -> None:
      self._writer.flush()

    def close(self) -> None:
      self._writer.close()

  module = types.ModuleType(_CLU_SUMMARY_WRITER)
  module.SummaryWriter = SummaryWriter
  sys.modules[_CLU_SUMMARY_WRITER] = module


class MetricWriter:
  """Writes metrics where people and programs look for them.

  * `workdir/metrics.jsonl`: `{"step": 120, "loss": 4.123}` per write; values
    that are not finite are null. A resumed run drops the lines after the step
    it resumed from, so no step appears twice.
  * `workdir/tensorboard/`: the same through `clu.metric_writers`.
  * standard output: a bar with the remaining time on a terminal, otherwise
    lines like `step 120/1000  loss 4.123  1234 pairs/s  ETA 1m12s`.

  Process 0 writes; on the others every method does nothing.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    total_steps: int,
    start_step: int,
    progress_metrics: tuple[str, ...],
  ):
    """Opens the files, creating `workdir`.

    Args:
      workdir: the run's folder, local or mounted.
      total_steps: the step at which the run ends.
      start_step: steps already made: 0, or the restored step.
      progress_metrics: metrics to show while running, in this order; one
        called `pairs_per_s` is shown as "1234 pairs/s".
    """
    self._total_steps = total_steps
    self._progress_metrics = progress_metrics
    self._first_write: tuple[int, float] | None = None
    self._shown: dict[str, str] = {}
    self._writes = jax.process_index() == 0
    self._bar = None
    if not self._writes:
      return
    use_tensorboardx()
    from clu import metric_writers

    self._workdir = epath.Path(workdir)
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._metrics_path = self._workdir / METRICS_FILE
    self.rewind(start_step)
    self._clu = metric_writers.create_default_writer(
      self._workdir / "tensorboard", asynchronous=True
    )
    if sys.stdout.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps,
        initial=start_step,
        unit="step",
        file=sys.stdout,
        dynamic_ncols=True,
      )

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def rewind(self, step: int) -> None:
    """Forgets what was written after `step`, to which the run went back.

    The file is replaced in one rename, so a kill leaves the old or the new
    one. A last line that a kill cut short is dropped too.

    Args:
      step: the restored step.
    """
    if not self._writes:
      return
    self._first_write = None
    if self._bar is not None:
      self._bar.n = step
    if self._metrics_path.exists():
      kept = [r for r in read_metrics(self._workdir) if r["step"] <= step]
      text = "".join(map(_json_line, kept))
      temporary = self._workdir / f"{METRICS_FILE}.tmp"
      temporary.write_text(text)
      temporary.replace(self._metrics_path)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Records metrics of a finished step and shows the progress.

    Args:
      step: number of finished updates.
      scalars: name -> number or one-element array; waits for the device if
        the arrays are not ready.
    """
    if not self._writes:
      return
    values = {name: float(value) for name, value in scalars.items()}
    # Opened for each write, so that the line is there for whoever follows.
    with self._metrics_path.open("a") as file:
      file.write(_json_line({"step": step} | values))
    self._clu.write_scalars(step, values)
    self._show(step, values)

  def _show(self, step: int, values: Mapping[str, float]) -> None:
    """Moves the bar, or prints a line."""
    chosen = {
      name: f"{values[name]:.4g}"
      for name in self._progress_metrics
      if name in values
    }
    if self._bar is not None:
      self._shown |= chosen
      self._bar.set_postfix(self._shown, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    fields = [f"step {step}/{self._total_steps}"]
    for name, text in chosen.items():
      thing, is_rate, _ = name.partition("_per_s")
      fields.append(f"{text} {thing}/s" if is_rate else f"{name} {text}")
    remaining_s = self._remaining_s(step)
    if remaining_s is not None:
      fields.append(f"ETA {format_duration(remaining_s)}")
    print("  ".join(fields), flush=True)

  def _remaining_s(self, step: int) -> float | None:
    """Returns the seconds to the last step, None if there is no telling.

    Counted from the first write, which leaves compilation out and keeps
    evaluations and checkpoints in.
    """
    if self._first_write is None:
      self._first_write = step, time.monotonic()
    first_step, first_s = self._first_write
    if step <= first_step:
      return None
    per_step_s = (time.monotonic() - first_s) / (step - first_step)
    return max(self._total_steps - step, 0) * per_step_s

  def log(self, message: str) -> None:
    """Prints one line, above the bar if there is one.

    Args:
      message: for the person who is watching.
    """
    if not self._writes:
      return
    if self._bar is not None:
      self._bar.write(message, file=sys.stdout)
    else:
      print(message, flush=True)

  def log_parameter_overview(self, params: Any) -> None:
    """Prints the number of parameters; lists them in `parameters.txt`.

    Args:
      params: pytree of arrays or of `jax.ShapeDtypeStruct`s.
    """
    if not self._writes:
      return
    from clu import parameter_overview

    path = self._workdir / PARAMETERS_FILE
    path.write_text(
      parameter_overview.get_parameter_overview(params, include_stats=False)
      + "\n"
    )
    count = parameter_overview.count_parameters(params)
    arrays = len(jax.tree.leaves(params))
    self.log(f"{count:,} parameters in {arrays} arrays, listed in {path}")

  def flush(self) -> None:
    """Waits until everything written so far is on disk."""
    if self._writes:
      self._clu.flush()

  def close(self) -> None:
    """Flushes, and ends the bar."""
    if self._writes:
      self._clu.close()
    if self._bar is not None:
      self._bar.close()


def format_duration(seconds: int | float) -> str:
  """Returns two units at most: 42s, 1m12s, 3h05m, 2d04h."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  days, h = divmod(hours, 24)
  if days:
    return f"{days}d{h:02d}h"
  if hours:
    return f"{h}h{m:02d}m"
  return f"{m}m{s:02d}s" if minutes else f"{s}s"


def _json_line(record: Mapping[str, int | float]) -> str:
  """Returns a line of valid JSON, which has no NaN or infinity."""
  finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
  return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Reads `metrics.jsonl` of a run, finished or still running.

  Args:
    workdir: the run's folder.

  Returns:
    One dict per line, in file order; null values become NaN. A line that was
    cut short by a kill is left out.
  """
  path = epath.Path(workdir) / METRICS_FILE
  records = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    records.append({k: math.nan if v is None else v for k, v in record.items()})
  return records
