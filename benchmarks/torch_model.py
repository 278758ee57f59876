"""AudioMosaic in PyTorch, as short as it can be: what ours is timed against.

The same sums as `audiomosaic_jax.models`, with what PyTorch has for them today:
`scaled_dot_product_attention`, `torch.compile`, fused AdamW. Parameters have
the names of the published code, so those of `torch_params.to_torch` fit. Loss,
gradients and updates are equal to ours (tests/benchmarks_versus_test.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConfigDict = ml_collections.ConfigDict

# The architecture that this file knows; the rest is free.
KNOWN = {
  "norm": "layernorm",
  "activation": "gelu",
  "qk_norm": False,
  "qkv_bias": True,
  "proj_bias": True,
  "class_token": True,
  "final_norm": False,
  "pos_embed": "learnable",
}
# A constant of the method.
FROZEN = "projector.4.bias"
NEVER_DECAYED = ("bias", "cls_token", "pos_embed")


def linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
  """Applies a layer in the type of its input; its weights stay float32."""
  weight = layer.weight.flatten(1).to(x.dtype)
  return F.linear(x, weight, layer.bias.to(x.dtype))


def layer_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
  """Normalises in float32, and returns the type of its input."""
  weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
  return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


class Block(nn.Module):
  """A pre-norm transformer block with stochastic depth.

  Args:
    width: channels of a token.
    num_heads: attention heads.
    hidden: width of the MLP.
    drop_rate: chance that a branch of an example is left out.
  """

  def __init__(self, width: int, num_heads: int, hidden: int, drop_rate: float):
    super().__init__()
    self.num_heads, self.drop_rate = num_heads, drop_rate
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.attn = nn.ModuleDict(
      {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
    )
    self.mlp = nn.ModuleDict(
      {"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)}
    )

  def forward(self, x: Tensor) -> Tensor:
    """Maps tokens [B, N, D] to tokens."""
    x = x + self._drop_path(self._attend(layer_norm(x, self.norm1)))
    hidden = F.gelu(linear(layer_norm(x, self.norm2), self.mlp["fc1"]))
    return x + self._drop_path(linear(hidden, self.mlp["fc2"]))

  def _attend(self, x: Tensor) -> Tensor:
    qkv = linear(x, self.attn["qkv"])
    qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(*qkv.unbind(0))
    return linear(x.transpose(1, 2).flatten(2), self.attn["proj"])

  def _drop_path(self, x: Tensor) -> Tensor:
    if not self.drop_rate:
      return x
    stays = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_rate
    return x * (stays / (1 - self.drop_rate)).to(x.dtype)


class AudioMosaic(nn.Module):
  """Encoder, projector and loss; `forward` returns the loss of a batch."""

  def __init__(self, config: ConfigDict, grid: tuple[int, int]):
    """Draws a model.

    Args:
      config: of a pretraining run.
      grid: (time, freq) patches of a spectrogram.

    Raises:
      ValueError: the config asks for a part that is not written here.
    """
    super().__init__()
    encoder, projector = config.model.encoder, config.model.projector
    _check(config)
    width, size = encoder.width, encoder.patch_size
    self.size, self.scale = size, 1 / config.model.temperature
    self.dtype = getattr(torch, encoder.dtype)
    self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
    self.pos_embed = nn.Parameter(
      0.02 * torch.randn(1, 1 + grid[0] * grid[1], width)
    )
    self.patch_embed = nn.ModuleDict(
      {
        "proj": nn.Conv2d(1, width, size, stride=size),
        "norm": nn.LayerNorm(width, eps=1e-6),
      }
    )
    self.norm_pre = nn.LayerNorm(width, eps=1e-6)
    rates = np.linspace(0, encoder.drop_path, encoder.depth).tolist()
    hidden = int(width * encoder.mlp_ratio)
    self.blocks = nn.ModuleList(
      Block(width, encoder.num_heads, hidden, rate) for rate in rates
    )
    self.fc_norm = nn.LayerNorm(width, eps=1e-6)
    self.projector = nn.Sequential(
      nn.Linear(width, projector.hidden_features, bias=False),
      nn.BatchNorm1d(projector.hidden_features),
      nn.ReLU(),
      nn.Linear(projector.hidden_features, projector.out_features, bias=False),
      nn.BatchNorm1d(projector.out_features),
    )
    self.get_parameter(FROZEN).requires_grad_(False)
    for layer in self.modules():
      if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
          nn.init.zeros_(layer.bias)

  def forward(self, fbanks: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
    """Returns the loss of both views.

    Args:
      fbanks: [B, T, F] standardised spectrograms of each view.
      ids: [B, K] tokens to keep of each view.
    """
    pooled = [self.encode(*view) for view in zip(fbanks, ids, strict=True)]
    projected = [self.projector(self.fc_norm(view)) for view in pooled]
    return nt_xent(*projected, self.scale)

  def encode(self, fbank: Tensor, ids: Tensor) -> Tensor:
    """Returns the mean over the tokens [B, D] of one view, float32."""
    size = self.size
    patches = fbank.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    patches = patches.transpose(2, 3).flatten(3).flatten(1, 2)
    index = ids[:, :, None].expand(-1, -1, patches.shape[2])
    kept = patches.gather(1, index).to(self.dtype)
    x = linear(kept, self.patch_embed["proj"])
    x = layer_norm(x, self.patch_embed["norm"])
    x = x + self.pos_embed[0, 1:][ids].to(x.dtype)
    cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
    x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    x = layer_norm(x, self.norm_pre)
    for block in self.blocks:
      x = block(x)
    return x.float().mean(dim=1)


def nt_xent(z_time: Tensor, z_freq: Tensor, scale: float) -> Tensor:
  """Returns NT-Xent over the 2B projections [B, E] of a batch of pairs."""
  count = len(z_time)
  unit = F.normalize(torch.cat([z_time, z_freq]))
  itself = torch.eye(2 * count, dtype=torch.bool, device=unit.device)
  logits = (scale * unit @ unit.T).masked_fill(itself, -torch.inf)
  other = torch.arange(2 * count, device=unit.device).roll(count)
  return F.cross_entropy(logits, other)


def load(model: AudioMosaic, arrays: Mapping[str, np.ndarray]) -> None:
  """Fills a model with what `torch_params.to_torch` gives, strictly."""
  counters = {
    name: value
    for name, value in model.state_dict().items()
    if name.endswith("num_batches_tracked")
  }
  given = {name: torch.from_numpy(array) for name, array in arrays.items()}
  model.load_state_dict(counters | given)


def make_optimizer(model: AudioMosaic, config: ConfigDict) -> torch.optim.AdamW:
  """Returns AdamW with the published groups; the rate is set step by step."""
  trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

  def group(decays: bool) -> dict[str, Any]:
    chosen = [
      parameter
      for name, parameter in trained
      if decays
      == (parameter.ndim > 1 and name.split(".")[-1] not in NEVER_DECAYED)
    ]
    decay = config.optimizer.weight_decay if decays else 0.0
    return {"params": chosen, "weight_decay": decay}

  optimizer = config.optimizer
  return torch.optim.AdamW(
    [group(True), group(False)],
    betas=(optimizer.b1, optimizer.b2),
    eps=optimizer.eps,
    fused=True,
  )


def make_step(
  model: AudioMosaic, config: ConfigDict, *, compiled: bool
) -> Callable[..., Tensor]:
  """Returns the training step: forward, backward, AdamW.

  Args:
    model: on its device; it is changed.
    config: of the run.
    compiled: pass forward and backward through `torch.compile`.

  Returns:
    (fbanks, ids, learning rate) -> loss.
  """
  optimizer = make_optimizer(model, config)
  loss_of = torch.compile(model, dynamic=False) if compiled else model

  def step(
    fbanks: Sequence[Tensor], ids: Sequence[Tensor], rate: float
  ) -> Tensor:
    for group in optimizer.param_groups:
      group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(fbanks, ids)
    loss.backward()
    optimizer.step()
    return loss.detach()

  return step


def _check(config: ConfigDict) -> None:
  """Raises ValueError for what is not written here."""
  asked = config.model.encoder.to_dict() | config.model.to_dict()
  known = KNOWN | {
    "pooling": "mean",
    "use_fc_norm": True,
    "learnable_temperature": False,
    "num_online_classes": 0,
  }
  for name, value in known.items():
    if asked[name] != value:
      raise ValueError(
        f"{name} is {asked[name]!r}, but the PyTorch model of the benchmark "
        f"has {value!r} only; leave it at that"
      )
