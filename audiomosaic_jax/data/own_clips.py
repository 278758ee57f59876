"""Anybody's folder of clips: classes in folders or in a table, cut or not.

DIR/CLASS/*.wav                      all clips, to be cut into splits
DIR/{train,valid,test}/CLASS/*.wav   splits; valid may be missing
DIR/labels.csv                       see `task.TaskSource`; a column split or
                                     none
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from absl import logging

from audiomosaic_jax.data import layout, sources, tables, task

# What others call a split, in lower case.
NAMES = {
  "train": ("train", "training"),
  "valid": ("valid", "val", "validation", "dev"),
  "test": ("test", "testing"),
}


class Layout(NamedTuple):
  """How a data set is laid out.

  Attributes:
    source: arguments of `datasets.make_dataset`, except the split.
    splits: our name of a split -> its name there, in the order of `NAMES`;
      {} if all has to be cut. None is a data set that is asked for its splits
      by their own names.
  """

  source: dict
  splits: dict[str, str] | None


def find(source: Mapping) -> Layout:
  """Looks at a data set before it is read.

  Args:
    source: arguments of `datasets.make_dataset`, except the split.

  Raises:
    ValueError: no folder is named, or some splits are there and others not.
  """
  source = dict(source)
  if source["name"] not in ("folder", "task"):
    return Layout(source, None)
  if not source["data_dir"]:
    raise ValueError(
      "data.source.data_dir is not set; give the folder of your clips"
    )
  if source["data_dir"] == "demo" and source["name"] == "task":
    return Layout(source, None)
  root = pathlib.Path(source["data_dir"]).expanduser()
  if source["name"] == "folder" and not (root / task.TABLE).is_file():
    return _folder(source, root)
  if source["name"] == "folder":
    if source.pop("class_names") is not None:
      raise ValueError(
        f"data.source.class_names is set, but {root / task.TABLE} has the "
        "labels; leave it out, or remove the table"
      )
    source["name"] = "task"
  return _table(source, root)


def _folder(source: dict, root: pathlib.Path) -> Layout:
  """Returns the layout of folders of classes, maybe in folders of splits."""
  if not root.is_dir():
    return Layout(source, {})  # Reading it says what is wrong.
  if unread := layout.other_formats(root):
    logging.warning("%s:%s", root, unread)
  folders = [
    path
    for path in sorted(root.iterdir())
    if path.is_dir() and not path.name.startswith(".")
  ]
  # A folder of nothing but clips is a class, even if it is called "train".
  nested = [path for path in folders if any(p.is_dir() for p in path.iterdir())]
  splits = _known(path.name for path in nested)
  lost = [name for name in ("train", "test") if name not in splits]
  if splits and lost and len(splits) == len(folders):
    raise ValueError(
      f"{root} has {', '.join(splits.values())} but not {', '.join(lost)}; add "
      f"it, or move the classes up into {root} to have all clips cut"
    )
  if lost:
    return Layout(source, {})
  if source["class_names"] is None:
    names = {
      name
      for split in splits.values()
      for name in sources.FolderSource(
        root / split, class_names=None, sample_rate_hz=1
      ).class_names
    }
    source["class_names"] = tuple(sorted(names))
  return Layout(source, splits)


def _table(source: dict, root: pathlib.Path) -> Layout:
  """Returns the layout that a labels.csv tells."""
  table = root / task.TABLE
  if not table.is_file():
    return Layout(source, {})  # Reading it says what is wrong.
  rows = tables.read_csv(table, ["path", "label"])
  if "split" not in rows[0][1]:
    return Layout(source, {})
  splits = _known({row["split"] or "" for _, row in rows})
  return Layout(source, splits or None)


def _known(names: Iterable[str]) -> dict[str, str]:
  """Returns our name -> theirs of what is called like a split."""
  found: dict[str, str] = {}
  left_out = []
  ours_of = {name: ours for ours, known in NAMES.items() for name in known}
  for name in sorted(names):
    ours = ours_of.get(name.strip().lower())
    if ours is None:
      left_out.append(name)
    elif ours in found:
      raise ValueError(
        f"{found[ours]!r} and {name!r} both mean the split {ours}; give them "
        "one name"
      )
    else:
      found[ours] = name
  if found and left_out:
    logging.warning(
      "clips of %s are in no split that is used; splits are called %s",
      ", ".join(map(repr, left_out)),
      ", ".join(found.values()),
    )
  return {ours: found[ours] for ours in NAMES if ours in found}
