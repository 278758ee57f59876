"""What adding devices costs: bytes of a compiled step over published links.

The batch per device stays, so the work of a device stays, too. A device sends

  all-reduce        2 b (n - 1) / n     of a result of b bytes over n devices
  all-gather          b (n - 1) / n
  reduce-scatter      b (n - 1)         of a result of b bytes

in a ring, which no algorithm undercuts by much. The model assumes that a step
computes and communicates in turn, at the full speed of the chip's links, and so
errs in both directions: overlap makes a step faster, a long way around a large
torus or a hop between slices makes it slower. Nothing of it is measured.
"""

from benchmarks import hlo

# Bytes/s that a chip can send to its neighbours, all links together: half of
# what the vendor's pages call bidirectional (2400, 1600, 4800, 3200 Gbit/s).
LINK_BYTES_PER_S = {
  "TPU v4": 300e9,
  "TPU v5 lite": 200e9,
  "TPU v5": 600e9,
  "TPU v6 lite": 400e9,
}
# Cycles/s: the published peak over what all matrix units do in a cycle.
CYCLES_PER_S = {
  "TPU v4": 1.05e9,
  "TPU v5 lite": 1.5e9,
  "TPU v5": 1.75e9,
  "TPU v6 lite": 1.75e9,
}
# Results that hold a row for every clip of the global batch.
GROWING = ("embeddings", "embedding gradients")
# What crosses the tensor axis only, whatever the number of devices.
NEIGHBOURLY = ("activations", "views")
HEADER = (
  "| devices | global batch | MB sent per device | ms on the links | "
  "ms of computation | share of time that computes |"
)


def sent_bytes(collective: hlo.Collective, num_devices: int) -> float:
  """Returns the bytes that a device sends in all runs of a collective."""
  share = (num_devices - 1) / num_devices
  factor = {
    "all-reduce": 2 * share,
    "reduce-scatter": share * num_devices,
  }.get(collective.kind, share)
  return factor * collective.num_bytes


def rows(
  collectives: dict[str, list[hlo.Collective]],
  *,
  device_kind: str,
  num_devices: int,
  batch_per_device: int,
  cycles: int,
  counts: tuple[int, ...],
  tensor_devices: int = 1,
) -> list[str]:
  """Returns a line of the table of HEADER for each number of devices.

  Args:
    collectives: role -> collectives of the step compiled for `num_devices`.
    device_kind: as JAX names it.
    num_devices: devices that the step was compiled for.
    batch_per_device: clips of a device, in all lines.
    cycles: the compiler's estimate for the computation of the step.
    counts: numbers of devices to tell about.
    tensor_devices: devices that share an encoder.
  """
  lines = []
  for count in counts:
    sent = sum(
      sent_bytes(collective, tensor_devices if role in NEIGHBOURLY else count)
      * (count / num_devices if role in GROWING else 1)
      for role, found in collectives.items()
      for collective in found
    )
    cells = [count, count * batch_per_device, f"{sent / 1e6:.1f}"]
    if device_kind in LINK_BYTES_PER_S:
      on_links = sent / LINK_BYTES_PER_S[device_kind]
      computes = cycles / CYCLES_PER_S[device_kind]
      cells += [f"{1e3 * on_links:.2f}", f"{1e3 * computes:.0f}"]
      cells.append(f"{100 * computes / (computes + on_links):.1f} %")
    else:
      cells += ["unknown links", "", ""]
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return lines
