"""How long the published experiments take, from their FLOPs.

  python -m benchmarks.expected_hours --peak_tflops=989 --mfu=0.4

Nothing is run: the hours are the floating-point operations of the encoder over
what a device does at the given share of its peak, one device alone. They leave
out decoding, which the host does meanwhile if it keeps up. Peaks of devices
are in audiomosaic_jax/throughput.py.
"""

from typing import NamedTuple

import ml_collections
from absl import app, flags

from audiomosaic_jax import (
  encoder_source,
  experiment,
  results,
  tables,
)
from configs import finetune, linear_eval, pretrain

PEAK = flags.DEFINE_float("peak_tflops", 989.0, "Of the device; H100: 989.")
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak that is reached.")


class Experiment(NamedTuple):
  """A row of the paper.

  Attributes:
    name: of the experiment.
    config: file and argument.
    clips: per epoch.
    selected: validation clips, after every epoch.
    tested: test clips, at the end.
  """

  name: str
  config: str
  clips: int
  selected: int
  tested: int


AUDIOSET = 20_383
# Official sizes; copies of AudioSet lack some. Those of EnvSDD are counted in
# its manifests; here they are round numbers.
EXPERIMENTS = (
  Experiment("AudioSet-2M, pretraining", "pretrain.py", 2_042_985, 0, 0),
  Experiment(
    "AudioSet-20K, fine-tuned", "finetune.py:dataset=as20k", 22_176, 0, AUDIOSET
  ),
  Experiment(
    "AudioSet-2M, fine-tuned", "finetune.py:dataset=as2m", 200_000, 0, AUDIOSET
  ),
  Experiment("ESC-50, fine-tuned", "finetune.py:dataset=esc50", 1_600, 0, 400),
  Experiment(
    "Speech Commands 2, fine-tuned",
    "finetune.py:dataset=spc2",
    84_843,
    9_981,
    11_005,
  ),
  Experiment(
    "Speech Commands 1, fine-tuned",
    "finetune.py:dataset=spc1",
    51_088,
    6_798,
    3_081,
  ),
  Experiment(
    "AudioSet-20K, linear",
    "linear_eval.py:dataset=as20k,augment=published",
    22_176,
    0,
    AUDIOSET,
  ),
  Experiment(
    "AudioSet-20K, layer 10",
    "linear_eval.py:dataset=as20k,probe=layer,augment=published",
    22_176,
    0,
    AUDIOSET,
  ),
  Experiment(
    "AudioSet-20K, attentive",
    "linear_eval.py:dataset=as20k,probe=attentive,augment=published",
    22_176,
    0,
    AUDIOSET,
  ),
  Experiment(
    "AudioSet-2M, linear",
    "linear_eval.py:dataset=as2m,augment=published",
    200_000,
    0,
    AUDIOSET,
  ),
  Experiment(
    "ESC-50, linear",
    "linear_eval.py:dataset=esc50,augment=published",
    1_600,
    0,
    400,
  ),
  Experiment(
    "EnvSDD ATA, 100,000 clips",
    "finetune.py:dataset=envsdd_ata",
    100_000,
    10_000,
    40_000,
  ),
  Experiment(
    "EnvSDD TTA, 100,000 clips",
    "finetune.py:dataset=envsdd_tta",
    100_000,
    10_000,
    40_000,
  ),
)
FILES = {
  "pretrain.py": pretrain.get_config,
  "finetune.py": finetune.get_config,
  "linear_eval.py": linear_eval.get_config,
}


def supervised_flops(
  config: ml_collections.ConfigDict, row: Experiment
) -> float:
  """Returns FLOPs of all folds and layers of one seed, with evaluations."""
  encoder_source.complete(config, None)
  mask = config.masking if config.masking.mode != "none" else {}
  trained = experiment.encoder_flops(
    config, experiment.num_tokens(config, **mask)
  )
  tested = experiment.encoder_flops(config, experiment.num_tokens(config))
  # Forward, and twice as much backward; nothing backward if frozen.
  passes = 1 if config.model.freeze_encoder else 3
  epochs = config.duration.total
  training = epochs * row.clips * passes * trained
  testing = (epochs * row.selected + row.tested) * tested
  runs = config.folds * len(results.layers(config))
  return runs * (training + testing)


def flops(row: Experiment) -> float:
  """Returns the FLOPs of an experiment."""
  file, _, argument = row.config.partition(":")
  config = FILES[file](argument)
  if file == "pretrain.py":
    per_pair = experiment.flops_per_pair(config)
    return config.duration.total * row.clips * per_pair
  return supervised_flops(config, row)


def hours(row: Experiment, *, peak_tflops: float, mfu: float) -> float:
  """Returns the expected hours of an experiment on one device."""
  return flops(row) / (peak_tflops * 1e12 * mfu) / 3600


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  rate = {"peak_tflops": PEAK.value, "mfu": MFU.value}
  caption = f"hours of one device at {MFU.value:.0%} of {PEAK.value:g} TFLOP/s"
  rows = [
    [row.name, f"{flops(row):.2e}", f"{hours(row, **rate):.3g}"]
    for row in EXPERIMENTS
  ]
  table = tables.Table(caption, ["experiment", "FLOPs", "hours"], rows)
  print(tables.table_text(table))


if __name__ == "__main__":
  app.run(main)
