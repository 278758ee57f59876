"""What tensors cannot tell of a published checkpoint, and who tells it.

In this order: what a person chose; config.json of a published folder, which
holds arguments of the published classes; the values of the published models.
Every value comes with a line that says which of them it was.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from audiomosaic_jax.data import host_fbank

# Equal to those in configs/, which are not installed with the package.
FBANK = {"sample_rate_hz": 16_000, **host_fbank.FBANK}
STATISTICS = {
  "audioset": {"num_frames": 1024, "mean": -4.2677393, "std": 4.5689974},
  "esc50": {"num_frames": 512, "mean": -6.6268077, "std": 5.358466},
  "speech_commands": {"num_frames": 128, "mean": -6.845978, "std": 5.5654526},
}
# Frames -> samples of the clips that the published models were trained on.
CLIP_SAMPLES = {1024: 160_000, 512: 80_000, 128: 16_000}
NORMALIZATIONS = {
  "training": (
    "Inputs are (fbank - mean) / (2 std), as the published code trains. The "
    "preprocess() of the published Hugging Face folders divides by std alone: "
    "with it an encoder hears inputs twice as large as in training."
  ),
  "huggingface": (
    "Inputs are (fbank - mean) / s, with the s of the preprocess() of the "
    "published Hugging Face folders. This project divides by 2 std, so half of "
    "s is stored as std."
  ),
}

CHOSEN, TOLD = "chosen", "config.json"
# Names in the published classes -> names here.
POOLINGS = {"avg": "mean", "cls": "cls", "fusion": "fusion"}
# Values of arguments that config.json leaves to the published classes.
CLASS_DEFAULTS = {
  "AudioMosaicPretrain": {"pooling": "cls"},
  "AudioMosaicClassifier": {"pooling": "cls"},
  "AudioMosaicAASIST": {"pooling": "cls"},
  "AudioMosaicWeightedSumProbe": {"pooling": "avg"},
  "AudioMosaicLayerProbe": {"pooling": "avg", "probe_layer": 11},
  "AudioMosaicAttentiveProbe": {"pooling": "avg"},
}
ALL_CLASSES = {"num_heads": 12, "act_type": "gelu"}
# Fields of config.json, and of its block audio_preprocessing, that are read.
TYPES = {
  "model_class": str,
  "num_heads": int,
  "act_type": str,
  "pooling": str,
  "probe_layer": int,
}
AUDIO_TYPES = {
  "sample_rate": int,
  "frame_shift": float,
  "num_mel_bins": int,
  "norm_mean": float,
  "norm_std": float,
}


@dataclasses.dataclass(frozen=True)
class Choices:
  """What a person can say about a checkpoint; None leaves it to the rest.

  Attributes:
    head: a name in torch_heads.HEADS. "none" leaves out what follows the
      pooled tokens; "layer" tells the probe of one block from a linear
      classifier, whose tensors have the same names and shapes.
    layer: block that such a probe reads, from 0.
    pooling: a name in models.readout.POOLINGS.
    num_heads: of the attention.
    activation: a name in models.layers.ACTIVATIONS.
    num_mel_bins: of the spectrogram.
    statistics: (mean, std) of the filter bank.
    class_names: of a classifier, in the order of its logits.
    layout: of the table that positions started from, "released" or "paper".
    normalization: a name in NORMALIZATIONS.
  """

  head: str | None = None
  layer: int | None = None
  pooling: str | None = None
  num_heads: int | None = None
  activation: str | None = None
  num_mel_bins: int | None = None
  statistics: tuple[float, float] | None = None
  class_names: tuple[str, ...] = ()
  layout: str = "released"
  normalization: str = "training"


NO_CHOICES = Choices()


@dataclasses.dataclass(frozen=True)
class Told:
  """What config.json says, in the words of this project; None is nothing."""

  is_layer_probe: bool = False
  layer: int | None = None
  pooling: str | None = None
  num_heads: int | None = None
  activation: str | None = None
  num_mel_bins: int | None = None
  statistics: tuple[float, float] | None = None
  sample_rate_hz: int | None = None
  frame_shift_ms: float | None = None


def parse_statistics(text: str) -> tuple[float, float]:
  """Returns (mean, std) of a name in STATISTICS or of "MEAN,STD".

  Raises:
    ValueError: it is neither.
  """
  if text in STATISTICS:
    return STATISTICS[text]["mean"], STATISTICS[text]["std"]
  try:
    mean, std = map(float, text.split(","))
  except ValueError:
    raise ValueError(
      f"stats={text!r}; give one of {tuple(STATISTICS)}, or MEAN,STD"
    ) from None
  _check_statistics(mean, std, f"stats={text!r}")
  return mean, std


def read_settings(settings: Mapping[str, Any]) -> Told:
  """Returns what config.json of a published folder tells.

  Args:
    settings: its content; empty without one.

  Raises:
    ValueError: a field has another type or value than the published classes
      take, or the folder is of this project.
  """
  if settings.get("model_type") == "audiomosaic-jax":
    raise ValueError(
      "config.json says model_type 'audiomosaic-jax': this is an encoder of "
      "this project, not a published one; read it with "
      "audiomosaic_jax.adapters.huggingface.from_pretrained"
    )
  name = settings.get("model_class")
  defaults = {}
  if name is not None:
    defaults = ALL_CLASSES | CLASS_DEFAULTS.get(str(name), {})
  fields = _typed({**defaults, **settings}, TYPES, "config.json")
  audio = settings.get("audio_preprocessing", {})
  if not isinstance(audio, Mapping):
    raise ValueError(f"config.json: audio_preprocessing is {audio!r}, no block")
  audio = _typed(audio, AUDIO_TYPES, "config.json: audio_preprocessing")
  statistics = None
  if audio["norm_mean"] is not None and audio["norm_std"] is not None:
    statistics = (float(audio["norm_mean"]), float(audio["norm_std"]))
    _check_statistics(*statistics, f"config.json: statistics {statistics}")
  shift, pooling = audio["frame_shift"], fields["pooling"]
  if pooling is not None and pooling not in POOLINGS:
    raise ValueError(
      f"config.json: pooling {pooling!r} is not one of {tuple(POOLINGS)}"
    )
  return Told(
    is_layer_probe=name == "AudioMosaicLayerProbe",
    layer=fields["probe_layer"],
    pooling=None if pooling is None else POOLINGS[pooling],
    num_heads=fields["num_heads"],
    activation=fields["act_type"],
    num_mel_bins=audio["num_mel_bins"],
    statistics=statistics,
    sample_rate_hz=audio["sample_rate"],
    frame_shift_ms=shift if shift is None else float(shift),
  )


def pick(notes: list[str], field: str, *candidates: tuple[Any, str]) -> Any:
  """Returns the first value that is not None, and adds a line to `notes`.

  Args:
    notes: lines for the person who watches.
    field: what the value is of.
    *candidates: values and where each comes from; the last is never None.
  """
  value, origin = next(c for c in candidates if c[0] is not None)
  notes.append(f"{field} = {value!r}: {origin}")
  return value


def front_end(
  num_tokens: int,
  patch_size: int,
  told: Told,
  choices: Choices,
  notes: list[str],
) -> dict[str, Any]:
  """Returns the sections of a config up to the input of the encoder.

  Args:
    num_tokens: positions of patches.
    patch_size: side of a patch, in frames and in bands.
    told: by config.json.
    choices: of a person.
    notes: gets a line for each value that the tensors do not tell.

  Raises:
    ValueError: the positions are no grid, or of no published length and
      nobody says how their inputs are normalised.
  """
  fbank = dict(FBANK)
  fbank["num_mel_bins"] = bins = pick(
    notes,
    "fbank.num_mel_bins",
    (choices.num_mel_bins, CHOSEN),
    (told.num_mel_bins, TOLD),
    (FBANK["num_mel_bins"], "as published"),
  )
  for field in ("sample_rate_hz", "frame_shift_ms"):
    if getattr(told, field) is not None:
      fbank[field] = pick(notes, f"fbank.{field}", (getattr(told, field), TOLD))
  if bins < 1 or bins % patch_size or num_tokens % (bins // patch_size):
    raise ValueError(
      f"{num_tokens} positions of {patch_size} x {patch_size} patches are no "
      f"grid over {bins} mel bands; give the num_mel_bins of the encoder"
    )
  num_frames = num_tokens // (bins // patch_size) * patch_size
  mean, std = _statistics(num_frames, told, choices, notes)
  if choices.normalization == "huggingface":
    std /= 2
  return {
    "fbank": fbank,
    "spectrogram": {"num_frames": num_frames, "mean": mean, "std": std},
    "data": {
      "pipeline": {
        "clip_samples": clip_samples(fbank, num_frames),
        "pad": "pad",
      }
    },
    "normalization": NORMALIZATIONS[choices.normalization],
  }


def clip_samples(fbank: Mapping[str, Any], num_frames: int) -> int:
  """Returns the published length of a clip, or else what fills the frames."""
  same_time = all(
    fbank[name] == FBANK[name] for name in ("sample_rate_hz", "frame_shift_ms")
  )
  if same_time and num_frames in CLIP_SAMPLES:
    return CLIP_SAMPLES[num_frames]
  length, shift = (
    int(fbank["sample_rate_hz"] * fbank[name] * 1e-3)
    for name in ("frame_length_ms", "frame_shift_ms")
  )
  return length + (num_frames - 1) * shift


def _statistics(
  num_frames: int, told: Told, choices: Choices, notes: list[str]
) -> tuple[float, float]:
  published = {
    s["num_frames"]: ((s["mean"], s["std"]), f"as published for {name}")
    for name, s in STATISTICS.items()
  }
  rule = published.get(num_frames, (None, ""))
  candidates = ((choices.statistics, CHOSEN), (told.statistics, TOLD), rule)
  if all(value is None for value, _ in candidates):
    raise ValueError(
      f"spectrograms of {num_frames} frames belong to no published task, whose "
      f"lengths are {sorted(published)}; give stats, a name of "
      f"{tuple(STATISTICS)} or MEAN,STD"
    )
  return pick(notes, "spectrogram (mean, std)", *candidates)


def _typed(
  fields: Mapping[str, Any], types: Mapping[str, type], where: str
) -> dict[str, Any]:
  """Returns the named fields, None where there is none, or refuses a type."""
  found = {}
  for name, kind in types.items():
    value = fields.get(name)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if value is not None and (not fits or isinstance(value, bool)):
      raise ValueError(f"{where}: {name} is {value!r}, no {kind.__name__}")
    found[name] = value
  return found


def _check_statistics(mean: float, std: float, what: str) -> None:
  if not (math.isfinite(mean) and 0 < std < math.inf):
    raise ValueError(f"{what}; std must be positive, and both finite")
