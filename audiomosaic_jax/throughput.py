"""How fast a run is: FLOPs of the model, peak of the device, a step clock."""

import os
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import logging

# Dense bfloat16 peak per device, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def encoder_flops(
  num_tokens: int, *, patch_dim: int, width: int, depth: int, mlp_ratio: float
) -> float:
  r"""Returns the multiply-adds, times two, of one forward pass of one clip.

  .. math:: 2 N P D + L (2 N D^2 (4 + 2 r) + 4 N^2 D)

  with N tokens, patch dimension P, width D, depth L and MLP ratio r; norms,
  softmax and activations are left out, as is customary for MFU.

  Args:
    num_tokens: tokens that enter the blocks (N).
    patch_dim: values per patch (P).
    width: embedding dimension (D).
    depth: number of blocks (L).
    mlp_ratio: hidden width of the MLP over `width` (r).
  """
  linear = 2 * num_tokens * width**2 * (4 + 2 * mlp_ratio)
  attention = 4 * num_tokens**2 * width
  return 2 * num_tokens * patch_dim * width + depth * (linear + attention)


def peak_flops(device: jax.Device, override: float) -> float:
  """Returns the peak FLOP/s that MFU is measured against, per device.

  Args:
    device: a device of the mesh.
    override: `config.runtime.peak_flops_per_device`; 0 looks the device up in
      `PEAK_FLOPS`. A CPU is not listed: a float32 matrix product is timed,
      which is then the peak that this machine was seen to reach. So is
      another device that is not listed, with a warning.
  """
  peak = override or PEAK_FLOPS.get(device.device_kind)
  if peak:
    return peak
  if device.platform != "cpu":
    logging.warning(
      "the peak of a %r is not known, so mfu will be relative to a timed "
      "float32 product; set runtime.peak_flops_per_device to what its data "
      "sheet says",
      device.device_kind,
    )
  return _timed_peak(device)


def _timed_peak(device: jax.Device) -> float:
  """Returns the best of five timed 1536 x 1536 float32 products, FLOP/s."""
  size = 1536
  matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
  product = jax.jit(lambda a: a @ a)
  product(matrix).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    product(matrix).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


class StepClock:
  """Measures pairs/s, MFU, and what the host's part of a step costs.

  Args:
    pairs_per_step: global batch size.
    flops_per_pair: training FLOPs of one pair of views.
    peak_flops: of all devices together.
    computes_on_host: the devices are the CPU, so that the CPU time of this
      process is that of the model, too, and says nothing about the input.
  """

  def __init__(
    self,
    *,
    pairs_per_step: int,
    flops_per_pair: float,
    peak_flops: float,
    computes_on_host: bool,
  ):
    self._pairs_per_step = pairs_per_step
    self._flops_per_pair = flops_per_pair
    self._peak_flops = peak_flops
    self._computes_on_host = computes_on_host
    self.restart()

  def restart(self) -> None:
    """Starts a new interval; call after anything that is not training."""
    self._start = time.perf_counter()
    self._cpu_start = _cpu_seconds()
    self._steps = self._pairs = self._bytes = 0
    self._waited = 0.0

  def wait_for(self, batches: Iterator[dict]) -> dict:
    """Returns the next batch and adds up the wait for it.

    Args:
      batches: yields name -> rows that this process reads.
    """
    start = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - start
    self._steps += 1
    self._pairs += len(batch["waveform"])
    self._bytes += batch["waveform"].nbytes
    return batch

  def read(self) -> dict[str, float]:
    """Returns the figures since `restart`, and restarts.

    Returns:
      pairs_per_s and mfu, of all processes; host_wait_fraction, the share of
      time that the loop waited for a batch, in which the device may have been
      busy with the step before; bytes_per_pair that go to the device; and,
      unless the device is the CPU, host_cpu_ms_per_pair, all CPU time of this
      process and of its ended workers over the pairs it read.
    """
    seconds = max(time.perf_counter() - self._start, 1e-9)
    pairs_per_s = self._steps * self._pairs_per_step / seconds
    figures = {
      "pairs_per_s": pairs_per_s,
      "mfu": pairs_per_s * self._flops_per_pair / self._peak_flops,
      "host_wait_fraction": self._waited / seconds,
      "bytes_per_pair": self._bytes / max(self._pairs, 1),
    }
    if not self._computes_on_host:
      cpu_ms = 1e3 * (_cpu_seconds() - self._cpu_start)
      figures["host_cpu_ms_per_pair"] = cpu_ms / max(self._pairs, 1)
    self.restart()
    return figures


def _cpu_seconds() -> float:
  """Returns CPU time of this process and of its children that have ended."""
  return sum(os.times()[:4])
