"""Names of the published PyTorch parameters, module by module.

The published model keeps encoder and head in one flat module; here the encoder
is a module of its own, which is why only its names start with "encoder/".
"""

Table = dict[str, tuple[str, str]]

# Parts of an attention layer between two graphs: ours, reference, kind.
HETERO_ATTENTION = (
  ("proj_temporal", "proj_type1", "linear"),
  ("proj_spectral", "proj_type2", "linear"),
  ("att_proj", "att_proj", "linear"),
  ("att_proj_master", "att_projM", "linear"),
  ("att_weight_temporal", "att_weight11", "array"),
  ("att_weight_spectral", "att_weight22", "array"),
  ("att_weight_across", "att_weight12", "array"),
  ("att_weight_master", "att_weightM", "array"),
  ("proj_with_att", "proj_with_att", "linear"),
  ("proj_without_att", "proj_without_att", "linear"),
  ("proj_with_att_master", "proj_with_attM", "linear"),
  ("proj_without_att_master", "proj_without_attM", "linear"),
  ("norm", "bn", "norm"),
)
# The same of a layer within one graph.
GRAPH_ATTENTION = (
  ("att_proj", "att_proj", "linear"),
  ("att_weight", "att_weight", "array"),
  ("proj_with_att", "proj_with_att", "linear"),
  ("proj_without_att", "proj_without_att", "linear"),
  ("norm", "bn", "norm"),
)
RESIDUAL_BLOCK = (
  ("conv_0", "conv1", "conv"),
  ("norm", "bn2", "norm"),
  ("conv_1", "conv2", "conv"),
  ("shortcut", "conv_downsample", "conv"),
)
NUM_RESIDUAL_BLOCKS = 6


def _parts(ours: str, reference: str, parts: tuple) -> Table:
  """Returns the rows of the parts of one module."""
  return {
    f"{ours}/{part}": (f"{reference}.{name}", kind)
    for part, name, kind in parts
  }


def _aasist() -> Table:
  """Returns the rows of the AASIST back end."""
  table = {
    "reduce": ("LL", "linear"),
    "norm_in": ("first_bn", "norm"),
    "norm_out": ("first_bn1", "norm"),
    "attention_0": ("attention.0", "conv"),
    "attention_norm": ("attention.2", "norm"),
    "attention_1": ("attention.3", "conv"),
    "pos_spectral": ("pos_S", "array"),
    "pool_spectral/proj": ("pool_S.proj", "linear"),
    "pool_temporal/proj": ("pool_T.proj", "linear"),
    "out": ("out_layer", "linear"),
  }
  for i in range(NUM_RESIDUAL_BLOCKS):
    table |= _parts(f"residual_{i}", f"encoder.{i}.0", RESIDUAL_BLOCK)
  for ours, reference in (("spectral", "S"), ("temporal", "T")):
    table |= _parts(f"graph_{ours}", f"GAT_layer_{reference}", GRAPH_ATTENTION)
  for i in range(2):
    table[f"branch_{i}/master"] = (f"master{i + 1}", "array")
    for ours, reference in (("spectral", "hS"), ("temporal", "hT")):
      table[f"branch_{i}/pool_{ours}/proj"] = (
        f"pool_{reference}{i + 1}.proj",
        "linear",
      )
    for j in range(2):
      layer = f"HtrgGAT_layer_ST{i + 1}{j + 1}"
      table |= _parts(f"branch_{i}/graph_{j}", layer, HETERO_ATTENTION)
  return table


# Flax module -> (reference module, kind). "*" stands for the number of the
# block or layer, all of which are stacked on axis 0 here.
MODULES = {
  "encoder/cls_token": ("cls_token", "array"),
  "encoder/pos_embed": ("pos_embed", "array"),
  "encoder/patch_embed/proj": ("patch_embed.proj", "patch"),
  "encoder/patch_embed/norm": ("patch_embed.norm", "norm"),
  "encoder/norm_pre": ("norm_pre", "norm"),
  "encoder/blocks/norm1": ("blocks.*.norm1", "norm"),
  "encoder/blocks/attn/qkv": ("blocks.*.attn.qkv", "linear"),
  "encoder/blocks/attn/q_norm": ("blocks.*.attn.q_norm", "norm"),
  "encoder/blocks/attn/k_norm": ("blocks.*.attn.k_norm", "norm"),
  "encoder/blocks/attn/proj": ("blocks.*.attn.proj", "linear"),
  "encoder/blocks/norm2": ("blocks.*.norm2", "norm"),
  "encoder/blocks/mlp/fc1": ("blocks.*.mlp.fc1", "linear"),
  "encoder/blocks/mlp/fc2": ("blocks.*.mlp.fc2", "linear"),
  "encoder/norm": ("norm", "norm"),
  "fc_norm": ("fc_norm", "norm"),
  "projector/dense_0": ("projector.0", "linear"),
  "projector/norm_0": ("projector.1", "norm"),
  "projector/dense_1": ("projector.3", "linear"),
  "projector/norm_1": ("projector.4", "norm"),
  "online_classifier": ("online_classifier", "linear"),
  "logit_scale": ("logit_scale", "array"),
  "logit_bias": ("logit_bias", "array"),
  "head": ("head", "linear"),
  "layer_weights": ("layer_weights", "array"),
  "layer_norms": ("layer_norms.*", "norm"),
  "attn_query": ("attn_query", "array"),
  "attn_key": ("attn_key", "linear"),
  "attn_value": ("attn_value", "linear"),
  **_aasist(),
}

# Kind -> Flax leaf -> reference leaf.
KINDS = {
  "array": {"": ""},
  "linear": {"kernel": "weight", "bias": "bias"},
  "patch": {"kernel": "weight", "bias": "bias"},
  "conv": {"kernel": "weight", "bias": "bias"},
  "norm": {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
  },
}
