"""AudioSet: the official lists and a folder of clips named as you like."""

import pathlib
from collections.abc import Iterator, Mapping

from audiomosaic_jax.data import layout, sources, tables, youtube

SOURCE = "research.google.com/audioset/download.html"
CLASSES = "class_labels_indices.csv"
BALANCED, UNBALANCED = "balanced_train_segments", "unbalanced_train_segments"
SPLITS = {
  "balanced": (BALANCED,),
  "unbalanced": (UNBALANCED,),
  "full": (UNBALANCED, BALANCED),
  "eval": ("eval_segments",),
}


def audioset(
  split: str,
  *,
  data_dir: layout.Path,
  audio_dir: str | None,
  max_missing_fraction: float,
  sample_rate_hz: int,
) -> sources.Source:
  """AudioSet: 527 classes, several to a clip.

  `data_dir` holds class_labels_indices.csv and the official lists of the
  splits wanted: balanced_train_segments.csv, unbalanced_train_segments.csv,
  eval_segments.csv. The clips are 10-second files anywhere below `audio_dir`,
  named by YouTube id as `youtube.Files` says. The id of a clip is its YouTube
  id, whatever the file is called; it occurs once in all lists.

  Args:
    split: "balanced" (AudioSet-20K), "unbalanced", "full" (both: AudioSet-2M)
      or "eval".
    data_dir: folder of the lists.
    audio_dir: folder of the clips, relative to `data_dir` or absolute; None
      is `data_dir`. Naming the split's own folder saves walking the others.
    max_missing_fraction: share of listed clips that may be missing; 0.1 to
      0.3 is usual, as videos are withdrawn.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: lists or clips are not there.
    ValueError: unknown split or label, a wrong line, too many missing clips.
  """
  if split not in SPLITS:
    raise ValueError(f"no split {split!r}; choose {', '.join(SPLITS)}")
  lists = [f"{name}.csv" for name in SPLITS[split]]
  root = layout.find_root(
    data_dir, holds=[CLASSES, *lists], inside=(), source=SOURCE
  )
  index, class_names = tables.read_label_csv(root / CLASSES)
  audio_root = root / pathlib.Path(audio_dir or "").expanduser()
  files = youtube.Files(sources.list_audio(audio_root))
  clips = [
    clip for name in lists for clip in _read_segments(root / name, index, files)
  ]
  return layout.make_source(
    clips,
    root=audio_root,
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
    max_missing_fraction=max_missing_fraction,
    name=f"AudioSet {split}",
  )


def _read_segments(
  path: pathlib.Path, index: Mapping[str, int], files: youtube.Files
) -> Iterator[layout.Clip]:
  """Yields the clips of a list: id, start, end, "mid,mid"."""
  for where, cells in layout.read_rows(path, columns=4, header=None):
    video_id = youtube.check_id(cells[0], where)
    start_s = youtube.read_seconds(cells[1], where)
    youtube.read_seconds(cells[2], where)
    # Unquoted lists have more cells; a mid has no comma of its own.
    mids = [mid for cell in cells[3:] for mid in cell.split(",")]
    labels = {
      layout.class_index(mid.strip(), index, where, CLASSES) for mid in mids
    }
    yield layout.Clip(
      id=video_id,
      path=files.find(video_id, start_s, alone=True),
      label=tuple(sorted(labels)),
      group=None,
      where=where,
    )
