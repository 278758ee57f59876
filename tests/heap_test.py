"""What happens to memory that programs have freed."""

import platform
import subprocess
import sys

import pytest

CODE = """
import sys
import numpy as np
from audiomosaic_jax import heap

def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * 4096

if sys.argv[1] == "keep":
  heap.keep_freed_memory()
before = resident()
large = np.ones(2**27, np.uint8)
del large
print(resident() - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="mallopt is of GNU's C library"
)
@pytest.mark.parametrize("mode", ["keep", "return"])
def test_freed_memory_is_kept_when_asked_for(mode):
  done = subprocess.run(
    [sys.executable, "-c", CODE, mode],
    capture_output=True,
    text=True,
    check=True,
  )
  kept = int(done.stdout) > 2**26
  assert kept == (mode == "keep")
