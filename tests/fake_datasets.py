"""Small copies of published data sets, with their real names and layouts.

Every clip is a tone of its own, so that no two have the same samples, and
`FAKES` has a writer for each: folder -> (arguments, one set per split).
"""

import itertools
import json
import pathlib

import numpy as np
import soundfile

RATE_HZ = 8_000
_pitch_hz = itertools.cycle(range(100, 3_900, 7))


def write_clip(path, seconds=0.1, rate_hz=RATE_HZ, amplitude=0.25):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  time_s = np.arange(int(seconds * rate_hz)) / rate_hz
  tone = np.sin(2 * np.pi * next(_pitch_hz) * time_s + 0.1)
  soundfile.write(path, amplitude * tone, rate_hz)
  return path


# YouTube ids with everything that ids can have: a leading Y, "-" and "_".
VIDEOS = (
  *("--PJHxphWEs", "Y1abcdefghi", "a_30_40_bcd", "_______0_10", "-0123456789"),
  *("Zebcdefghi_", "bbbbbbbbbbb", "ccccccccccc", "ddddddddddd", "eeeeeeeeeee"),
)
MIDS = ("/m/09x0r", "/t/dd00088", "/m/04rlf")
SEGMENTS_HEAD = """\
# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
"""


def write_audioset(root):
  """Ten clips in three lists, one file for each way of naming them."""
  root.mkdir(parents=True, exist_ok=True)
  (root / "class_labels_indices.csv").write_text(
    "index,mid,display_name\n"
    f'0,{MIDS[0]},"Speech"\n1,{MIDS[1]},"Gush"\n2,{MIDS[2]},"Music, all"\n'
  )
  rows = [
    f'{video}, {30 + i}.000, {40 + i}.000, "{",".join(MIDS[: 1 + i % 3])}"\n'
    for i, video in enumerate(VIDEOS)
  ]
  for name, part in {
    "balanced_train_segments": rows[:3],
    "unbalanced_train_segments": rows[3:7],
    "eval_segments": rows[7:],
  }.items():
    (root / f"{name}.csv").write_text(SEGMENTS_HEAD + "".join(part))
  names = [
    *("Y{0}.wav", "{0}.flac", "{0}_{1}_{2}.wav", "{0}_{1}000.ogg", "{0}.wav"),
    *("Y{0}_{1}.000_{2}.000.wav", "{0}.WAV", "{0}_{1}.wav", "{0}.wav"),
    "{0}_{1}000_{2}000.flac",
  ]
  for i, (name, video) in enumerate(zip(names, VIDEOS, strict=True)):
    file = name.format(video, 30 + i, 40 + i)
    write_clip(root / "clips" / f"part{i % 2}" / file)
  return {"data_dir": root, "audio_dir": "clips"}


def write_vggsound(root):
  rows = []
  for i, video in enumerate(VIDEOS):
    label = ("waterfall burbling", '"people whispering, softly"')[i // 2 % 2]
    rows.append(f"{video},{i},{label},{('train', 'test')[i % 2]}\n")
    name = f"{video}_{i:06d}.wav" if i % 3 else f"{video}.wav"
    write_clip(root / "video" / name)
  (root / "vggsound.csv").write_text("".join(rows))
  return {"data_dir": root, "audio_dir": None}


def write_esc50(root):
  """Three classes in each of five folds, two clips of one recording."""
  head = "filename,fold,target,category,esc10,src_file,take\n"
  rows = []
  for fold in range(1, 6):
    for target, name in enumerate(("dog", "rooster", "pig")):
      for take in "AB" if target == 0 else "A":
        recording = 100_000 + 10 * fold + target
        file = f"{fold}-{recording}-{take}-{target}.wav"
        rows.append(
          f"{file},{fold},{target},{name},{not target},{recording},{take}\n"
        )
        write_clip(root / "ESC-50-master" / "audio" / file)
  table = root / "ESC-50-master" / "meta" / "esc50.csv"
  table.parent.mkdir()
  table.write_text(head + "".join(rows))
  return {"data_dir": root}


def write_fsd50k(root):
  names = ("Accordion", "Acoustic_guitar", "Music")
  truth = root / "FSD50K.ground_truth"
  truth.mkdir(parents=True)
  (truth / "vocabulary.csv").write_text(
    "".join(f"{i},{name},/m/{i}\n" for i, name in enumerate(names))
  )
  labels = ['"Accordion,Music"', '"Acoustic_guitar,Music"', "Music"]
  dev = ["fname,labels,mids,split\n"]
  evaluation = ["fname,labels,mids\n"]
  for i in range(6):
    split = ("train", "train", "val")[i // 2]
    dev.append(f"{64760 + i},{labels[i % 3]},/m/{i % 3},{split}\n")
    evaluation.append(f"{37199 + i},{labels[i % 3]},/m/{i % 3}\n")
    write_clip(root / "FSD50K.dev_audio" / f"{64760 + i}.wav")
    write_clip(root / "FSD50K.eval_audio" / f"{37199 + i}.wav")
  (truth / "dev.csv").write_text("".join(dev))
  (truth / "eval.csv").write_text("".join(evaluation))
  return {"data_dir": root}


NOISE_SECONDS = {
  "doing_the_dishes": 2.0,
  "exercise_bike": 1.6,
  "running_tap": 2.1,
}


def write_speech_commands(root, words, speakers=("0a7c2a8d", "1b4c9b89")):
  """Per word and speaker one clip of each split."""
  lists = {"validation": [], "testing": []}
  for word in words:
    for speaker in speakers:
      for number, split in enumerate((None, "validation", "testing")):
        path = f"{word}/{speaker}_nohash_{number}.wav"
        write_clip(root / path)
        if split:
          lists[split].append(f"{path}\n")
  for name, lines in lists.items():
    (root / f"{name}_list.txt").write_text("".join(lines))
  for name, seconds in NOISE_SECONDS.items():
    write_clip(root / "_background_noise_" / f"{name}.wav", seconds)
  (root / "_background_noise_" / "README.md").write_text("noise")
  (root / "LICENSE").write_text("CC BY")
  return root


def write_speech_commands_v1(root):
  write_speech_commands(root, ("yes", "no", "bed", "zero"))
  return {"data_dir": root, "test_dir": None, "silence": False}


def write_speech_commands_v2(root):
  root = root / "SpeechCommands" / "speech_commands_v0.02"
  write_speech_commands(root, ("yes", "backward", "four"))
  return {"data_dir": root.parents[1]}


SOUNDS = {
  "35800-6-0-0.wav": "UrbanSound8K",
  "a033_33.wav": "TUTSED2016Dev",
  "airport-0-a_1.wav": "TUTASC2019Dev",
}
GENERATORS = {
  "TTA": ("audiogen", "audioldm1", "audioldm2", "audiolcm", "tangoflux"),
  "ATA": ("audioldm1", "audioldm2"),
}


def write_envsdd(root):
  """Three sounds to develop on, two known and two new ones to test."""
  lines = ["filename,dataset,caption,usage\n"]
  for i, (name, data_set) in enumerate(SOUNDS.items()):
    usage = "validation" if i == 2 else "train"
    lines.append(f'{name},{data_set},"a dog, barking",{usage}\n')
    write_clip(root / f"development/real_audio/{data_set}/{name}")
    for track, generators in GENERATORS.items():
      for generator in set(generators) & {"audiogen", "audioldm1", "audioldm2"}:
        folder = f"development/fake_audio/{track}/{generator}/{data_set}"
        write_clip(root / folder / name)
  (root / "datasplit_dev.csv").write_text("".join(lines))
  lines = ["name,source,dataset,type,generator\n"]
  count = itertools.count()
  for data_set in ("UrbanSound8K", "TUTSED2017Dev", "Clotho", "DCASE2023Task7"):
    rows = [("real", "real")]
    rows += [(t.lower(), g) for t, gs in GENERATORS.items() for g in gs]
    for kind, generator in rows:
      name = f"{next(count):06d}.wav"
      lines.append(f"{name},original.wav,{data_set},{kind},{generator}\n")
      write_clip(root / "test" / "audio" / name)
  (root / "test_metadata.csv").write_text("".join(lines))
  return {"data_dir": root, "track": "tta", "manifest_dir": None}


def write_folder(root):
  for name in ("cat/a", "cat/b", "dog/c"):
    write_clip(root / f"train/{name}.wav")
  return {"data_dir": root, "class_names": None}


def write_csv(root):
  write_clip(root / "a.wav")
  write_clip(root / "b.wav")
  (root / "t.csv").write_text("path,label,split\na.wav,x,train\nb.wav,y,test\n")
  return {
    "data_dir": root / "t.csv",
    "root": None,
    "path_column": "path",
    "label_column": "label",
    "split_column": "split",
    "class_names": None,
  }


def write_task(root):
  """Two classes in each split, and two cuts of one recording."""
  rows = ["path,label,split,group\n"]
  for split, count in (("train", 4), ("valid", 2), ("test", 2)):
    for i in range(count):
      write_clip(root / f"{split}{i}.wav")
      label = "cat" if i % 2 else "dog"
      rows.append(f"{split}{i}.wav,{label},{split},{split}{i // 3}\n")
  (root / "labels.csv").write_text("".join(rows))
  return {"data_dir": root}


def write_manifest(root):
  write_clip(root / "a.wav")
  (root / "classes.csv").write_text("index,mid,display_name\n0,/m/1,Cat\n")
  entries = [{"wav": "a.wav", "labels": "/m/1"}]
  (root / "train.json").write_text(json.dumps({"data": entries}))
  label_csv = root / "classes.csv"
  return {"data_dir": root, "label_csv": label_csv, "root": None}


# name -> (writer, the size of each split)
FAKES = {
  "audioset": (
    write_audioset,
    {"balanced": 3, "unbalanced": 4, "full": 7, "eval": 3},
  ),
  "csv": (write_csv, {"train": 1, "test": 1}),
  "envsdd": (
    write_envsdd,
    {
      **{"train": 8, "valid": 4, "test01": 8, "test02": 6},
      **{"test03": 8, "test04": 6},
    },
  ),
  "esc50": (write_esc50, {"fold1": 4, "not_fold1": 16, "all": 20}),
  "folder": (write_folder, {"train": 3}),
  "fsd50k": (write_fsd50k, {"train": 4, "val": 2, "dev": 6, "eval": 6}),
  "manifest": (write_manifest, {"train": 1}),
  "speech_commands_v1": (
    write_speech_commands_v1,
    {"train": 8, "valid": 8, "test": 8},
  ),
  "speech_commands_v2": (
    write_speech_commands_v2,
    {"train": 6, "valid": 6, "test": 6},
  ),
  "task": (write_task, {"train": 4, "valid": 2, "test": 2}),
  "vggsound": (write_vggsound, {"train": 5, "test": 5}),
}

# The data sets that a table lists, and with which clips can be missing.
LISTED = set(FAKES) - {"csv", "folder", "manifest", "task"}
