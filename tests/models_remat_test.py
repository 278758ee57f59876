"""How the blocks run, and what they keep meanwhile, changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import FBANK, KEEP_IDS, lively, loss_and_grads, small

from audiomosaic_jax.models import kernels


@pytest.mark.parametrize(
  "changes",
  [
    {"remat": "full"},
    {"remat": "dots"},
    {"remat": "products"},
    {"remat": "attention"},
    {"scan_unroll": 3},
    {"scan_unroll": 0},
    {"remat": "dots", "scan_unroll": 3},
    {"remat": "products", "scan_unroll": 3},
  ],
)
def test_remat_and_unrolling_change_no_number(changes):
  variables = lively(small())
  expected = loss_and_grads(small(), variables, FBANK, KEEP_IDS)
  actual = loss_and_grads(small(**changes), variables, FBANK, KEEP_IDS)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5),
    actual,
    expected,
  )


@pytest.mark.parametrize(
  ("policy", "widths"),
  [("full", 0), ("attention", 1), ("dots", 8), ("products", 8)],
)
def test_a_policy_keeps_as_many_channels_as_it_says(policy, widths):
  # Without cuDNN's attention, of which the table counts one more.
  variables = small(mlp_ratio=4.0).init(
    jax.random.key(0), FBANK, KEEP_IDS, train=False
  )

  def kept(remat):
    model = small(remat=remat, mlp_ratio=4.0)

    def encoded(variables):
      return model.apply(variables, FBANK, KEEP_IDS, train=False)

    backward = jax.eval_shape(lambda v: jax.vjp(encoded, v)[1], variables)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))

  tokens = FBANK.shape[0] * (KEEP_IDS.shape[1] + 1)
  a_width = small().depth * tokens * small().width
  more = (kept(policy) - kept("full")) / a_width
  # Four statistics of the norms for every token.
  assert 0 <= more - widths <= 4 / small().width


def test_padding_for_a_fused_kernel_changes_no_number(monkeypatch):
  model = small()
  variables = lively(model)
  ids = KEEP_IDS[:, : KEEP_IDS.shape[1] // 2 * 2]  # And the class token.
  expected = loss_and_grads(model, variables, FBANK, ids)
  lengths = []

  def fused(q, k, v, length):
    lengths.append((q.shape[1], length))
    count = jnp.full(len(q), length)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=count)

  monkeypatch.setattr(kernels, "_cudnn", fused)
  actual = loss_and_grads(small(attention="cudnn"), variables, FBANK, ids)
  assert set(lengths) == {(ids.shape[1] + 2, ids.shape[1] + 1)}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5),
    actual,
    expected,
  )
