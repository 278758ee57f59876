"""The config of a command line."""

import sys
from unittest import mock

from absl import flags
from ml_collections import ConfigDict, config_flags


def parse(*words: str) -> ConfigDict:
  """Returns the config of a command line, as main reads it."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    "config", None, lock_config=True, flag_values=values
  )
  # Overrides are looked up in the command line itself.
  with mock.patch.object(sys, "argv", ["main", *words]):
    values(sys.argv)
  return holder.value
