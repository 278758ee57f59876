"""A small encoder: its settings, all of ViT but the grid, and inputs."""

import jax
import jax.numpy as jnp
import numpy as np

from audiomosaic_jax.models import vit

TINY_VIT = {
  "patch_size": 16,
  "width": 32,
  "depth": 2,
  "num_heads": 4,
  "mlp_ratio": 2.0,
  "drop_path": 0.0,
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
  "remat": "none",
  "scan_unroll": 1,
  "dtype": "float32",
}
SMALL = TINY_VIT | {"grid": (4, 2), "depth": 3, "final_norm": True}
FBANK = jnp.asarray(
  np.random.default_rng(0).normal(size=(8, 64, 32)), jnp.float32
)
KEEP_IDS = jnp.tile(jnp.array([5, 0, 3], jnp.int32), (8, 1))


def small(**changes) -> vit.ViT:
  return vit.ViT(**(SMALL | changes))


def lively(model: vit.ViT):
  """Parameters far from their initial values, so that every one matters."""
  shapes = jax.eval_shape(
    lambda key: model.init(key, FBANK, None, train=False), jax.random.key(0)
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2, s.dtype), shapes
  )


def loss(model, variables, fbank, keep_ids):
  tokens = model.apply(variables, fbank, keep_ids, train=False)
  return jnp.sum(jnp.sin(tokens.astype(jnp.float32)))


loss_and_grads = jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)
