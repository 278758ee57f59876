"""EnvSDD: real environmental sounds and their generated doubles.

What is known of the layout is what the authors' scripts do
(github.com/apple-yinhan/EnvSDD: config.py, generate_json_dev.py,
generate_json_test.py); they read the tables by position, so this does too.
Not verified, for want of the archives (zenodo.org/records/15220951 and
15241138): the names of the columns, the names of the folders inside the
archives, and whether test_metadata.csv is in the second one. If your copy
differs, move it to the layout below or use `manifest_dir`.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator

from audiomosaic_jax.data import layout, sources, tables

SOURCE = "zenodo.org/records/15220951 and zenodo.org/records/15241138"
CLASS_NAMES = ("fake", "real")
SPLITS = ("train", "valid", "test01", "test02", "test03", "test04")
USAGE = {"train": "train", "valid": "validation"}

# What the development set was generated with, by track.
DEVELOPMENT = {
  "ata": ("audioldm1",),
  "tta": ("audiogen", "audioldm1", "audioldm2"),
}
# Tests 1 and 3 have those generators, tests 2 and 4 these.
UNSEEN = {"ata": ("audioldm2",), "tta": ("audiolcm", "tangoflux")}
# Sounds of tests 1 and 2 come from data sets in training, of 3 and 4 not.
SEEN_SOUNDS, UNSEEN_SOUNDS = ("TUT", "Urban"), ("DCASE", "Clotho")


def envsdd(
  split: str,
  *,
  track: str,
  data_dir: layout.Path,
  manifest_dir: layout.Path | None,
  max_missing_fraction: float,
  sample_rate_hz: int,
) -> sources.Source:
  """EnvSDD, classes fake (0) and real (1), as the authors number them.

  `data_dir` holds, of what the split needs,
    datasplit_dev.csv    file, data set, ..., usage (train or validation)
    development/real_audio/<data set>/<file>
    development/fake_audio/{TTA,ATA}/<generator>/<data set>/<file>
    test_metadata.csv    file, original file, data set, real|ata|tta, generator
    test/audio/<file>
  Both tracks have the same real sounds, test02 those of test01 and test04
  those of test03. Groups are the real sounds that fakes were made from.

  With `manifest_dir`, the lists are <track>/dev/{train,valid}.json and
  <track>/test/test0{1,2,3,4}.json in it instead, either as the authors write
  them, [{"file_path": ..., "label": "real" or "fake"}], or as the published
  AudioMosaic code reads them, {"data": [{"wav": ..., "labels": mid}]} with
  class_labels_indices.csv of classes called fake and real.

  Args:
    split: "train", "valid", or "test01" (nothing new), "test02" (new
      generators), "test03" (new sounds) or "test04" (both new).
    track: "ata" or "tta".
    data_dir: the folder; relative paths of manifests start there.
    manifest_dir: folder of manifests; None reads the tables.
    max_missing_fraction: share of listed clips that may be missing.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: lists or clips are not there.
    ValueError: unknown split or label, a wrong line, missing clips.
  """
  if split not in SPLITS:
    raise ValueError(f"no split {split!r}; choose {', '.join(SPLITS)}")
  if track not in DEVELOPMENT:
    raise ValueError(f"track={track!r}; choose {' or '.join(DEVELOPMENT)}")
  if manifest_dir is not None:
    root = layout.find_root(data_dir, holds=[], inside=(), source=SOURCE)
    lists = pathlib.Path(manifest_dir).expanduser()
    clips = _read_manifest(root, lists, track, split)
  elif split in USAGE:
    holds = ["datasplit_dev.csv", "development"]
    root = layout.find_root(data_dir, holds=holds, inside=(), source=SOURCE)
    clips = _read_development(root, track, USAGE[split])
  else:
    holds = ["test_metadata.csv", "test/audio"]
    root = layout.find_root(data_dir, holds=holds, inside=(), source=SOURCE)
    clips = _read_test(root, track, split)
  return layout.make_source(
    clips,
    root=root,
    class_names=CLASS_NAMES,
    sample_rate_hz=sample_rate_hz,
    max_missing_fraction=max_missing_fraction,
    name=f"EnvSDD {track} {split}",
  )


def _read_development(
  root: pathlib.Path, track: str, usage: str
) -> Iterator[layout.Clip]:
  """Yields each real sound and its fakes."""
  files = set(sources.list_audio(root / "development"))
  table = root / "datasplit_dev.csv"
  folders = ["real_audio"]
  folders += [f"fake_audio/{track.upper()}/{g}" for g in DEVELOPMENT[track]]
  for where, cells in layout.read_rows(table, columns=3, header=()):
    if cells[-1] not in USAGE.values():
      raise ValueError(
        f"{where}: usage {cells[-1]!r} is not one of "
        f"{', '.join(USAGE.values())}"
      )
    if cells[-1] != usage:
      continue
    sound = layout.check_relative(f"{cells[1]}/{cells[0]}", where)
    for folder in folders:
      path = f"{folder}/{sound}"
      yield layout.Clip(
        id=path,
        path=f"development/{path}" if path in files else None,
        label=int(folder == "real_audio"),
        group=sound,
        where=where,
      )


def _read_test(
  root: pathlib.Path, track: str, split: str
) -> Iterator[layout.Clip]:
  """Yields the clips of one of the four tests."""
  files = set(sources.list_audio(root / "test" / "audio"))
  sounds = SEEN_SOUNDS if split in ("test01", "test02") else UNSEEN_SOUNDS
  odd = split in ("test01", "test03")
  generators = DEVELOPMENT[track] if odd else UNSEEN[track]
  table = root / "test_metadata.csv"
  for where, cells in layout.read_rows(table, columns=5, header=()):
    name, original, data_set, kind, generator = cells[:5]
    _check_test_row(where, data_set, kind, generator)
    if not any(text in data_set for text in sounds):
      continue
    if kind == "real" or (kind == track and generator in generators):
      layout.check_relative(name, where)
      yield layout.Clip(
        id=name,
        path=f"test/audio/{name}" if name in files else None,
        label=int(kind == "real"),
        group=f"{data_set}/{original}",
        where=where,
      )


def _check_test_row(
  where: layout.Where, data_set: str, kind: str, generator: str
) -> None:
  """Raises ValueError for a row that belongs to no test."""
  if not any(text in data_set for text in (*SEEN_SOUNDS, *UNSEEN_SOUNDS)):
    raise ValueError(f"{where}: unknown data set {data_set!r}")
  if kind not in ("real", *DEVELOPMENT):
    raise ValueError(f"{where}: {kind!r} is not real, ata or tta")
  if kind != "real" and generator not in DEVELOPMENT[kind] + UNSEEN[kind]:
    raise ValueError(f"{where}: unknown {kind} generator {generator!r}")


def _read_manifest(
  root: pathlib.Path, manifest_dir: pathlib.Path, track: str, split: str
) -> Iterator[layout.Clip]:
  """Yields the clips of a JSON list in either format."""
  part = "dev" if split in USAGE else "test"
  path = manifest_dir / track / part / f"{split}.json"
  if not path.is_file():
    raise layout.DatasetNotPreparedError(f"there is no manifest {path}")
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(entries, dict):
      names = _names_of_mids(manifest_dir / "class_labels_indices.csv")
      fields = [
        (e["wav"], names.get(e["labels"], e["labels"])) for e in entries["data"]
      ]
    else:
      fields = [(e["file_path"], e["label"]) for e in entries]
    if not all(isinstance(text, str) for pair in fields for text in pair):
      raise TypeError("an entry is not text")
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
    raise ValueError(
      f"{path} is neither the authors' list of file_path and label nor "
      f'{{"data": [{{"wav": ..., "labels": ...}}]}}: {type(e).__name__} {e}'
    ) from None
  index = {name: i for i, name in enumerate(CLASS_NAMES)}
  names = _short_names([file for file, _ in fields])
  for number, (file, label) in enumerate(fields):
    where = f"{path}, entry {number}"
    if not os.path.isabs(file):
      layout.check_relative(file, where)
    yield layout.Clip(
      id=names[number],
      path=file if (root / file).is_file() else None,
      label=layout.class_index(label, index, where, "fake, real"),
      group=None,
      where=where,
    )


def _short_names(files: list[str]) -> list[str]:
  """Returns names that leave out where a copy lies, so that copies agree."""
  known = [re.search(r"(?:real_audio|fake_audio)/.*", file) for file in files]
  names = [
    match.group() if match else file.rpartition("/")[2]
    for file, match in zip(files, known, strict=True)
  ]
  return names if len(set(names)) == len(names) else files


def _names_of_mids(path: pathlib.Path) -> dict[str, str]:
  """Returns fake or real for every mid of a list of classes."""
  index, names = tables.read_label_csv(path)
  return {mid: names[i].lower() for mid, i in index.items()}
