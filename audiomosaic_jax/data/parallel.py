"""Work on many clips at once, in order and without running ahead."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(
  function: Callable[[T], R], items: Iterable[T], num_threads: int
) -> Iterator[R]:
  """Maps in threads and in order, only a few results ahead of the reader."""
  with futures.ThreadPoolExecutor(num_threads) as pool:
    waiting = collections.deque()
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > 2 * num_threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
