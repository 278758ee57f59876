"""Notebooks run from the first cell to the last, and are stored unexecuted."""

import ast
import csv
import json
import os
import pathlib
import sys
import types

import nbclient
import nbformat
import pytest
import tiny_encoder
import tiny_instruct
from IPython.core.inputtransformer2 import TransformerManager

from audiomosaic_jax.data import datasets

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
# Name -> the cells that draw something, and what is printed somewhere.
EXPECTED = {
  "01_embed_audio": (
    ["spectrogram", "frames", "neighbours", "map"],
    "2 block(s) of 32 channels; sees 1.29 s at once, a frame every 160 ms",
    "(9, 32) notes x channels",
  ),
  "02_linear_probe": (
    ["confusion", "layers"],
    "train 24 notes",
    "balanced accuracy 0.",
    "log-mel mean and std",
    "frames, maximum",
    "projector output z",
  ),
  "03_look_inside": (
    ["masks-plot", "attention-plot", "similarity", "rank"],
    "(2, 2, 17, 17) blocks, heads",
  ),
  "04_ask_audio": (
    ["likelihood"],
    "4 audio tokens for 1.29 s",
    "> Which instrument is playing?",
    "It is bass.",
  ),
}
CLASSES = ("harp", "organ", "piano")
COUNTS = {"train": 8, "valid": 2, "test": 3}
SCREEN_LINES = 22


def read(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name):
  return [cell for cell in read(name).cells if cell.cell_type == "code"]


def as_python(source):
  """Returns a cell as IPython runs it: `!` and `%` become calls."""
  return TransformerManager().transform_cell(source)


def execute(notebook, environment, folder):
  """Runs a notebook in a kernel of its own."""
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}
  )
  settings = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiles in half the time.
    "IPYTHONDIR": str(folder),
  }
  client.execute(env=os.environ | settings | environment)
  return notebook


def pictures(notebook):
  return [
    cell.id
    for cell in notebook.cells
    for output in cell.get("outputs", ())
    if "image/png" in output.get("data", ())
  ]


def printed(notebook):
  return "".join(
    output.text
    for cell in notebook.cells
    for output in cell.get("outputs", ())
    if output.output_type == "stream" and output.name == "stdout"
  )


def assert_as_expected(notebook, name):
  drawn, *texts = EXPECTED[name]
  assert pictures(notebook) == drawn
  for text in texts:
    assert text in printed(notebook)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  """A run: two narrow blocks, windows of 1.29 s, two lines of metrics."""
  workdir = tiny_encoder.write_run(tmp_path_factory.mktemp("encoder"))
  lines = (
    {"step": step, "loss": 4.0 / step, "effective_rank": 8.0} for step in (1, 2)
  )
  text = "".join(f"{json.dumps(line)}\n" for line in lines)
  (workdir / "metrics.jsonl").write_text(text)
  return workdir


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A run of an audio-language model that has made no step."""
  return tiny_instruct.write_run(tmp_path_factory.mktemp("ask"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  """A few of the packaged notes as a task of one's own."""
  folder = tmp_path_factory.mktemp("task")
  notes = datasets.DEMO_DIR / "instruments"
  with open(notes / "labels.csv") as file:
    rows = list(csv.DictReader(file))
  with open(folder / "labels.csv", "w") as file:
    file.write("path,label,split\n")
    for split, count in COUNTS.items():
      for label in CLASSES:
        wanted = [r for r in rows if (r["label"], r["split"]) == (label, split)]
        for row in wanted[:count]:
          file.write(f"{notes / row['path']},{label},{split}\n")
  return folder


@pytest.fixture
def runtime(tmp_path, monkeypatch):
  """Where Jupyter writes what it needs to run a kernel."""
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
  return tmp_path


def test_every_notebook_is_listed_here():
  assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(EXPECTED)


# What the second one calls, the others and tests/finetune_test.py call, too.
# Left to `make test-slow`.
LONG = ("02_linear_probe", "03_look_inside")


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in EXPECTED],
)
def test_a_notebook_runs_from_top_to_bottom(
  name, encoder, model, task, runtime
):
  environment = {
    "AUDIOMOSAIC_ENCODER": str(encoder),
    "AUDIOMOSAIC_MODEL": str(model),
    "AUDIOMOSAIC_TASK": str(task),
  }
  assert_as_expected(execute(read(name), environment, runtime), name)


@pytest.mark.slow
def test_without_an_encoder_a_notebook_trains_one(runtime):
  notebook = read("03_look_inside")
  (cell,) = (cell for cell in notebook.cells if cell.id == "encoder")
  for line, shorter in (
    ("STEPS = 800", "STEPS = 61"),  # One more than the warm-up.
    ('"runs/notebook"', f'"{runtime / "run"}"'),
  ):
    assert cell.source.count(line) == 1
    cell.source = cell.source.replace(line, shorter)
  environment = {"AUDIOMOSAIC_ENCODER": ""}
  execute(notebook, environment, runtime)
  assert "(1, 4, 65, 65) blocks, heads" in printed(notebook)
  assert (runtime / "run" / "config.json").exists()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_is_stored_without_what_it_showed(name):
  notebook = read(name)
  nbformat.validate(notebook)
  for cell in code_cells(name):
    assert cell.outputs == [] and cell.execution_count is None, cell.id
  assert all(cell.metadata == {} for cell in notebook.cells)
  assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_cell_compiles_and_fits_on_a_screen(name):
  for cell in code_cells(name):
    ast.parse(as_python(cell.source))
    assert len(cell.source.splitlines()) <= SCREEN_LINES, cell.id


def test_all_notebooks_begin_alike():
  """To install, and to find or train an encoder, whichever is opened first."""
  installed = {code_cells(name)[0].source for name in EXPECTED}
  encoders = {
    code_cells(name)[1].source for name in EXPECTED if name != "04_ask_audio"
  }
  assert len(installed) == len(encoders) == 1


class Shell:
  """Takes down what a cell asks IPython to do."""

  def __init__(self):
    self.asked = []

  def system(self, command):
    self.asked.append(command)

  def run_line_magic(self, name, line):
    self.asked.append(f"%{name} {line}")


def run_first_cell(folder, monkeypatch, *, repository):
  """Returns what the first cell asks for; with a repository, on Colab."""
  source = code_cells("01_embed_audio")[0].source
  if repository:
    module = types.ModuleType("google.colab")
    monkeypatch.setitem(sys.modules, "google.colab", module)
    source = source.replace("com/OWNER", f"com/{repository}")
  monkeypatch.chdir(folder)
  shell = Shell()
  exec(as_python(source), {"get_ipython": lambda: shell})
  return shell.asked


def test_the_first_cell_installs_on_colab(tmp_path, monkeypatch):
  asked = run_first_cell(tmp_path, monkeypatch, repository="someone")
  assert [command.split()[0] for command in asked] == ["git", "%cd", "%pip"]
  # Run again, in the clone, it leaves everything as it is.
  (tmp_path / "configs").mkdir()
  assert run_first_cell(tmp_path, monkeypatch, repository="someone") == []
  assert pathlib.Path.cwd() == tmp_path


def test_the_first_cell_says_what_to_fill_in(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="set REPOSITORY"):
    run_first_cell(tmp_path, monkeypatch, repository="OWNER")


def test_the_first_cell_installs_nothing_elsewhere(monkeypatch):
  assert run_first_cell(FOLDER, monkeypatch, repository=None) == []
  assert pathlib.Path.cwd() == FOLDER.parent
