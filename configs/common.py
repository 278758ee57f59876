"""Blocks that several experiments share, and the parser of their arguments.

A block is exactly the keyword arguments of one callable of the package, named
in its docstring; there are no defaults anywhere else.
"""

import ml_collections
from ml_collections import config_dict

ConfigDict = ml_collections.ConfigDict

# (num_frames, mean, std) of the log-mel filter bank, as published.
AUDIOSET = {"num_frames": 1024, "mean": -4.2677393, "std": 4.5689974}

VIT_SIZES = {
  "micro": {"width": 128, "depth": 1, "num_heads": 4},
  "tiny": {"width": 192, "depth": 12, "num_heads": 3},
  "small": {"width": 384, "depth": 12, "num_heads": 6},
  "base": {"width": 768, "depth": 12, "num_heads": 12},
  "large": {"width": 1024, "depth": 24, "num_heads": 16},
  "huge": {"width": 1280, "depth": 32, "num_heads": 16},
}

# The order of the published code; `augment_level` n takes the first n of it
# after the roll, which is how the paper's ablation counts them.
AUGMENTATION_ORDER = (
  "polarity_inversion",
  "time_stretch",
  "gaussian_snr",
  "gain",
  "high_pass",
  "band_stop",
  "pitch_shift",
)


def parse_arguments(argument: str, **defaults) -> ConfigDict:
  """Parses `file.py:preset,key=value,...`.

  Args:
    argument: text after the colon of --config; may be empty.
    **defaults: the accepted keys and their values. A word without an equals
      sign is the `preset`, or sets the key of that name if its default is
      False. A value is cast to its default's type.

  Returns:
    The values, and `given`, the keys that are in the argument.

  Raises:
    ValueError: an unknown key, one that is given twice, or a value of the
      wrong type.
  """
  values, given = dict(defaults), {}
  for item in filter(None, (argument or "").split(",")):
    key, _, text = item.partition("=") if "=" in item else ("preset", "", item)
    if "=" not in item and defaults.get(item) is False:
      key, text = item, "True"
    if key in given:
      raise ValueError(
        f"{key} is given twice in {argument!r}: {given[key]} and {item}; "
        "leave one out"
      )
    given[key] = item
    if defaults.get(key) is False and "=" in item:
      raise ValueError(f"argument {item!r}: {key} is a word without a value")
    if key not in defaults:
      raise ValueError(
        f"unknown argument {key!r} in {argument!r}; choose from "
        f"{', '.join(sorted(defaults))}"
      )
    kind = type(defaults[key])
    try:
      values[key] = kind(text)
    except ValueError:
      raise ValueError(
        f"argument {key}={text!r} is not a {kind.__name__}"
      ) from None
  return ConfigDict(values | {"given": tuple(given)})


def choose(name: str, value: str, options) -> str:
  """Returns `value`, or says what else `name` can be."""
  if value not in options:
    raise ValueError(f"{name}={value!r}; choose one of {', '.join(options)}")
  return value


def fbank() -> ConfigDict:
  """Arguments of `features.log_mel_fbank`: Kaldi's, as published."""
  return ConfigDict(
    {
      "sample_rate_hz": 16_000,
      "frame_length_ms": 25.0,
      "frame_shift_ms": 10.0,
      "num_mel_bins": 128,
      "low_freq_hz": 20.0,
      "high_freq_hz": 8_000.0,
      "preemphasis": 0.97,
    }
  )


def augment_waveform(level: int) -> ConfigDict:
  """Arguments of `augment_waveform.augment_waveform`; 7 is as published.

  Args:
    level: how many of `AUGMENTATION_ORDER` to apply after the roll (0 to 7).
  """
  if not 0 <= level <= len(AUGMENTATION_ORDER):
    raise ValueError(
      f"augment_level={level}; choose 0 to {len(AUGMENTATION_ORDER)}"
    )
  return ConfigDict(
    {
      "order": ("roll_and_scale", *AUGMENTATION_ORDER[:level]),
      "roll_and_scale": {"alpha": 10.0, "beta": 10.0, "offset": 0.5},
      "polarity_inversion": {"p": 0.5},
      "time_stretch": {"p": 0.7, "min_rate": 0.7, "max_rate": 1.3},
      "gaussian_snr": {"p": 0.5, "min_snr_db": 5.0, "max_snr_db": 40.0},
      "gain": {"p": 0.3, "min_gain_db": -12.0, "max_gain_db": 12.0},
      "high_pass": {
        "p": 0.3,
        "min_cutoff_freq": 20.0,
        "max_cutoff_freq": 2400.0,
        "min_rolloff": 12,
        "max_rolloff": 24,
      },
      "band_stop": {
        "p": 0.5,
        "min_center_freq": 200.0,
        "max_center_freq": 4000.0,
        "min_bandwidth_fraction": 0.5,
        "max_bandwidth_fraction": 1.99,
        "min_rolloff": 12,
        "max_rolloff": 24,
      },
      "pitch_shift": {"p": 0.6, "min_semitones": -4.0, "max_semitones": 4.0},
    }
  )


def augment_fbank() -> ConfigDict:
  """Arguments of `augment_fbank.augment_fbank`; the published recipe has none.

  `order` names what is applied to log-mel energies, after `augment_waveform`.
  """
  return ConfigDict(
    {
      "order": (),
      "pitch_and_tempo": {
        "p": 0.9,
        "min_semitones": -10.0,
        "max_semitones": 10.0,
        "min_rate": 0.7,
        "max_rate": 1.4,
      },
    }
  )


def vit(size: str) -> ConfigDict:
  """Arguments of `models.vit.ViT`, except the patch grid.

  Args:
    size: one of `VIT_SIZES`.
  """
  return ConfigDict(
    {
      "patch_size": 16,
      **VIT_SIZES[choose("variant", size, VIT_SIZES)],
      "mlp_ratio": 4.0,
      "drop_path": 0.1,
      "norm": "layernorm",
      "activation": "gelu",
      "qk_norm": False,
      "qkv_bias": True,
      "proj_bias": True,
      "pos_embed": "learnable",
      "pos_layout": "paper",
      "class_token": True,
      "final_norm": False,
      "attention": "auto",
      "remat": "products",
      "scan_unroll": 0,
      "dtype": "bfloat16",
    }
  )


def adamw() -> ConfigDict:
  """Arguments of `optimizer.make_optimizer`, except the schedule."""
  return ConfigDict(
    {
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "weight_decay": 0.05,
      "layer_decay": 1.0,
      # The last bias of the projector is a constant of the method.
      "frozen": (r"projector/norm_1/bias",),
      "grad_clip_norm": config_dict.placeholder(float),
    }
  )


def probe(task: str, eval_every: int) -> ConfigDict:
  """What labelled clips say about an encoder; see `encoder_probe.py`.

  Args:
    task: "demo" for the packaged notes, a folder with a labels.csv, or "" for
      no probe.
    eval_every: steps between the cheap probes of the training loop.
  """
  return ConfigDict(
    {
      "task": task,
      "eval_every": eval_every,
      "batch_size": 64,
      # Longer clips are embedded window by window and averaged.
      "max_windows": 3,
      # Settings of the final table, chosen on the validation split.
      "knn_neighbours": (1, 3, 5, 10, 20),
      "linear_c": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
      # Settings of the cheap probes; the table shows every readout.
      "readout": "mean",
      "online_k": 5,
      "online_temperature": 0.1,
      "online_l2": 1.0,
    }
  )


def runtime() -> ConfigDict:
  """How a job runs; nothing here changes what it computes."""
  return ConfigDict(
    {
      # Folder of compiled programs; "workdir" is one inside it, "" is none.
      "compilation_cache": "workdir",
      # Do not return freed memory to the system: faster steps on a CPU.
      "keep_freed_memory": False,
      # For MFU; 0 looks the device up, or times a product on a CPU.
      "peak_flops_per_device": 0.0,
    }
  )
