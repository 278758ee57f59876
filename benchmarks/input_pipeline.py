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

import pathlib
import random
import tempfile
import time

import audiomentations as am
import jax
import jax.numpy as jnp
import numpy as np
import soundfile as sf
from absl import app, flags

from audiomosaic_jax import augment_waveform, features
from configs import common

PACKAGED = (
  pathlib.Path(features.__file__).parent / "data" / "demo_audio" / "pretrain"
)
AUDIO_DIR = flags.DEFINE_string(
  "audio_dir", str(PACKAGED), "Folder of audio files, searched recursively."
)
CLIP_S = flags.DEFINE_float("clip_s", 10.0, "Length of a clip in seconds.")
PAIRS = flags.DEFINE_integer("pairs", 24, "How many pairs each pipeline makes.")
BATCH = flags.DEFINE_integer("batch", 8, "Pairs per batch on the device.")

RATE = 16_000
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def audio_files(folder: str) -> list[tuple[str, int]]:
  """Returns (path, frames) of the 16 kHz files that hold one clip or more."""
  samples = int(CLIP_S.value * RATE)
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
      f"{RATE} Hz and at least {CLIP_S.value:g} s long; pass another "
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


def numpy_fbank(waveform: np.ndarray, bank: np.ndarray) -> np.ndarray:
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


def on_the_host(chain: am.Compose, bank, path, start, samples) -> np.ndarray:
  """Makes one pair of filter banks with numpy alone."""
  clip = read(path, start, samples, "float32")
  views = []
  for _ in range(2):
    view = np.roll(clip, np.random.randint(samples))
    view = view * np.float32(np.random.beta(10, 10) + 0.5)
    views.append(numpy_fbank(chain(view, RATE), bank))
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


def host_ms(files, chain: am.Compose, bank: np.ndarray):
  """Returns median host CPU ms per pair, ours and theirs, and our clips."""
  samples = int(CLIP_S.value * RATE)
  ours, theirs, clips = [], [], []
  for i in range(PAIRS.value + 1):
    path, frames = files[i % len(files)]
    start = np.random.randint(frames - samples + 1)
    decode, clip = cpu_ms(read, path, start, samples, "int16")
    clips.append(clip)
    batch = clips[-BATCH.value :]
    stack, _ = cpu_ms(np.stack, batch)
    ours.append(decode + stack / len(batch))
    arguments = (chain, bank, path, start, samples)
    theirs.append(cpu_ms(on_the_host, *arguments)[0])
  # The first pair pays for imports and caches.
  return np.median(ours[1:]), np.median(theirs[1:]), clips


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  files = audio_files(AUDIO_DIR.value)[: PAIRS.value]
  random.seed(0)
  np.random.seed(0)
  chain = host_pipeline()
  bank = features.mel_filter_bank(
    sample_rate_hz=RATE,
    fft_length=512,
    num_mel_bins=128,
    low_freq_hz=20.0,
    high_freq_hz=8_000.0,
  )
  print(
    f"clips of {CLIP_S.value:g} s, {PAIRS.value} pairs, {len(files)} files; "
    "median host CPU ms per pair\n"
    "storage | all on the host | decode and stack only | ratio"
  )
  for suffix in ("as is", ".flac", ".wav"):
    with tempfile.TemporaryDirectory() as folder:
      stored = files if suffix == "as is" else copies(files, folder, suffix)
      our_ms, their_ms, clips = host_ms(stored, chain, bank)
    print(
      f"{suffix:7} | {their_ms:15.2f} | {our_ms:21.3f} | "
      f"{their_ms / our_ms:5.1f}"
    )
  wall, cpu = device_ms(np.stack(clips[: BATCH.value]))
  print(
    "augmentation and filter bank of both views on the device "
    f"({jax.devices()[0].device_kind}), batch {BATCH.value}:\n"
    f"{wall:.2f} ms per pair; {cpu:.2f} ms CPU of this process"
  )


if __name__ == "__main__":
  app.run(main)
