"""Settings of all tests: eight CPU devices, exact float32, checked types.

The environment is set before anything imports jax, because the number of CPU
devices is fixed when the backend starts.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of a test is compiling a program that runs once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jaxtyping
import pytest

# Shapes and dtypes written in the signatures are enforced in tests only.
jaxtyping.install_import_hook("audiomosaic_jax", "beartype.beartype")

jax.config.update("jax_default_matmul_precision", "float32")


@pytest.fixture
def golden():
  """Returns a loader of the stored reference numbers by file name."""
  import pathlib

  import numpy as np

  folder = pathlib.Path(__file__).parent / "golden"
  return lambda name: np.load(folder / name)
