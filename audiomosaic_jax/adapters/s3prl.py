"""S3PRL, for SUPERB: an upstream with the frames after every block.

  from audiomosaic_jax.adapters import s3prl as adapter
  from s3prl.nn import Featurizer, S3PRLUpstream

  adapter.register()
  upstream = S3PRLUpstream("audiomosaic", "runs/demo")

Through torch.hub, a folder with a `hubconf.py` of one line,

  from audiomosaic_jax.adapters.s3prl import audiomosaic

serves `torch.hub.load(folder, "audiomosaic", "runs/demo", source="local")`.

Reference: s3prl 0.4.18; its S3PRLUpstream and both of its featurizers run in
tests/clients/s3prl_test.py.
"""

import numpy as np
import torch

from audiomosaic_jax.adapters import tensors


class UpstreamExpert(torch.nn.Module):
  """Frozen features of clips; gradients do not reach the encoder."""

  def __init__(
    self,
    ckpt: str | None = None,
    model_config: str | None = None,
    *,
    hop_ms: float = 40.0,
    refresh: bool = False,
  ):
    """Loads an encoder.

    Args:
      ckpt: as of `load_encoder`; None reads AUDIOMOSAIC_ENCODER.
      model_config: not used, the run has its own.
      hop_ms: from one frame to the next; 20 for recognising speech.
      refresh: not used, nothing is downloaded.

    Raises:
      ValueError: the encoder does not take the 16 kHz that SUPERB gives.
    """
    del model_config, refresh
    super().__init__()
    self.encoder = tensors.load(ckpt)
    self.hop_ms = hop_ms
    if self.encoder.sample_rate_hz != 16_000:
      raise ValueError(
        f"S3PRL gives audio at 16000 Hz, the encoder takes "
        f"{self.encoder.sample_rate_hz} Hz; use one of 16000 Hz"
      )

  def get_downsample_rates(self, key: str) -> int:
    """Returns samples per frame, the same for all features."""
    del key
    return round(self.hop_ms * self.encoder.sample_rate_hz / 1e3)

  def forward(self, wavs: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Returns "hidden_states": float32 [B, T, D] for each block.

    Args:
      wavs: [samples] each, at 16 kHz, of any lengths. A clip of n samples has
        ceil(n / downsample rate) frames, as S3PRL counts them: its last frame
        is repeated for samples that are too few for one more, and zeros are
        appended for the longest clip of the batch.
    """
    outs = self.encoder.embed_batch(
      [wav.detach().to("cpu", torch.float32).numpy() for wav in wavs],
      self.encoder.sample_rate_hz,
      hop_ms=self.hop_ms,
      layers=True,
    )
    rate = self.get_downsample_rates("hidden_states")
    counts = [-(-len(wav) // rate) for wav in wavs]
    depth, _, width = outs[0].layers.shape
    hidden = np.zeros((depth, len(wavs), max(counts), width), np.float32)
    for i, (out, count) in enumerate(zip(outs, counts, strict=True)):
      known = out.layers[:, :count]
      hidden[:, i, :count] = known[:, -1:]
      hidden[:, i, : known.shape[1]] = known
    states = torch.from_numpy(hidden).to(wavs[0].device)
    return {"hidden_states": list(states)}


def audiomosaic(ckpt: str | None = None, **kwargs) -> UpstreamExpert:
  """Returns an `UpstreamExpert` of those arguments, as hubs call it."""
  return UpstreamExpert(ckpt, **kwargs)


def register() -> None:
  """Adds "audiomosaic" to the upstreams that S3PRL finds by name."""
  from s3prl import hub

  hub.audiomosaic = audiomosaic
