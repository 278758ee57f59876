"""An untrained encoder to call clients with, and the table of what they said.

The encoder is small but hears as the published one: 16 kHz, 128 mel bands.
"""

import importlib.metadata

import numpy as np
import pytest
import tiny_encoder

RATE_HZ = 16_000
COLUMNS = ("client", "version", "what was run", "result")
HERE = "tests/clients/"
ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
  """Returns the workdir of a pretraining run that has made no step."""
  folder = tmp_path_factory.mktemp("run")
  return tiny_encoder.write_run(folder, **{"fbank.num_mel_bins": 128})


@pytest.fixture
def tones():
  """Returns a function from pitch and seconds to a tone in noise."""

  def tone(hz, seconds, seed):
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    clip = 0.3 * np.sin(2 * np.pi * hz * time_s + rng.uniform(0, 6))
    return (clip + 0.02 * rng.normal(size=len(clip))).astype(np.float32)

  return tone


def pytest_configure(config):
  config.stash[ROWS] = []


@pytest.fixture
def verdict(request):
  """Returns a function that notes what a client said, for the table."""

  def note(package, what, result):
    version = importlib.metadata.version(package)
    request.config.stash[ROWS].append((package, version, what, result))

  return note


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
  """Prints what the clients said, and which tests did not get that far."""
  rows = [COLUMNS, *config.stash[ROWS]]
  for kind in ("failed", "error"):
    for report in terminalreporter.stats.get(kind, []):
      if HERE in report.nodeid:
        rows.append(("", "", report.nodeid, kind.upper()))
  if len(rows) == 1:
    return
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  terminalreporter.section("what the clients said")
  for row in rows:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    terminalreporter.write_line("  ".join(cells).rstrip())
