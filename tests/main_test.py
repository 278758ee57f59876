"""What the command says when a run fails, and leaves when it does not."""

import types

import pytest

from audiomosaic_jax import main
from configs import pretrain


@pytest.fixture
def start(monkeypatch, tmp_path):
  """Calls main with a loop of one's own in the place of pretraining's."""

  def call(run, status=0):
    config = pretrain.get_config("smoke")
    config.runtime.update(compilation_cache="", keep_freed_memory=False)
    loop = types.SimpleNamespace(run=run)
    monkeypatch.setattr(main.importlib, "import_module", lambda name: loop)
    for flag, value in {
      "CONFIG": config,
      "WORKDIR": str(tmp_path / "run"),
      "STOPPED_STATUS": status,
    }.items():
      monkeypatch.setattr(main, flag, types.SimpleNamespace(value=value))
    main.main(["main"])

  return call


def fail(config, workdir):
  raise ValueError("batch_size 3 is odd")


def test_an_error_is_one_message_and_its_traceback_a_file(start, tmp_path):
  with pytest.raises(SystemExit, match="error: batch_size 3 is odd") as end:
    start(fail)
  trace = tmp_path / "run" / "error.txt"
  assert str(trace) in str(end.value)
  assert "in fail" in trace.read_text()
  # What the next attempt gets over is not said of it for ever.
  start(lambda config, workdir: True)
  assert not trace.exists()


def test_a_stopped_run_ends_with_the_status_that_was_asked_for(start):
  with pytest.raises(SystemExit) as end:
    start(lambda config, workdir: False, status=75)
  assert end.value.code == 75
