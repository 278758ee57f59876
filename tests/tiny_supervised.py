"""Supervised jobs of a second, for the tests of everything around them."""

import functools

import numpy as np
import soundfile

from audiomosaic_jax import classifier_setup, encoder_source, finetune
from configs import finetune as configs
from configs import linear_eval
from configs import pretrain as pretraining_configs

RATE_HZ = 16_000


def write_task(folder, counts, *, seconds=0.2, spread=0.15, seed=0):
  """Tones of two pitches in noise; returns the folder of the task.

  counts: split -> clips. `spread` makes the pitches of the classes overlap.
  """
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True, exist_ok=True)
  rows = ["path,label,split,group\n"]
  time_s = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
  for split, count in counts.items():
    for i in range(count):
      label = i % 2
      hz = (600, 1_500)[label] * np.exp(spread * rng.normal())
      clip = 0.2 * np.sin(2 * np.pi * hz * time_s + rng.uniform(0, 6))
      clip += 0.02 * rng.normal(size=len(clip))
      name = f"{split}_{i:04d}.wav"
      soundfile.write(folder / name, clip, RATE_HZ)
      rows.append(f"{name},{('low', 'high')[label]},{split},{split}{i // 4}\n")
  (folder / "labels.csv").write_text("".join(rows))
  return folder


def shrink(config, **overrides):
  """Makes a config tiny: a grid of 2 x 2 patches, two narrow blocks."""
  encoder = {"width": 32, "depth": 2, "num_heads": 2}
  config.fallback.model.encoder.update(encoder)
  config.fallback.fbank.num_mel_bins = 32
  config.fallback.spectrogram.num_frames = 32
  config.spectrogram.num_frames = 32
  config.data.pipeline.clip_samples = 3_200
  config.data.pipeline.update(num_threads=1, prefetch_size=2)
  config.model.encoder.update(dtype="float32", remat="none")
  for name in ("frequency_mask", "time_mask"):
    config.augment_fbank[name].max_width = 8
  config.batch_size = 8
  config.duration.update(unit="steps", total=4.0, warmup=1.0)
  config.evaluation.update(batch_size=8, num_resamples=20)
  config.checkpoint.save_every = 2
  config.log_every = 2
  config.baselines = ()
  for name, value in overrides.items():
    config.update_from_flattened_dict({name: value})
  return config


def fine_tuning(task=None, *, argument="dataset=task", **overrides):
  config = shrink(configs.get_config(argument), **overrides)
  if task is not None:
    config.data.source.data_dir = str(task)
  return config


def probing(task=None, *, argument="dataset=task", **overrides):
  config = shrink(linear_eval.get_config(argument), **overrides)
  if task is not None:
    config.data.source.data_dir = str(task)
  return config


def pretraining():
  """Returns a run of one step whose encoder fits `shrink`."""
  config = pretraining_configs.get_config("smoke,time_ratio=0.5")
  config.model.encoder.update(width=32, depth=2, num_heads=2)
  config.fbank.num_mel_bins = 32
  config.spectrogram.num_frames = 32
  config.data.pipeline.clip_samples = 5_360
  config.duration.update(total=1.0, warmup=0.0)
  config.batch_size = 8
  config.probe.task, config.report = "", False
  return config


def job(config, workdir, *, seed=0, fold=0):
  """Returns the job of one run, as `finetune.run` would make it."""
  run = encoder_source.find_run(config.init.run)
  encoder_source.complete(config, run)
  finetune.check(config)
  splits = classifier_setup.load_splits(config, workdir, fold)
  build = functools.partial(classifier_setup.build_job, config, run, splits)
  folder = workdir / "run"
  return build(seed, folder, workdir / "features")
