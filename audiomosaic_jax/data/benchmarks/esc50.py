"""ESC-50: 2000 five-second clips of 50 classes in five folds."""

from audiomosaic_jax.data import layout, sources

SOURCE = "github.com/karolpiczak/ESC-50"
TABLE = "meta/esc50.csv"
COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file")
FOLDS = ("1", "2", "3", "4", "5")
SPLITS = ("all", *(f"{no}fold{n}" for n in FOLDS for no in ("", "not_")))


def esc50(
  split: str,
  *,
  data_dir: layout.Path,
  max_missing_fraction: float,
  sample_rate_hz: int,
) -> sources.Source:
  """ESC-50 as its archive holds it.

  `data_dir` is ESC-50-master, or the folder that it was extracted into.
  Run k of the five tests on "fold<k>" and trains on "not_fold<k>". Classes
  are numbered by the column `target`, groups are the Freesound recordings
  that the clips were cut out of, which no two folds share.

  Args:
    split: "fold1" to "fold5", "not_fold1" to "not_fold5" or "all".
    data_dir: the folder.
    max_missing_fraction: share of listed clips that may be missing; a result
      on fewer than all of them is not comparable, so use 0.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: list or clips are not there.
    ValueError: unknown split, a wrong line, missing clips.
  """
  if split not in SPLITS:
    raise ValueError(f"no split {split!r}; choose {', '.join(SPLITS)}")
  root = layout.find_root(
    data_dir, holds=[TABLE, "audio"], inside=["ESC-50-master"], source=SOURCE
  )
  rows = list(
    layout.read_rows(root / TABLE, columns=len(COLUMNS), header=COLUMNS)
  )
  class_names = _class_names(rows)
  files = set(sources.list_audio(root / "audio"))
  clips = []
  for where, (filename, fold, target, _, _, recording, *_) in rows:
    if fold not in FOLDS:
      raise ValueError(f"{where}: fold {fold!r} is not 1 to 5")
    if split in ("all", f"fold{fold}") or (
      split.startswith("not_") and split != f"not_fold{fold}"
    ):
      layout.check_relative(filename, where)
      clips.append(
        layout.Clip(
          id=filename,
          path=f"audio/{filename}" if filename in files else None,
          label=int(target),
          group=recording,
          where=where,
        )
      )
  return layout.make_source(
    clips,
    root=root,
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
    max_missing_fraction=max_missing_fraction,
    name=f"ESC-50 {split}",
  )


def _class_names(rows: list[layout.Row]) -> list[str]:
  """Returns the categories by target; each has one of 0 to n - 1."""
  names = {}
  for where, (_, _, target, category, *_) in rows:
    if not target.isdecimal():
      raise ValueError(f"{where}: target {target!r} is not a number")
    if names.setdefault(int(target), category) != category:
      raise ValueError(
        f"{where}: target {target} is {category!r} here and "
        f"{names[int(target)]!r} above"
      )
  if sorted(names) != list(range(len(names))):
    raise ValueError(
      f"{rows[0].where.path}: the targets are not 0 to "
      f"{len(names) - 1}: {sorted(names)}"
    )
  return [names[target] for target in range(len(names))]
