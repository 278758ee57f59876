"""What the backward pass keeps of a block, and what it computes again."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


def _saves(*names: str) -> Callable:
  """Returns a policy that keeps what has these names, or cuDNN computed."""
  named = jax.checkpoint_policies.save_only_these_names(*names)

  def policy(primitive, *args, **params) -> bool:
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or named(primitive, *args, **params)

  return policy


# Name -> policy of `jax.checkpoint`. In channels per token of a block of a ViT,
# in units of its width, they keep besides the block's input: "dots" the results
# of all products, 8; "products" what is used of those, and of cuDNN's
# attention, 9; "attention" the latter and the sum after it, 2; "full" nothing.
# The names are those that the ViT gives.
POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "products": _saves("qkv", "fc1", "middle", "norm"),
  "attention": _saves("middle", "norm"),
  "full": None,
}
# Those that need no names.
FOR_ANY = ("none", "dots", "full")


def remat(block: Any, name: str, *, in_loop: bool) -> Any:
  """Returns a module that computes again what a policy does not keep.

  Args:
    block: class of the module.
    name: in POLICIES; "none" computes nothing again.
    in_loop: blocks run in a loop, which keeps XLA from merging the second
      computation with the first; else barriers do.
  """
  if name == "none":
    return block
  return nn.remat(block, prevent_cse=not in_loop, policy=POLICIES[name])
