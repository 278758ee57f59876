"""Programs that take turns, each in a process of its own.

While one works the others wait, so they share a machine and its mood without
disturbing each other, and the memory of each is its own.
"""

import collections
import contextlib
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from audiomosaic_jax import heap

Figures = dict[str, Any]


class Player:
  """A program in a process of its own, which acts when it is told to."""

  def __init__(
    self,
    name: str,
    make: Callable[..., Callable[..., Figures]],
    arguments: Sequence[Any],
    environment: Mapping[str, str],
    keep_freed_memory: bool = False,
  ):
    """Starts the process and waits until `make` has returned.

    Args:
      name: for error messages.
      make: a function of a module, which returns what is done at each turn.
      arguments: of `make`.
      environment: variables of the process, besides those of this one.
      keep_freed_memory: as `config.runtime` says.

    Raises:
      RuntimeError: the process ended.
    """
    self.name = name
    context = multiprocessing.get_context("spawn")
    self._pipe, other_end = context.Pipe()
    # No daemon: those may have no worker processes.
    self._process = context.Process(
      target=_play, args=(other_end, make, tuple(arguments), keep_freed_memory)
    )
    with _environment(environment):
      self._process.start()
    other_end.close()
    self._receive()

  def __enter__(self) -> "Player":
    return self

  def __exit__(self, *_: Any) -> None:
    """Ends the process."""
    self._pipe.close()
    self._process.join()

  def act(self, *arguments: Any) -> Figures:
    """Lets the program do its turn and returns what it says of it.

    Raises:
      RuntimeError: the process ended.
    """
    self._pipe.send(arguments)
    return self._receive()

  def _receive(self) -> Figures:
    try:
      return self._pipe.recv()
    except EOFError:
      self._process.join()
      raise RuntimeError(
        f"the process of {self.name!r} ended with exit code "
        f"{self._process.exitcode}; its own message is above"
      ) from None


def play(
  players: Sequence[Player], rounds: int, *arguments: Any
) -> dict[str, list[Figures]]:
  """Lets every player act once per round, each in turn the first.

  Args:
    players: who plays.
    rounds: how often each acts.
    *arguments: of every turn.

  Returns:
    Name of the player -> what it said, round by round.
  """
  said = collections.defaultdict(list)
  for i in tqdm.trange(rounds, unit="round"):
    first = i % len(players)
    for player in [*players[first:], *players[:first]]:
      said[player.name].append(player.act(*arguments))
  return dict(said)


def reset_peak_memory() -> None:
  """Starts `peak_memory` anew, where the system can (Linux)."""
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
  """Returns the most bytes of memory this process has had, -1 if unknown."""
  status = pathlib.Path("/proc/self/status")
  lines = status.read_text().splitlines() if status.exists() else []
  sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
  return 1024 * int(sizes[0]) if sizes else -1


def _play(pipe, make: Callable, arguments: tuple, keep_memory: bool) -> None:
  """Makes the program and acts until the other end closes."""
  if keep_memory:
    heap.keep_freed_memory()
  act = make(*arguments)
  pipe.send({})
  with contextlib.suppress(EOFError):
    while True:
      pipe.send(act(*pipe.recv()))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
  """Sets variables for processes that are started meanwhile."""
  before = dict(os.environ)
  os.environ.update(variables)
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)
