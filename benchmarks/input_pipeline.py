"""Host time per training pair: this package against a host-side pipeline.

  python -m benchmarks.input_pipeline --clip_s=10 --pairs=24

A pair is two independently augmented filter banks of one clip. Here the host
only decodes, crops and stacks 16-bit samples; augmentation and filter bank run
on the device. The usual pipeline does everything on the host: decode, crop,
two rounds of audiomentations with the published settings, two numpy filter
banks. Both read the same seconds of the same files in the same run, turn by
turn, and are timed in CPU time of this process, so that other programs on the
machine disturb them little. Decoding is all that is left for the host here, so
the storage format decides the ratio: one row each for the files as they are,
and for copies as FLAC and as 16-bit WAV.

The device's own time per pair is printed too. It is not free: where the device
is this CPU, add it to ours; on an accelerator it competes with the model.
"""

import functools
import pathlib
import random
import tempfile
import time
from collections.abc import Callable

import audiomentations as am
import jax
import jax.numpy as jnp
import numpy as np
import soundfile as sf
from absl import app, flags

from audiomosaic_jax import augment_waveform, features
from benchmarks import report
from configs import common

PACKAGED = (
  pathlib.Path(features.__file__).parent / "data" / "demo_audio" / "pretrain"
)

RATE = 16_000
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def audio_files(folder: str, clip_s: float) -> list[tuple[str, int]]:
  """Returns (path, frames) of the 16 kHz files that hold one clip or more."""
  samples = int(clip_s * RATE)
  paths = sorted(
    p for p in pathlib.Path(folder).rglob("*") if p.suffix in SUFFIXES
  )
  infos = [(str(path), sf.info(path)) for path in paths]
  usable = [
    (path, info.frames)
    for path, info in infos
    if info.samplerate == RATE and info.frames >= samples
  ]
  if not usable:
    raise app.UsageError(
      f"none of the {len(paths)} audio files under {folder} is sampled at "
      f"{RATE} Hz and at least {clip_s:g} s long; pass another "
      "--audio_dir or a smaller --clip_s"
    )
  return usable


def copies(files: list[tuple[str, int]], folder: str, suffix: str):
  """Writes the files in another format and returns (path, frames)."""
  copied = []
  for i, (path, frames) in enumerate(files):
    target = f"{folder}/{i:05d}{suffix}"
    pcm = read(path, 0, frames, "int16")
    sf.write(target, pcm, RATE, subtype="PCM_16")
    copied.append((target, len(pcm)))
  return copied


def read(path: str, start: int, samples: int, dtype: str) -> np.ndarray:
  """Decodes one mono excerpt."""
  clip, _ = sf.read(path, samples, start, dtype=dtype, always_2d=True)
  return clip[:, 0]


def mel_bank() -> np.ndarray:
  """Returns the triangles of the published filter bank."""
  return features.mel_filter_bank(
    sample_rate_hz=RATE,
    fft_length=512,
    num_mel_bins=128,
    low_freq_hz=20.0,
    high_freq_hz=8_000.0,
  )


def numpy_fbank(waveform: np.ndarray, *, bank: np.ndarray) -> np.ndarray:
  """Kaldi's log-mel filter bank, vectorised over frames."""
  frames = np.lib.stride_tricks.sliding_window_view(waveform, 400)[::160]
  frames = frames - frames.mean(axis=1, keepdims=True)
  previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
  frames = (frames - np.float32(0.97) * previous) * np.hanning(400).astype("f4")
  power = np.abs(np.fft.rfft(frames, 512)[:, :256]) ** 2
  return np.log(np.maximum(power.astype("f4") @ bank, features.EPSILON))


def host_pipeline() -> am.Compose:
  """The published chain, with the same numbers as the configuration."""
  config = common.augment_waveform(len(common.AUGMENTATION_ORDER))
  names = {
    "polarity_inversion": am.PolarityInversion,
    "time_stretch": am.TimeStretch,
    "gaussian_snr": am.AddGaussianSNR,
    "gain": am.Gain,
    "high_pass": am.HighPassFilter,
    "band_stop": am.BandStopFilter,
    "pitch_shift": am.PitchShift,
  }
  return am.Compose(
    [
      names[name](**config[name])
      for name in config.order
      if name != "roll_and_scale"
    ]
  )


def on_the_host(
  chain: am.Compose, fbank: Callable, path: str, start: int, samples: int
) -> np.ndarray:
  """Makes one pair of filter banks [2, T, F] without a device.

  Args:
    chain: of `host_pipeline`.
    fbank: samples -> filter bank, such as `numpy_fbank` with its bank.
    path: of the file.
    start: first sample.
    samples: of the clip.
  """
  clip = read(path, start, samples, "float32")
  views = []
  for _ in range(2):
    view = np.roll(clip, np.random.randint(samples))
    view = view * np.float32(np.random.beta(10, 10) + 0.5)
    views.append(fbank(chain(view, RATE)))
  return np.stack(views)


@jax.jit
def on_the_device(key: jax.Array, pcm: jax.Array) -> jax.Array:
  """Makes a batch of pairs of filter banks from 16-bit samples."""
  config = common.augment_waveform(len(common.AUGMENTATION_ORDER))
  waveform = features.pcm_to_float(pcm)

  def view(key):
    changed = augment_waveform.augment_waveform(
      key, waveform, sample_rate_hz=RATE, **config
    )
    return features.log_mel_fbank(changed, **common.fbank())

  return jnp.stack([view(k) for k in jax.random.split(key)])


def cpu_ms(function, *arguments) -> tuple[float, object]:
  """Returns this process's CPU milliseconds, and the result."""
  start = time.process_time()
  result = function(*arguments)
  return 1e3 * (time.process_time() - start), result


def device_ms(batch: np.ndarray) -> tuple[float, float]:
  """Returns median wall and CPU milliseconds per pair, compiled and warm."""
  key = jax.random.key(0)
  jax.block_until_ready(on_the_device(key, batch))
  walls, cpus = [], []
  for i in range(5):
    start = time.perf_counter()
    cpu, _ = cpu_ms(
      lambda k: jax.block_until_ready(on_the_device(k, batch)),
      jax.random.fold_in(key, i),
    )
    walls.append(1e3 * (time.perf_counter() - start))
    cpus.append(cpu)
  return np.median(walls) / len(batch), np.median(cpus) / len(batch)


def host_ms(
  files: list[tuple[str, int]],
  their_pair: Callable,
  *,
  samples: int,
  pairs: int,
  batch: int,
) -> tuple[float, float, list[np.ndarray]]:
  """Returns median host CPU ms per pair, ours and theirs, and our clips.

  Args:
    files: (path, frames) to read from.
    their_pair: (path, start, samples) -> pair, on the host.
    samples: of a clip.
    pairs: how many each makes.
    batch: clips that ours stacks.
  """
  ours, theirs, clips = [], [], []
  for i in range(pairs + 1):
    path, frames = files[i % len(files)]
    start = np.random.randint(frames - samples + 1)
    decode, clip = cpu_ms(read, path, start, samples, "int16")
    clips.append(clip)
    stacked = clips[-batch:]
    stack, _ = cpu_ms(np.stack, stacked)
    ours.append(decode + stack / len(stacked))
    theirs.append(cpu_ms(their_pair, path, start, samples)[0])
  # The first pair pays for imports and caches.
  return np.median(ours[1:]), np.median(theirs[1:]), clips


def measure(folder: str, *, clip_s: float, pairs: int, batch: int) -> dict:
  """Returns the figures that `table` prints.

  Args:
    folder: of audio files.
    clip_s: length of a clip in seconds.
    pairs: how many each pipeline makes, per storage format.
    batch: pairs per batch on the device.
  """
  files = audio_files(folder, clip_s)[:pairs]
  random.seed(0)
  np.random.seed(0)
  fbank = functools.partial(numpy_fbank, bank=mel_bank())
  their_pair = functools.partial(on_the_host, host_pipeline(), fbank)
  sizes = {"samples": int(clip_s * RATE), "pairs": pairs, "batch": batch}
  storage = {}
  for suffix in ("as is", ".flac", ".wav"):
    with tempfile.TemporaryDirectory() as copied:
      stored = files if suffix == "as is" else copies(files, copied, suffix)
      our_ms, their_ms, clips = host_ms(stored, their_pair, **sizes)
    storage[suffix] = {"ours_ms": our_ms, "theirs_ms": their_ms}
  wall_ms, cpu_ms_per_pair = device_ms(np.stack(clips[:batch]))
  return {
    "clip_s": clip_s,
    "pairs": pairs,
    "files": len(files),
    "storage": storage,
    "device": jax.devices()[0].device_kind,
    "batch": batch,
    "device_wall_ms": wall_ms,
    "device_cpu_ms": cpu_ms_per_pair,
  }


def table(figures: dict) -> str:
  """Returns the figures of `measure` as text."""
  rows = [
    [
      suffix,
      f"{row['theirs_ms']:.2f}",
      f"{row['ours_ms']:.3f}",
      f"{row['theirs_ms'] / row['ours_ms']:.1f}",
    ]
    for suffix, row in figures["storage"].items()
  ]
  text = report.table_text(
    f"clips of {figures['clip_s']:g} s, {figures['pairs']} pairs, "
    f"{figures['files']} files; median host CPU ms per pair",
    ["storage", "all on the host", "decode and stack only", "ratio"],
    rows,
  )
  return (
    f"{text}\naugmentation and filter bank of both views on the device "
    f"({figures['device']}), batch {figures['batch']}:\n"
    f"{figures['device_wall_ms']:.2f} ms per pair; "
    f"{figures['device_cpu_ms']:.2f} ms CPU of this process"
  )


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  figures = measure(
    AUDIO_DIR.value, clip_s=CLIP_S.value, pairs=PAIRS.value, batch=BATCH.value
  )
  print(table(figures))
  report.write_json(JSON.value, figures, figures["device"])


if __name__ == "__main__":
  AUDIO_DIR = flags.DEFINE_string(
    "audio_dir", str(PACKAGED), "Folder of audio files, searched recursively."
  )
  CLIP_S = flags.DEFINE_float("clip_s", 10.0, "Length of a clip in seconds.")
  PAIRS = flags.DEFINE_integer("pairs", 24, "How many pairs each makes.")
  BATCH = flags.DEFINE_integer("batch", 8, "Pairs per batch on the device.")
  JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
  app.run(main)
