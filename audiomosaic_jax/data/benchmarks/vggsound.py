"""VGGSound: the official list and a folder of clips named as you like."""

import collections
import pathlib

from audiomosaic_jax.data import layout, sources, youtube

SOURCE = "www.robots.ox.ac.uk/~vgg/data/vggsound"
TABLE = "vggsound.csv"
SPLITS = ("train", "test")


def vggsound(
  split: str,
  *,
  data_dir: layout.Path,
  audio_dir: str | None,
  max_missing_fraction: float,
  sample_rate_hz: int,
) -> sources.Source:
  """VGGSound: 309 classes, one to a clip, 10 seconds each.

  `data_dir` holds vggsound.csv, lines of YouTube id, start second, label,
  split. The clips are audio files named as `youtube.Files` says, such as
  <id>_000030.wav or <id>.wav; take the sound out of the videos first. Classes
  are numbered alphabetically over both splits.

  Args:
    split: "train" or "test".
    data_dir: folder of the list.
    audio_dir: folder of the clips, relative to `data_dir` or absolute; None
      is `data_dir`.
    max_missing_fraction: share of listed clips that may be missing.
    sample_rate_hz: rate the clips are resampled to.

  Raises:
    DatasetNotPreparedError: list or clips are not there.
    ValueError: unknown split, a wrong line, too many missing clips.
  """
  if split not in SPLITS:
    raise ValueError(f"no split {split!r}; choose {', '.join(SPLITS)}")
  root = layout.find_root(data_dir, holds=[TABLE], inside=(), source=SOURCE)
  rows = list(layout.read_rows(root / TABLE, columns=4, header=None))
  for where, cells in rows:
    if cells[3] not in SPLITS:
      raise ValueError(
        f"{where}: split {cells[3]!r} is not one of {', '.join(SPLITS)}"
      )
  class_names = sorted({cells[2] for _, cells in rows})
  index = {label: i for i, label in enumerate(class_names)}
  audio_root = root / pathlib.Path(audio_dir or "").expanduser()
  files = youtube.Files(sources.list_audio(audio_root))
  count = collections.Counter(cells[0] for _, cells in rows)
  clips = []
  for where, cells in rows:
    if cells[3] == split:
      video_id = youtube.check_id(cells[0], where)
      start_s = youtube.read_seconds(cells[1], where)
      clips.append(
        layout.Clip(
          id=f"{video_id}_{round(start_s):06d}",
          path=files.find(video_id, start_s, alone=count[video_id] == 1),
          label=index[cells[2]],
          group=None,
          where=where,
        )
      )
  return layout.make_source(
    clips,
    root=audio_root,
    class_names=class_names,
    sample_rate_hz=sample_rate_hz,
    max_missing_fraction=max_missing_fraction,
    name=f"VGGSound {split}",
  )
