"""Programs that take turns, each in a process of its own.

This file imports little: every process imports it again.
"""

import functools
import os

import pytest

from benchmarks import turns


def add(number):
  total = [number]

  def act(more):
    total[0] += more
    return {"total": total[0], "pid": os.getpid()}

  return act


def leave(code):
  os._exit(code)


def test_players_keep_their_state_and_take_turns():
  start = functools.partial(turns.Player, environment={})
  with start("a", add, (1,)) as a, start("b", add, (10,)) as b:
    said = turns.play([a, b], 3, 5)
  assert [s["total"] for s in said["a"]] == [6, 11, 16]
  assert [s["total"] for s in said["b"]] == [15, 20, 25]
  assert len({s["pid"] for s in said["a"] + said["b"]} | {os.getpid()}) == 3


def test_a_process_that_ends_is_named_with_its_exit_code():
  with pytest.raises(RuntimeError, match=r"'a' ended with exit code 3"):
    turns.Player("a", leave, (3,), {})
