"""Settings of a small encoder: all attributes of ViT except the grid."""

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
