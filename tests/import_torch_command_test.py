"""The command that imports a published checkpoint."""

import subprocess
import sys

from import_torch_test import load, write_file
from models_heads_test import state_of

from audiomosaic_jax import experiment, import_torch


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "audiomosaic_jax.import_torch", *arguments],
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_the_command_imports_or_says_in_one_line_why_not(tmp_path):
  state = state_of(load("heads"), "classifier_avg")
  path = write_file(state, tmp_path / "a.safetensors")
  names = tmp_path / "names.csv"
  rows = [f"{i},/m/{i},sound {i}\n" for i in range(10)]
  names.write_text("index,mid,display_name\n" + "".join(rows))
  output = tmp_path / "imported"
  arguments = (
    *(f"--input={path}", f"--output={output}", f"--class_names={names}"),
    *("--stats=-5,4", "--normalization=huggingface", "--layout=paper"),
  )
  refused = command(*arguments)
  assert refused.returncode == 1
  assert refused.stderr.startswith("error: no tensor tells num_heads")
  assert "Traceback" not in refused.stderr and not output.exists()
  done = command(*arguments, "--num_heads=3")
  assert done.returncode == 0, done.stderr
  assert "checkpoint" not in done.stderr, "Orbax is silent"
  assert "spectrogram (mean, std) = (-5.0, 4.0): chosen" in done.stdout
  config = experiment.load_config(output)
  assert config.spectrogram.std == 2.0
  assert config.class_names == tuple(f"sound {i}" for i in range(10))
  assert config.model.encoder.pos_layout == "paper"


def test_help_names_the_choices():
  shown = command("--help").stdout
  for words in ("--input", "speech_commands", "aasist", "huggingface"):
    assert words in shown


def test_class_names_are_read_from_a_text(tmp_path):
  (tmp_path / "names.txt").write_text("dog\ncat, angry\n")
  read = import_torch.read_class_names(str(tmp_path / "names.txt"))
  assert read == ("dog", "cat, angry")
