"""Supervised fine-tuning, with the published values where there are any.

  python -m audiomosaic_jax.main --config=configs/finetune.py:dataset=esc50 \
    --workdir=runs/esc50 --config.init.run=runs/pretrain \
    --config.data.source.data_dir=ESC50_DIR

Data sets: as20k as2m esc50 spc1 spc2 envsdd_ata envsdd_tta
           fsd50k vggsound (not in the paper)
           folder    your own: DIR/CLASS/*.wav, which is cut into splits;
                     DIR/{train,test}/CLASS/*.wav and maybe valid; or DIR with
                     a labels.csv (path, label and maybe split and group)
           task      the packaged notes, or DIR with such a labels.csv
           manifest  DIR/{train,eval}.json in the published code's format, and
                     data.source.label_csv
Switches:  parity=released  the published code's choices where they differ
           head=aasist      instead of a linear classifier
           variant=base     insist on a size; else it is that of the run
           batch_size=64    the learning rate follows

What is None is taken from the pretraining run of `init.run` or, without one,
from `fallback`; the job prints it.
"""

import ml_collections
from ml_collections import config_dict

from configs import common, supervised

ConfigDict = ml_collections.ConfigDict

DATASETS = (
  *("as20k", "as2m", "esc50", "spc1", "spc2"),
  *("envsdd_ata", "envsdd_tta", "fsd50k", "vggsound"),
  *("folder", "task", "manifest"),
)

# (num_frames, mean, std) of the log-mel filter bank, as published.
ESC50 = {"num_frames": 512, "mean": -6.6268077, "std": 5.358466}
SPEECH = {"num_frames": 128, "mean": -6.845978, "std": 5.5654526}


def get_config(argument: str = "") -> ConfigDict:
  """Returns the experiment; `argument` is the text after the colon."""
  args = common.parse_arguments(
    argument,
    dataset="task",
    variant="",
    batch_size=0,
    parity="paper",
    head="linear",
  )
  common.choose("dataset", args.dataset, DATASETS)
  common.choose("parity", args.parity, supervised.PARITIES)
  common.choose("head", args.head, supervised.HEADS)
  config = supervised.base(args.variant)
  DATASET_SETTINGS[args.dataset](config)
  if args.batch_size:
    config.schedule.base_lr *= args.batch_size / config.batch_size
    config.batch_size = args.batch_size
  supervised.set_head(config, args.head)
  if args.parity == "released":
    supervised.released(config)
  return config


def as20k(config: ConfigDict) -> None:
  """AudioSet-20K, 60 epochs: mAP on the evaluation clips."""
  config.name = "AudioSet-20K"
  config.data.source = ConfigDict(
    {
      "name": "audioset",
      "data_dir": "",
      "audio_dir": config_dict.placeholder(str),
      "max_missing_fraction": 0.3,
    }
  )
  config.data.splits.update(train="balanced", test=("eval",))
  config.optimizer.layer_decay = 0.65
  config.schedule.base_lr = 5e-4 * 64 / 256
  config.evaluation.metrics = ("map", "mauc", "d_prime")
  # 527 rankings of 20,000 clips for every draw.
  config.evaluation.num_resamples = 100
  config.published = (
    *("AudioMosaic: 42.5", "SSLAM: 40.9", "EAT: 40.2", "A-JEPA: 38.4"),
    *("BEATs iter3: 38.3", "Audio-MAE: 37.0"),
  )


def as2m(config: ConfigDict) -> None:
  """AudioSet-2M: 100 epochs of 200,000 clips drawn by class."""
  as20k(config)
  config.name = "AudioSet-2M"
  config.data.splits.train = "full"
  config.data.sampling.update(balanced=True, epoch_clips=200_000)
  config.batch_size = 256
  config.duration.update(total=100.0, warmup=10.0)
  config.optimizer.layer_decay = 0.75
  config.schedule.base_lr = 2e-4
  config.published = (
    *("AudioMosaic: 50.2", "SSLAM: 50.2", "EAT: 48.6", "A-JEPA: 48.6"),
    *("BEATs iter3: 48.0", "Audio-MAE: 47.3"),
  )


def esc50(config: ConfigDict) -> None:
  """ESC-50, five folds of 60 epochs."""
  config.name = "ESC-50"
  config.folds = 5
  config.data.source = ConfigDict(
    {"name": "esc50", "data_dir": "", "max_missing_fraction": 0.0}
  )
  config.data.splits.update(train="not_fold{fold}", test=("fold{fold}",))
  config.data.pipeline.clip_samples = 80_000
  config.spectrogram = ConfigDict(ESC50)
  config.mixup.p = 0.0
  config.augment_fbank.frequency_mask.max_width = 24
  config.augment_fbank.time_mask.max_width = 96
  config.loss.name = "softmax"
  config.batch_size = 16
  config.duration.warmup = 5.0
  config.schedule.base_lr = 5e-4 * 16 / 256
  config.published = (
    *("AudioMosaic: 97.5", "A-JEPA: 96.3", "SSLAM: 96.2", "EAT: 95.9"),
    *("BEATs iter3: 95.6", "Audio-MAE: 94.1"),
  )


def speech_commands(config: ConfigDict, version: int, epochs: float) -> None:
  """Speech Commands: one second, with noise and shifts, selected by valid."""
  config.name = f"Speech Commands {version}"
  config.data.source = ConfigDict(
    {
      "name": f"speech_commands_v{version}",
      "data_dir": "",
      "max_missing_fraction": 0.0,
    }
  )
  config.data.splits.valid = "valid"
  config.data.pipeline.clip_samples = 16_000
  config.spectrogram = ConfigDict(SPEECH)
  config.augment_waveform.order = ()
  config.augment_fbank.time_mask.max_width = 48
  config.augment_input.order = ("uniform_noise", "roll_frames")
  config.duration.update(total=epochs, warmup=5.0)
  config.schedule.base_lr = 1e-3 * 64 / 256
  config.evaluation.selection = "valid"


def spc1(config: ConfigDict) -> None:
  """Speech Commands 1: ten commands and _unknown_, 100 epochs."""
  speech_commands(config, version=1, epochs=100.0)
  config.data.source.test_dir = config_dict.placeholder(str)
  config.data.source.silence = False
  config.published = (
    *("AudioMosaic: 99.0", "SSLAM: 98.8", "A-JEPA: 97.7"),
    *("BEATs iter3: 97.7", "Audio-MAE: 96.9"),
  )


def spc2(config: ConfigDict) -> None:
  """Speech Commands 2: 35 words, 200 epochs."""
  speech_commands(config, version=2, epochs=200.0)
  config.published = (
    *("A-JEPA: 98.5", "AudioMosaic: 98.4", "EAT: 98.3"),
    *("BEATs iter3: 98.3", "Audio-MAE: 98.3", "SSLAM: 98.1"),
  )


def envsdd(config: ConfigDict, track: str) -> None:
  """EnvSDD: real or generated, 20 epochs, tested with four degrees of new."""
  config.name = f"EnvSDD {track.upper()}"
  config.data.source = ConfigDict(
    {
      "name": "envsdd",
      "track": track,
      "data_dir": "",
      "manifest_dir": config_dict.placeholder(str),
      "max_missing_fraction": 0.0,
    }
  )
  tests = ("test01", "test02", "test03", "test04")
  config.data.splits.update(valid="valid", test=tests)
  # 4.04 s of a 10.24 s spectrogram; the rest is padding.
  config.data.pipeline.clip_samples = 64_600
  config.augment_waveform.order = ()
  config.mixup.p = 0.0
  config.masking.mode = "none"
  config.loss.update(name="softmax", class_weights=(0.1, 0.9))
  config.batch_size = 128
  config.duration.update(total=20.0, warmup=1.0)
  config.schedule.base_lr = 1e-3 * 128 / 256
  config.evaluation.update(
    metrics=("eer", "balanced_accuracy"), selection="valid"
  )


def envsdd_ata(config: ConfigDict) -> None:
  """EnvSDD, audio to audio."""
  envsdd(config, "ata")
  config.published = tuple(
    f"AudioMosaic, test0{i}: {eer}"
    for i, eer in enumerate(("0", "0", "0.30", "0.30"), 1)
  )


def envsdd_tta(config: ConfigDict) -> None:
  """EnvSDD, text to audio."""
  envsdd(config, "tta")
  config.published = tuple(
    f"AudioMosaic, test0{i}: {eer}"
    for i, eer in enumerate(("0", "0.06", "0.37", "4.50"), 1)
  )


def fsd50k(config: ConfigDict) -> None:
  """FSD50K, 200 classes; not in the paper: AudioSet-20K's settings."""
  as20k(config)
  config.name = "FSD50K"
  config.data.source = ConfigDict(
    {"name": "fsd50k", "data_dir": "", "max_missing_fraction": 0.0}
  )
  config.data.splits.update(train="train", valid="val", test=("eval",))
  config.data.pipeline.crop = "random"
  # Clips last up to 30 seconds.
  config.evaluation.update(selection="valid", max_windows=3)
  config.published = ()


def vggsound(config: ConfigDict) -> None:
  """VGGSound, 309 classes; not in the paper: AudioSet-20K's settings."""
  as20k(config)
  config.name = "VGGSound"
  # It lies like AudioSet: lists, and clips by the id of their video.
  config.data.source.name = "vggsound"
  config.data.splits.update(train="train", test=("test",))
  config.loss.name = "softmax"
  config.evaluation.metrics = ("accuracy", "balanced_accuracy")
  config.published = ()


def task(config: ConfigDict) -> None:
  """A folder with a labels.csv, or "demo": as long as the run's clips."""
  config.name = "task"
  config.data.source = ConfigDict(
    {"name": "task", "data_dir": "demo", "group_pattern": ""}
  )
  # A tenth of the training clips where folds leave that split out, a fifth of
  # all to test on where there are no splits.
  config.data.splits.update(
    valid="valid", valid_fraction=0.1, test_fraction=0.2
  )
  supervised.own_clips(config)


def folder(config: ConfigDict) -> None:
  """Anybody's folder of clips, see data.own_clips: small, and of any length."""
  config.name = "folder"
  config.data.source = ConfigDict(
    {
      "name": "folder",
      "data_dir": "",
      "class_names": config_dict.placeholder(tuple),
      # "(.*)_[0-9]+" makes clips called NAME_NUMBER one group, which is in one
      # split; "" makes every clip its own, if the folder does not tell.
      "group_pattern": "",
    }
  )
  # Of what is not cut already. A temperature and the choice of an epoch want
  # more clips than a tenth of a small folder.
  config.data.splits.update(
    valid="valid", valid_fraction=0.2, test_fraction=0.2
  )
  supervised.own_clips(config)
  # Classes count alike in the metric that selects, so they do in the loss.
  config.loss.balance = "inverse"
  config.evaluation.update(patience=15, max_windows=8)


def manifest(config: ConfigDict) -> None:
  """Lists of clips in the published code's format, of several labels each."""
  config.name = "manifest"
  config.data.source = ConfigDict(
    {
      "name": "manifest",
      "data_dir": "",
      "label_csv": "",
      "root": config_dict.placeholder(str),
    }
  )
  config.data.splits.update(train="train", test=("eval",), valid_fraction=0.1)
  supervised.own_clips(config)
  config.loss.name = "sigmoid"
  config.evaluation.metrics = ("map", "mauc")


DATASET_SETTINGS = {
  "as20k": as20k,
  "as2m": as2m,
  "esc50": esc50,
  "spc1": spc1,
  "spc2": spc2,
  "envsdd_ata": envsdd_ata,
  "envsdd_tta": envsdd_tta,
  "fsd50k": fsd50k,
  "vggsound": vggsound,
  "folder": folder,
  "task": task,
  "manifest": manifest,
}
