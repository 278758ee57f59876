"""A pretraining job of seconds, for tests of its step and of its loop."""

from configs import pretrain as configs

STEPS = 6


def tiny_config(arguments="smoke", **overrides):
  """A job of a second: two narrow blocks, cheap augmentation, six steps."""
  config = configs.get_config(arguments)
  # The first block drops nothing; the second half of its branches.
  config.model.encoder.update(width=32, depth=2, drop_path=0.5)
  config.model.projector.update(hidden_features=32, out_features=16)
  config.augment_waveform.order = (
    "roll_and_scale",
    "gaussian_snr",
    "high_pass",
  )
  config.duration.total = float(STEPS)
  config.probe.task = ""
  config.runtime.peak_flops_per_device = 1e12
  for name, value in overrides.items():
    config.update_from_flattened_dict({name: value})
  return config
