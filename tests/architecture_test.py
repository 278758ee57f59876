"""The layers of the design, asserted on the syntax trees of the files.

Each rule is a generator of (line, what is wrong) for one file; the table at
the bottom shows every rule a file that breaks it.
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "audiomosaic_jax"
PURE = (
  "features",
  "augment",
  "augment_waveform",
  "augment_fbank",
  "masking",
  "losses",
  "metrics",
  "mixup",
  "scores",
  "dsp",
  "filters",
  "fingerprint",
)
# What the augmentations stand on; other pure modules stand alone.
SHARED_BY_PURE = [f"{PACKAGE}.{x}" for x in ("augment", "dsp", "filters")]
LOOPS = ("pretrain", "finetune", "instruct")
FILE_LINES, FUNCTION_LINES, TRAIN_LINES = 400, 60, 120

Finding = tuple[int, str]


class File(NamedTuple):
  """A source file: path below the repository, text and syntax tree."""

  path: str
  text: str
  tree: ast.Module


def parse(path: str, text: str) -> File:
  return File(path, text, ast.parse(text))


def package_files() -> list[File]:
  paths = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
  return [
    parse(path.relative_to(ROOT).as_posix(), path.read_text())
    for path in sorted(paths)
  ]


def imports(file: File) -> Iterator[tuple[int, str]]:
  """Yields (line, full name) of all that a file imports, at any depth."""
  for node in ast.walk(file.tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        base = ".".join([*file.path.split("/")[: -node.level], base])
      base = base.strip(".")
      yield from ((node.lineno, f"{base}.{a.name}") for a in node.names)


def names(file: File) -> Iterator[tuple[int, str]]:
  """Yields (line, dotted name) of imports and of attribute chains."""
  yield from imports(file)
  for node in ast.walk(file.tree):
    if isinstance(node, ast.Attribute | ast.Name):
      yield node.lineno, ast.unparse(node)


def within(name: str, *modules: str) -> bool:
  return any(name == m or name.startswith(f"{m}.") for m in modules)


def configs_import_nothing_of_the_package(file: File) -> Iterator[Finding]:
  if not file.path.startswith("configs/"):
    return
  for line, name in imports(file):
    top = name.partition(".")[0]
    known = {"configs", "ml_collections"} | sys.stdlib_module_names
    if top not in known:
      yield line, f"imports {name}; a config knows only ml_collections"


def pure_modules_import_jax_and_numpy_only(file: File) -> Iterator[Finding]:
  if file.path not in {f"{PACKAGE}/{name}.py" for name in PURE}:
    return
  outside = {"io", "os", "pathlib", "subprocess", "socket", "csv", "json"}
  allowed = {"jax", "jaxtyping", "numpy"} | sys.stdlib_module_names - outside
  for line, name in imports(file):
    known = name.partition(".")[0] in allowed or within(name, *SHARED_BY_PURE)
    if not known:
      yield line, f"imports {name}; pure functions know only jax and numpy"


def data_imports_no_jax_and_no_flax(file: File) -> Iterator[Finding]:
  if not file.path.startswith(f"{PACKAGE}/data/"):
    return
  for line, name in imports(file):
    if within(name, "jax", "flax", "optax", "orbax", "clu"):
      yield line, f"imports {name}; data workers fork, JAX must not be there"
    ours = name.startswith(f"{PACKAGE}.")
    if ours and not within(name, f"{PACKAGE}.data"):
      yield line, f"imports {name}; data/ stands alone"


def only_checkpoint_knows_orbax(file: File) -> Iterator[Finding]:
  if file.path != f"{PACKAGE}/checkpoint.py":
    for line, name in imports(file):
      if within(name, "orbax"):
        yield line, f"imports {name}; only checkpoint.py does"


def only_sharding_knows_partition_specs(file: File) -> Iterator[Finding]:
  if file.path not in (f"{PACKAGE}/sharding.py", f"{PACKAGE}/per_device.py"):
    for line, name in names(file):
      if name.rpartition(".")[2] == "PartitionSpec":
        yield line, f"uses {name}; only sharding.py and per_device.py do"


def only_models_know_linen(file: File) -> Iterator[Finding]:
  if not file.path.startswith(f"{PACKAGE}/models/"):
    for line, name in names(file):
      if within(name, "flax.linen"):
        yield line, f"uses {name}; only models/ does"


def loops_do_not_import_loops(file: File) -> Iterator[Finding]:
  loops = {f"{PACKAGE}.{name}" for name in LOOPS}
  if file.path.removesuffix(".py").replace("/", ".") in loops:
    for line, name in imports(file):
      if within(name, *loops):
        yield line, f"imports {name}; share code through a module below"


def only_exports_import_tensorflow(file: File) -> Iterator[Finding]:
  tree = file.tree
  if file.path.startswith(f"{PACKAGE}/export"):
    # Inside a function it is imported by who asks for its formats.
    top = (ast.Import, ast.ImportFrom)
    tree = ast.Module([node for node in tree.body if isinstance(node, top)], [])
  for line, name in imports(file._replace(tree=tree)):
    if within(name, "tensorflow"):
      yield line, f"imports {name}; training never needs TensorFlow"


def config_fields_have_no_hidden_default(file: File) -> Iterator[Finding]:
  for node in ast.walk(file.tree):
    if not isinstance(node, ast.Call):
      continue
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr == "get":
      subject = function.value
    elif isinstance(function, ast.Name) and function.id == "getattr":
      subject = node.args[0] if len(node.args) == 3 else None
    else:
      continue
    if subject is not None and re.match(
      r"(self\.)?_?(config|cfg)\b", ast.unparse(subject)
    ):
      yield node.lineno, f"{ast.unparse(node)}; defaults live in configs/"


def nothing_unpickles(file: File) -> Iterator[Finding]:
  for line, name in imports(file):
    if within(name, "pickle", "cloudpickle", "dill", "joblib", "marshal"):
      yield line, f"imports {name}; loading a pickle runs its code"
  for node in ast.walk(file.tree):
    if not isinstance(node, ast.Call):
      continue
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    safe = given.get("weights_only") == "True"
    if ast.unparse(node.func) == "torch.load" and not safe:
      yield node.lineno, "torch.load needs weights_only=True"
    if given.get("allow_pickle", "False") != "False":
      yield node.lineno, "allow_pickle runs the code in a file"


def files_and_functions_are_short(file: File) -> Iterator[Finding]:
  lines = len(file.text.splitlines())
  if lines > FILE_LINES:
    yield lines, f"{lines} lines; {FILE_LINES} at most"
  if file.path.startswith("configs/"):
    return  # An experiment is one literal, and best read in one piece.
  for node in ast.walk(file.tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      limit = TRAIN_LINES if node.name == "train" else FUNCTION_LINES
      length = code_lines(node)
      if length > limit:
        yield node.lineno, f"{node.name} has {length} lines; {limit} at most"


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
  """Returns the lines of a function without its docstring."""
  length = node.end_lineno - node.lineno + 1
  if ast.get_docstring(node) is not None:
    first = node.body[0]
    length -= first.end_lineno - first.lineno + 1
  return length


def nothing_is_left_unfinished(file: File) -> Iterator[Finding]:
  for number, text in enumerate(file.text.splitlines(), 1):
    if re.search(r"\b(TODO|FIXME|XXX)\b", text):
      yield number, text.strip()
  for node in ast.walk(file.tree):
    if isinstance(node, ast.Raise) and "NotImplemented" in ast.unparse(node):
      yield node.lineno, f"{ast.unparse(node)}; write it or leave it out"


def files_say_what_they_hold(file: File) -> Iterator[Finding]:
  name = file.path.rpartition("/")[2]
  if re.fullmatch(r"(utils?|misc|helpers?|common_utils)\.py", name):
    yield 1, f"{name} says nothing about its content"


RULES = (
  configs_import_nothing_of_the_package,
  pure_modules_import_jax_and_numpy_only,
  data_imports_no_jax_and_no_flax,
  only_checkpoint_knows_orbax,
  only_sharding_knows_partition_specs,
  only_models_know_linen,
  loops_do_not_import_loops,
  only_exports_import_tensorflow,
  config_fields_have_no_hidden_default,
  nothing_unpickles,
  files_and_functions_are_short,
  nothing_is_left_unfinished,
  files_say_what_they_hold,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
  broken = [
    f"{file.path}:{line}: {what}"
    for file in package_files()
    for line, what in rule(file)
  ]
  assert not broken, "\n".join(["", *broken])


# rule, path, a file that breaks it, a file that keeps it
EXAMPLES = [
  (
    configs_import_nothing_of_the_package,
    "configs/new.py",
    "from audiomosaic_jax import losses",
    "import math\nimport ml_collections\nfrom configs import common",
  ),
  (
    pure_modules_import_jax_and_numpy_only,
    "audiomosaic_jax/losses.py",
    "from audiomosaic_jax import masking",
    "import functools\nimport jax.numpy as jnp\nimport numpy as np",
  ),
  (
    pure_modules_import_jax_and_numpy_only,
    "audiomosaic_jax/features.py",
    "import pathlib",
    "import math",
  ),
  (
    data_imports_no_jax_and_no_flax,
    "audiomosaic_jax/data/sources.py",
    "def f():\n  import jax.numpy",
    "import jaxtyping\nfrom audiomosaic_jax.data import audio_io",
  ),
  (
    data_imports_no_jax_and_no_flax,
    "audiomosaic_jax/data/sources.py",
    "from audiomosaic_jax import features",
    "from audiomosaic_jax.data.sources import Source",
  ),
  (
    only_checkpoint_knows_orbax,
    "audiomosaic_jax/pretrain.py",
    "from orbax import checkpoint",
    "from audiomosaic_jax import checkpoint",
  ),
  (
    only_sharding_knows_partition_specs,
    "audiomosaic_jax/pretrain.py",
    "from jax.sharding import PartitionSpec as P",
    "from audiomosaic_jax import sharding",
  ),
  (
    only_sharding_knows_partition_specs,
    "audiomosaic_jax/pretrain.py",
    "import jax\nspec = jax.sharding.PartitionSpec()",
    "import jax\nmesh = jax.sharding.Mesh",
  ),
  (
    only_models_know_linen,
    "audiomosaic_jax/optimizer.py",
    "from flax import linen as nn",
    "import flax.struct",
  ),
  (
    loops_do_not_import_loops,
    "audiomosaic_jax/finetune.py",
    "from audiomosaic_jax.pretrain import train",
    "from audiomosaic_jax import encoder_probe",
  ),
  (
    loops_do_not_import_loops,
    "audiomosaic_jax/finetune.py",
    "from . import pretrain",
    "from . import encoder_probe",
  ),
  (
    only_exports_import_tensorflow,
    "audiomosaic_jax/metric_writer.py",
    "import tensorflow as tf",
    "import tensorflow_datasets as tfds",
  ),
  (
    only_exports_import_tensorflow,
    "audiomosaic_jax/metric_writer.py",
    "def f():\n  import tensorflow as tf",
    "",
  ),
  (
    only_exports_import_tensorflow,
    "audiomosaic_jax/export_formats.py",
    "import tensorflow as tf",
    "def f():\n  import tensorflow as tf",
  ),
  (
    config_fields_have_no_hidden_default,
    "audiomosaic_jax/pretrain.py",
    "x = config.model.get('depth', 12)",
    "x = {}.get('depth', 12)\ny = config.model.depth",
  ),
  (
    config_fields_have_no_hidden_default,
    "audiomosaic_jax/pretrain.py",
    "x = getattr(config, 'depth', 12)",
    "x = getattr(config, 'depth')",
  ),
  (
    nothing_unpickles,
    "audiomosaic_jax/import_torch.py",
    "import torch\ntorch.load('a.pth')",
    "import torch\ntorch.load('a.pth', weights_only=True)",
  ),
  (
    nothing_unpickles,
    "audiomosaic_jax/embed.py",
    "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
    "import numpy as np\nnp.load('a.npy')",
  ),
  (
    files_and_functions_are_short,
    "audiomosaic_jax/vit.py",
    "def f():\n" + "  x = 1\n" * 60,
    'def f():\n  """A\n\n  B.\n  """\n' + "  x = 1\n" * 59,
  ),
  (
    files_and_functions_are_short,
    "audiomosaic_jax/vit.py",
    "x = 1\n" * 401,
    "x = 1\n" * 400,
  ),
  (
    nothing_is_left_unfinished,
    "audiomosaic_jax/vit.py",
    "def f():\n  raise NotImplementedError",
    "try:\n  f()\nexcept NotImplementedError:\n  pass",
  ),
  (
    nothing_is_left_unfinished,
    "audiomosaic_jax/vit.py",
    "x = 1  # TO" + "DO: two",
    "x = 1",
  ),
  (files_say_what_they_hold, "audiomosaic_jax/utils.py", "x = 1", ""),
]


@pytest.mark.parametrize(("rule", "path", "broken", "kept"), EXAMPLES)
def test_the_rule_tells_a_broken_file_from_a_good_one(rule, path, broken, kept):
  assert list(rule(parse(path, broken)))
  if kept:
    assert not list(rule(parse(path, kept)))


def test_every_rule_has_an_example():
  assert {rule for rule, *_ in EXAMPLES} == set(RULES)
