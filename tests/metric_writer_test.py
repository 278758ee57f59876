"""Metrics survive kills and resumes, and are valid wherever they are read."""

import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from audiomosaic_jax import metric_writer
from audiomosaic_jax.metric_writer import MetricWriter, read_metrics

ROOT = pathlib.Path(__file__).parents[1]


def open_writer(workdir, *, start_step=0, total_steps=100):
  return MetricWriter(
    workdir,
    total_steps=total_steps,
    start_step=start_step,
    progress_metrics=("loss", "accuracy", "pairs_per_s"),
  )


def lines(workdir):
  return (workdir / "metrics.jsonl").read_text().splitlines()


def test_every_write_is_one_line_of_json(tmp_path):
  with open_writer(tmp_path / "run") as writer:
    writer.write_scalars(1, {"loss": jnp.float32(2.5), "accuracy": 0.25})
    writer.write_scalars(2, {"loss": 2})
  first, second = map(json.loads, lines(tmp_path / "run"))
  assert first == {"step": 1, "loss": 2.5, "accuracy": 0.25}
  assert second == {"step": 2, "loss": 2.0}


def test_values_that_are_not_finite_are_null_and_read_as_nan(tmp_path):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  for _ in range(2):  # The second opening rewrites the file.
    with open_writer(tmp_path, start_step=1) as writer:
      if not lines_exist(tmp_path):
        writer.write_scalars(1, {"loss": math.nan, "norm": jnp.inf, "lr": 0.1})
    (line,) = lines(tmp_path)
    record = json.loads(line, parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "norm": None, "lr": 0.1}
  (record,) = read_metrics(tmp_path)
  assert math.isnan(record["loss"])
  assert record["lr"] == 0.1


def lines_exist(workdir):
  path = workdir / "metrics.jsonl"
  return path.exists() and bool(lines(workdir))


def test_a_resumed_run_has_no_step_twice(tmp_path):
  with open_writer(tmp_path) as writer:
    for step in range(1, 8):
      writer.write_scalars(step, {"loss": step})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 8, "lo')  # A kill in the middle of a line.
  with open_writer(tmp_path, start_step=4) as writer:
    for step in range(5, 10):
      writer.write_scalars(step, {"loss": 10 * step})
  records = read_metrics(tmp_path)
  assert [r["step"] for r in records] == list(range(1, 10))
  assert [r["loss"] for r in records] == [1, 2, 3, 4, 50, 60, 70, 80, 90]
  assert not list(tmp_path.glob("*.tmp"))


def test_going_back_during_a_run_drops_the_later_lines(tmp_path):
  with open_writer(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write_scalars(step, {"loss": step})
    writer.rewind(1)
    writer.write_scalars(2, {"loss": 20})
  assert [r["loss"] for r in read_metrics(tmp_path)] == [1, 20]


def test_the_file_is_whole_when_a_kill_stops_the_rewriting(
  tmp_path, monkeypatch
):
  with open_writer(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write_scalars(step, {"loss": step})
    before = lines(tmp_path)

    def killed(*_):
      raise KeyboardInterrupt

    monkeypatch.setattr(type(writer._metrics_path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      writer.rewind(1)
  assert lines(tmp_path) == before


def test_without_a_terminal_progress_is_plain_lines(
  tmp_path, capsys, monkeypatch
):
  clock = iter([100.0, 105.0, 125.0])
  monkeypatch.setattr(
    metric_writer, "time", types.SimpleNamespace(monotonic=clock.__next__)
  )
  with open_writer(tmp_path) as writer:
    writer.write_scalars(10, {"accuracy": 0.31, "loss": 4.1234, "lr": 1e-4})
    writer.write_scalars(20, {"loss": 4.0, "pairs_per_s": 1234.2})
    writer.write_scalars(30, {"loss": math.nan})  # 20 s, with an evaluation
  assert capsys.readouterr().out.splitlines() == [
    "step 10/100  loss 4.123  accuracy 0.31",
    "step 20/100  loss 4  1234 pairs/s  ETA 40s",
    "step 30/100  loss nan  ETA 1m28s",
  ]


def test_on_a_terminal_progress_is_a_bar(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  with open_writer(tmp_path, start_step=5) as writer:
    writer.log("probing")
    writer.write_scalars(30, {"loss": 4.1234})
    writer.write_scalars(60, {"accuracy": 0.5})
  out = capsys.readouterr().out
  assert "probing\n" in out
  assert "60/100" in out
  assert "loss=4.123, accuracy=0.5" in out


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.4, "0s"),
    (42, "42s"),
    (72, "1m12s"),
    (59.7, "1m00s"),
    (11_100, "3h05m"),
    (187_200, "2d04h"),
  ],
)
def test_durations_show_two_units_at_most(seconds, text):
  assert metric_writer.format_duration(seconds) == text


def test_parameters_are_counted_and_listed(tmp_path, capsys):
  params = {"encoder": {"kernel": jnp.ones((3, 400))}, "bias": jnp.ones(7)}
  with open_writer(tmp_path) as writer:
    writer.log_parameter_overview(params)
    writer.log_parameter_overview(jax.eval_shape(lambda: params))
  assert "1,207 parameters in 2 arrays" in capsys.readouterr().out
  table = (tmp_path / "parameters.txt").read_text()
  assert "encoder/kernel" in table
  assert "(3, 400)" in table


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with open_writer(tmp_path / "run") as writer:
    writer.write_scalars(1, {"loss": 1.0})
    writer.log("hello")
    writer.log_parameter_overview({"w": jnp.ones(3)})
    writer.rewind(0)
    writer.flush()
  assert not (tmp_path / "run").exists()
  assert capsys.readouterr().out == ""


WITHOUT_TENSORFLOW = """
import importlib.util, sys
assert importlib.util.find_spec("tensorflow") is None or sys.exit(77)
from audiomosaic_jax.metric_writer import MetricWriter
with MetricWriter(
  sys.argv[1], total_steps=2, start_step=0, progress_metrics=()
) as writer:
  writer.write_scalars(1, {"loss": 0.5, "norm": float("nan")})
import clu.periodic_actions
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""


def test_tensorboard_files_are_written_without_tensorflow(tmp_path):
  result = subprocess.run(
    [sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  if result.returncode == 77:
    pytest.skip("TensorFlow is installed")
  assert result.returncode == 0, result.stderr
  (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
  assert b"loss" in events.read_bytes()


def test_clu_keeps_its_own_writer_where_tensorflow_is_installed(monkeypatch):
  name = "clu.metric_writers.summary_writer"
  monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.setattr(
    metric_writer.importlib.util,
    "find_spec",
    lambda module: types.SimpleNamespace(name=module),
  )
  metric_writer.use_tensorboardx()
  assert name not in sys.modules
