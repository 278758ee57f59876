"""Embeddings of sound that is still coming in, from a microphone or a socket.

  stream = streaming.Stream(encoder, sample_rate_hz=48_000, hop_s=0.5)
  for chunk in microphone:
    for out in stream.push(chunk):
      print(out.end_s, out.embedding)

Every `hop_s` the last `window_s` are embedded, just as `Encoder.embed` does of
the same samples.
"""

from typing import NamedTuple

import numpy as np
import soxr

from audiomosaic_jax.encoder import Encoder, check_samples


class Moment(NamedTuple):
  """What was heard in the last window.

  Attributes:
    start_s: where the window begins, in seconds since the first sample.
    end_s: where it ends.
    level_db: its root mean square; a full-scale square wave has 0 dB.
    embedding: float32 [E]; None if it was quieter than the gate.
    logits: float32 [classes]; None without a classifier or below the gate.
  """

  start_s: float
  end_s: float
  level_db: float
  embedding: np.ndarray | None
  logits: np.ndarray | None


class Stream:
  """Takes chunks of any size, gives a moment for every hop.

  Attributes:
    latency_s: how long it may take until a sound is in an embedding, besides
      the time to compute one: the hop, and what the resampler holds back.
  """

  def __init__(
    self,
    encoder: Encoder,
    *,
    sample_rate_hz: int,
    hop_s: float | int = 0.5,
    window_s: float | int | None = None,
    gate_db: float | None = None,
  ):
    """Starts at time zero.

    Args:
      encoder: what embeds.
      sample_rate_hz: rate of the chunks.
      hop_s: from one moment to the next.
      window_s: how much is embedded; None is what the encoder sees at once.
        The first windows have what there is.
      gate_db: windows of a lower level are not embedded; None embeds all.

    Raises:
      ValueError: a hop shorter than a frame, or longer than the window.
    """
    rate_hz = encoder.sample_rate_hz
    window_s = encoder.window_s if window_s is None else window_s
    shortest_s = encoder.geometry.length / rate_hz
    if not shortest_s <= hop_s <= window_s:
      raise ValueError(
        f"hop_s is {hop_s:g}; use at least the {shortest_s:g} s of a frame "
        f"and at most the {window_s:g} s of the window"
      )
    self._encoder, self._gate_db = encoder, gate_db
    self._input_rate_hz = sample_rate_hz
    self._hop = round(hop_s * rate_hz)
    self._window = round(window_s * rate_hz)
    self._resampler = None
    if sample_rate_hz != rate_hz:
      self._resampler = soxr.ResampleStream(
        sample_rate_hz, rate_hz, num_channels=1, quality="HQ"
      )
    self._buffer = np.zeros(0, np.float32)
    self._received = 0  # Samples at the rate of the encoder.
    self._next = self._hop
    self._delay_s = _delay_s(sample_rate_hz, rate_hz)
    self.latency_s = hop_s + self._delay_s

  def push(self, chunk: np.ndarray) -> list[Moment]:
    """Takes the next samples; returns the moments that they complete.

    Args:
      chunk: [n], floating point in [-1, 1] or int16; n may be 0.

    Raises:
      ValueError: not one channel, or NaN; the chunk is then not taken.
    """
    samples = check_samples(chunk, self._input_rate_hz)
    if self._resampler is not None:
      samples = self._resampler.resample_chunk(samples)
    return self._take(samples)

  def finish(self) -> list[Moment]:
    """Ends the stream; returns what the resampler held back, and the rest.

    The last moment ends with the last sample, however near the one before.
    """
    moments = []
    if self._resampler is not None:
      rest = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
      moments = self._take(rest)
    left = self._received - (self._next - self._hop)
    if left and self._received >= self._encoder.geometry.length:
      moments.append(self._moment(self._buffer[-self._window :]))
    return moments

  def _take(self, samples: np.ndarray) -> list[Moment]:
    self._buffer = np.concatenate([self._buffer, samples])
    total = self._received + len(samples)
    moments = []
    while self._next <= total:
      # The window ends at the hop, though the chunk may go on.
      end = len(self._buffer) - (total - self._next)
      self._received = self._next
      moments.append(
        self._moment(self._buffer[max(0, end - self._window) : end])
      )
      self._next += self._hop
    self._received = total
    keep = self._window + self._hop
    self._buffer = self._buffer[-keep:]
    return moments

  def _moment(self, window: np.ndarray) -> Moment:
    rate_hz = self._encoder.sample_rate_hz
    end_s = self._received / rate_hz
    start_s = end_s - len(window) / rate_hz
    power = float(np.mean(np.square(window, dtype=np.float64)))
    level_db = 10 * np.log10(max(power, 1e-20))
    if self._gate_db is not None and level_db < self._gate_db:
      return Moment(start_s, end_s, level_db, None, None)
    out = self._encoder.embed(window, rate_hz)
    return Moment(start_s, end_s, level_db, out.embedding, out.logits)


def _delay_s(from_hz: int, to_hz: int) -> float:
  """Returns how much sound a resampler of these rates holds back."""
  if from_hz == to_hz:
    return 0.0
  probe = soxr.ResampleStream(from_hz, to_hz, num_channels=1, quality="HQ")
  out = probe.resample_chunk(np.zeros(from_hz, np.float32))
  return 1.0 - len(out) / to_hz
