"""Settings of all tests: eight CPU devices, exact float32, checked types.

Many tests build the same job again, some in processes of their own: what one
has compiled the others read from a folder that is gone at the end.

The environment is set before anything imports jax, because the number of CPU
devices is fixed when the backend starts.
"""

import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of a test is compiling a program that runs once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # The workers of pytest-xdist inherit it, and with it the folder.
  COMPILED = tempfile.mkdtemp(prefix="audiomosaic-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import jaxtyping
import pytest

# Shapes and dtypes written in the signatures are enforced in tests only.
jaxtyping.install_import_hook("audiomosaic_jax", "beartype.beartype")

jax.config.update("jax_default_matmul_precision", "float32")


def pytest_unconfigure():
  """Deletes the compiled programs, in the process that made the folder."""
  if COMPILED:
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture
def golden():
  """Returns a loader of the stored reference numbers by file name."""
  import pathlib

  import numpy as np

  folder = pathlib.Path(__file__).parent / "golden"
  return lambda name: np.load(folder / name)
