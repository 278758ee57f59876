"""What the process does with memory that programs have freed."""

import ctypes
import platform

# Names of malloc.h, and the threshold that is never reached.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
NEVER = -1


def keep_freed_memory() -> None:
  """Keeps freed memory in the process, for the next step to take.

  On a CPU every step frees temporaries of many megabytes. The C library gives
  them back to the system, which clears each page again when the next step
  touches it. With one heap for all threads that grows and never shrinks they
  stay. It must be set before threads have heaps of their own, so before JAX
  has compiled anything. Libraries other than GNU's are left as they are.
  """
  if platform.libc_ver()[0] != "glibc":
    return
  mallopt = ctypes.CDLL(None).mallopt
  mallopt(ARENA_MAX, 1)
  mallopt(MMAP_MAX, 0)
  mallopt(TRIM_THRESHOLD, NEVER)
