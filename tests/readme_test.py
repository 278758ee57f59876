"""What the README says is true: commands, paths, fields and switches.

Nothing is trained here; every command is taken apart and checked to lead
somewhere.
"""

import ast
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import ml_collections
import pytest
from command_line import parse

from audiomosaic_jax import encoder_probe, experiment, main
from benchmarks import expected_hours
from configs import common, finetune, instruct, pretrain

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What a reader fills in, and what a run writes.
PLACEHOLDERS = re.compile(r"[A-Z]+(_[A-Z]+)*|runs/\w+")
TOOLS = {"make", "pip", "pytest", "source"}


def commands() -> list[str]:
  """Returns the shell commands of the README, continued lines joined."""
  blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def words(command: str) -> list[str]:
  return shlex.split(command, comments=True)


def modules() -> list[str]:
  return sorted(
    {
      words(c)[words(c).index("-m") + 1]
      for c in commands()
      if words(c)[0].startswith("python")
    }
  )


def flags(command: str) -> dict[str, str]:
  """Returns name -> value of the `--name=value` words of a command."""
  pairs = [w[2:].partition("=") for w in words(command) if w.startswith("--")]
  return {name: value for name, _, value in pairs}


def configured() -> list[str]:
  return [c for c in commands() if "config" in flags(c)]


def build(argument: str) -> ml_collections.ConfigDict:
  """Returns the config of `path:argument`, locked as main locks it."""
  path, _, argument = argument.partition(":")
  spec = importlib.util.spec_from_file_location("config", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument).lock()


def flatten(config, prefix: str = "") -> dict[str, object]:
  """Returns dotted name -> value."""
  values = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      values |= flatten(value, f"{prefix}{name}.")
    else:
      values[prefix + name] = value
  return values


def rows(heading: str) -> list[list[str]]:
  """Returns the cells of the table rows of a section, without the titles."""
  section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
  lines = [line for line in section.splitlines() if line.startswith("|")]
  cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
  return [row for row in cells if row[0].startswith("`")]


def field_rows() -> dict[str, str]:
  return {
    r[0].strip("`"): r[1] for r in rows("Every field of configs/pretrain.py")
  }


def test_the_two_commands_are_on_the_first_screen():
  top = README.splitlines()[:30]
  for command in (
    "make demo",
    "make test",
    "python3 -m venv .venv",
    "python -m pytest",
  ):
    assert any(line.startswith(command) for line in top), command
  assert any(line.startswith("python -m audiomosaic_jax.main") for line in top)


def test_the_table_of_the_demo_has_every_method_date_and_command():
  section = README.split("## What the demo shows")[1].split("\n## ")[0]
  encoders = [
    f"{encoder} encoder, {readout}"
    for encoder in ("random", "pretrained")
    for readout in encoder_probe.READOUTS.values()
  ]
  for row in ("log-mel mean and std", *encoders):
    assert f"| {row} |" in section
  assert re.search(r"`make demo` on\s.*20\d\d-\d\d-\d\d", section, re.DOTALL)


def published_rows() -> list[list[str]]:
  section = README.split("### Published numbers")[1].split("\n## ")[0]
  lines = [line for line in section.splitlines() if line.startswith("| ")]
  cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
  return cells[2:]


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: row[0])
def test_published_numbers_are_those_of_the_configs(row):
  name, _, value, config, hours = row
  config = config.strip("`")
  (timed,) = (r for r in expected_hours.EXPERIMENTS if r.config == config)
  expected = expected_hours.hours(timed, peak_tflops=989.0, mfu=0.4)
  assert float(hours) == pytest.approx(expected, rel=0.05, abs=0.006)
  # EnvSDD's rows say for how many clips the hours are.
  assert timed.name.split(",")[0] == name.split(",")[0]
  numbers = [
    line.split(": ") for line in build(f"configs/{config}").get("published", ())
  ]
  if config.startswith("pretrain"):
    assert not value and not numbers
    return
  ours = {who: number for who, number in numbers if "AudioMosaic" in who}
  for part, number in enumerate(value.split(" / "), 1):
    of_a_split = f"AudioMosaic, test0{part}"
    probe = re.search(r"probe=(\w+)", config)
    of_a_probe = {"layer": "AudioMosaic, layer 10"}.get(
      probe and probe[1], f"AudioMosaic, {probe and probe[1]}"
    )
    names = (of_a_split, of_a_probe, "AudioMosaic")
    who = next(name for name in names if name in ours)
    assert float(ours[who]) == float(number)


def test_every_command_starts_a_known_program():
  for command in commands():
    first = words(command)[0]
    assert first in TOOLS or first.startswith("python"), command


@pytest.mark.parametrize("module", modules())
def test_every_module_that_is_run_exists(module):
  assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(
  "module",
  [m for m in modules() if m not in ("venv", "audiomosaic_jax.main")],
)
def test_every_flag_of_a_module_is_defined_there(module):
  text = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
  for command in commands():
    if module in words(command):
      for name in flags(command):
        assert f'"{name}"' in text or f'\n  "{name}",' in text, (module, name)


def test_main_explains_its_flags():
  result = subprocess.run(
    [sys.executable, "-m", "audiomosaic_jax.main", "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert "--config" in result.stdout and "--workdir" in result.stdout


@pytest.mark.parametrize("command", configured())
def test_every_config_of_a_command_builds_and_has_the_overridden_fields(
  command,
):
  given = flags(command)
  assert build(given["config"]).mode in main.MODES
  parse(
    *(
      f"--{name}={value}"
      for name, value in given.items()
      if name.partition(".")[0] == "config"
    )
  )


def test_every_override_in_the_text_is_a_field():
  fields = flatten(pretrain.get_config()).keys()
  fields |= flatten(finetune.get_config("dataset=task")).keys()
  fields |= flatten(instruct.get_config()).keys()
  for name in re.findall(r"--config\.([\w.]+)", README):
    assert name in fields


def test_every_make_target_exists():
  targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
  named = re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M)
  assert {"demo", "test"} <= set(named) <= set(targets)


def test_every_extra_that_is_installed_exists():
  setup = ast.parse((ROOT / "setup.py").read_text())
  extras = next(
    {key.value for key in node.value.keys}
    for node in setup.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS"
  )
  named = re.findall(r"'\.\[([\w,]+)\]'", README)
  assert named and {e for n in named for e in n.split(",")} <= extras


def test_every_path_exists():
  links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
  quoted = re.findall(
    r"(?:configs|audiomosaic_jax|tests|launch|docs|benchmarks)/[\w./-]*\w",
    README,
  )
  for path in links + quoted:
    assert (ROOT / path).exists(), path


def test_the_pictures_are_small():
  for path in (ROOT / "docs").glob("*.png"):
    assert path.stat().st_size < 200 * 1024, path


def test_every_file_of_the_layout_exists():
  block = README.split("## Layout\n")[1].split("```")[1]
  inside = ""
  for line in block.splitlines()[1:]:
    if line and line[0] != " ":
      inside = line.split()[0]
    names = re.findall(r"[\w/]+(?:\.py|/)(?=\s)", line + " ")
    for name in names:
      candidates = (ROOT / name, ROOT / inside / name)
      example = name.startswith("module")
      assert example or any(p.exists() for p in candidates), name


def test_the_table_of_fields_is_the_config():
  fields = flatten(pretrain.get_config())
  table = field_rows()
  assert set(table) == set(fields)
  for name, text in table.items():
    assert ast.literal_eval(text.strip("`")) == fields[name], name


def test_the_table_of_fields_names_each_once():
  table = rows("Every field of configs/pretrain.py")
  assert len(table) == len(field_rows())
  assert all(len(row) == 3 and row[2] for row in table)


def test_the_tables_of_presets_and_switches_are_complete():
  named = [row[0].strip("`") for row in rows("Switches")]
  with pytest.raises(ValueError) as error:
    pretrain.get_config("no_such_switch=1")
  switches = set(re.findall(r"\w+", str(error.value).split("from ")[1]))
  assert set(named) == set(pretrain.PRESETS) | switches - {"preset"}
  values = {row[0].strip("`"): row[1] for row in rows("Switches")}
  listed = {
    name: set(re.findall(r"`(\w+)`", values[name]))
    for name in ("variant", "mask")
  }
  assert listed["variant"] == set(common.VIT_SIZES)
  assert listed["mask"] == set(pretrain.MASKS)


def test_the_tokens_of_both_layouts_are_those_of_the_model():
  stated = [
    [int(n) for n in re.findall(r"\d+", row[-1])]
    for row in (r.split(" | ") for r in README.splitlines())
    if re.search(r"\d+ and \d+ \|$", row[-1])
  ]
  computed = [
    [n - 1 for n in experiment.tokens_per_view(config).values()]
    for config in (pretrain.get_config(), pretrain.get_config("released"))
  ]
  assert stated == computed


def test_the_launchers_that_are_named_exist():
  text = (ROOT / "launch" / "README.md").read_text()
  for path in re.findall(r"launch/[\w.]+", text):
    assert (ROOT / path).exists(), path
