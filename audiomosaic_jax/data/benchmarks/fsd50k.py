"""FSD50K: Freesound clips of 200 classes, several to a clip."""

from audiomosaic_jax.data import layout, sources

SOURCE = "zenodo.org/records/4060432"
TRUTH = "FSD50K.ground_truth"
SPLITS = {
  "dev": ("dev", None),
  "train": ("dev", "train"),
  "val": ("dev", "val"),
  "eval": ("eval", None),
}


def fsd50k(
  split: str,
  *,
  data_dir: layout.Path,
  max_missing_fraction: float,
  sample_rate_hz: int,
) -> sources.Source:
  """FSD50K as its archives hold it; 0.3 to 30 seconds a clip.

  `data_dir` holds FSD50K.ground_truth (dev.csv, eval.csv, vocabulary.csv) and
  FSD50K.dev_audio or FSD50K.eval_audio, whichever the split needs. Classes
  are numbered as in vocabulary.csv; the labels include the parents of each
  class, as published.

  Args:
    split: "train" or "val", which the column `split` of dev.csv tells apart,
      "dev" for both, or "eval".
    data_dir: the folder.
    max_missing_fraction: share of listed clips that may be missing.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: lists or clips are not there.
    ValueError: unknown split or label, a wrong line, missing clips.
  """
  if split not in SPLITS:
    raise ValueError(f"no split {split!r}; choose {', '.join(SPLITS)}")
  part, wanted = SPLITS[split]
  table, vocabulary = f"{TRUTH}/{part}.csv", f"{TRUTH}/vocabulary.csv"
  folder = f"FSD50K.{part}_audio"
  root = layout.find_root(
    data_dir,
    holds=[table, vocabulary, folder],
    inside=["FSD50K"],
    source=SOURCE,
  )
  class_names = _read_vocabulary(root / vocabulary)
  index = {name: i for i, name in enumerate(class_names)}
  columns = ["fname", "labels", "mids", *(["split"] if part == "dev" else [])]
  files = set(sources.list_audio(root / folder))
  clips = []
  for where, cells in layout.read_rows(
    root / table, columns=len(columns), header=columns
  ):
    if part == "dev" and cells[3] not in ("train", "val"):
      raise ValueError(f"{where}: split {cells[3]!r} is not train or val")
    if wanted in (None, cells[-1]):
      name = layout.check_relative(f"{cells[0]}.wav", where)
      labels = {
        layout.class_index(label, index, where, vocabulary)
        for label in cells[1].split(",")
      }
      clips.append(
        layout.Clip(
          id=cells[0],
          path=f"{folder}/{name}" if name in files else None,
          label=tuple(sorted(labels)),
          group=None,
          where=where,
        )
      )
  return layout.make_source(
    clips,
    root=root,
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
    max_missing_fraction=max_missing_fraction,
    name=f"FSD50K {split}",
  )


def _read_vocabulary(path: layout.Path) -> list[str]:
  """Returns the classes; lines of index, name, mid, without a header."""
  rows = list(layout.read_rows(path, columns=3, header=None))
  for expected, (where, cells) in enumerate(rows):
    if cells[0] != str(expected):
      raise ValueError(f"{where}: index {cells[0]!r} should be {expected}")
  return [cells[1] for _, cells in rows]
