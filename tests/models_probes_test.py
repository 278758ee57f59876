import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_heads_test import FBANK, QUICK, build, init, lively, logits_of

from audiomosaic_jax.models import probes


def encode(model, params, fbank, **how):
  forward = jax.jit(
    lambda params: model.encoder.apply(
      {"params": params}, fbank, None, train=False, **how
    ),
    compiler_options=QUICK,
  )
  return forward(params["encoder"])


@pytest.mark.parametrize("pooling", ["mean", "fusion"])
def test_probing_the_last_layer_is_the_linear_probe(pooling):
  probe = build("layer", layer=1, pooling=pooling)
  variables = lively(probe)
  np.testing.assert_array_equal(
    logits_of(probe, variables, FBANK),
    logits_of(build("linear", pooling=pooling), variables, FBANK),
  )


def test_a_weighted_sum_of_one_layer_is_the_probe_of_that_layer():
  mixture = build("weighted_sum")
  variables = lively(mixture)
  for layer in range(2):
    weights = jnp.where(jnp.arange(2) == layer, 0.0, -1e9)
    params = variables["params"] | {"layer_weights": weights}
    expected = {k: v for k, v in params.items() if k != "layer_weights"}
    np.testing.assert_allclose(
      logits_of(mixture, {"params": params}, FBANK),
      logits_of(build("layer", layer=layer), {"params": expected}, FBANK),
      atol=2e-6,
    )


def test_released_parity_counts_the_last_block_twice():
  paper = build("weighted_sum", pooling="cls")
  variables = lively(paper)
  params = variables["params"]
  first, last = params["layer_weights"]
  half = last - jnp.log(2.0)
  twice = params | {"layer_weights": jnp.stack([first, half, half])}
  released = build("weighted_sum", pooling="cls", parity="released")
  np.testing.assert_allclose(
    logits_of(released, {"params": twice}, FBANK),
    logits_of(paper, variables, FBANK),
    atol=2e-6,
  )


@pytest.mark.parametrize("head", ["weighted_sum", "attentive"])
@pytest.mark.parametrize(("parity", "count"), [("paper", 2), ("released", 3)])
def test_every_layer_counts_alike_at_first(head, parity, count):
  model = build(head, parity=parity)
  params = init(model)["params"]
  if head == "weighted_sum":
    np.testing.assert_array_equal(params["layer_weights"], np.zeros(count))
  else:
    np.testing.assert_array_equal(
      params["layer_norms"]["scale"], np.ones((count, 32))
    )


def test_an_attentive_probe_with_a_zero_query_averages_the_layers():
  model = build("attentive", pooling="cls")
  variables = lively(model)
  params = variables["params"] | {
    "attn_query": jnp.zeros_like(variables["params"]["attn_query"])
  }
  _, layers = encode(model, params, FBANK, return_layers=True)
  x = np.asarray(layers[:, :, 0], np.float64)
  scale, bias = (
    np.asarray(params["layer_norms"][k]) for k in ("scale", "bias")
  )
  x = normed(x) * scale[:, None] + bias[:, None]
  x = x.mean(0) @ np.asarray(params["attn_value"]["kernel"], np.float64)
  x = normed(x) * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
  np.testing.assert_allclose(
    logits_of(model, {"params": params}, FBANK),
    x @ params["head"]["kernel"] + params["head"]["bias"],
    atol=2e-5,
  )


def test_attention_starts_as_in_the_published_code():
  model = build(
    "attentive", encoder={"width": 192, "num_heads": 3}, num_queries=3
  )
  params = init(model)["params"]
  assert params["attn_query"].shape == (1, 3, 1, 64)
  assert float(params["attn_query"].std()) == pytest.approx(0.02, rel=0.2)
  for name in ("attn_key", "attn_value"):
    kernel = params[name]["kernel"]
    assert float(jnp.abs(kernel).max()) == pytest.approx(192**-0.5, rel=1e-3)
    assert float(kernel.std()) == pytest.approx((3 * 192) ** -0.5, rel=0.02)


def test_prototype_logits_follow_the_equations():
  model = build("prototype")
  variables = lively(model)
  params = jax.tree.map(
    lambda x: np.asarray(x, np.float64), variables["params"]
  )
  tokens = encode(model, variables["params"], FBANK)
  x = normed(np.asarray(tokens[:, 1:], np.float64))
  x = x * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
  expected = np.zeros((8, 5))
  for b, c in np.ndindex(8, 5):
    for p, w in zip(params["prototypes"][c], params["weights"][c], strict=True):
      cosines = x[b] @ p / np.linalg.norm(x[b], axis=-1) / np.linalg.norm(p)
      expected[b, c] += w * cosines.max()
    expected[b, c] += params["bias"][c]
  np.testing.assert_allclose(
    logits_of(model, variables, FBANK), expected, atol=1e-5
  )


def test_a_class_is_scored_by_its_own_prototypes_alone():
  model = build("prototype")
  variables = lively(model)
  params = variables["params"]
  changed = params["prototypes"].at[2].multiply(-1.0)
  before = logits_of(model, variables, FBANK)
  after = logits_of(model, {"params": params | {"prototypes": changed}}, FBANK)
  differs = np.abs(before - after).max(0) > 1e-4
  np.testing.assert_array_equal(differs, np.arange(5) == 2)


def test_a_prototype_finds_its_patch_wherever_it_is():
  model = build("prototype", num_prototypes=1, num_classes=1)
  variables = init(model)
  tokens = encode(model, variables["params"], FBANK[:1])
  for place in (1, 9, 16):
    found = variables["params"] | {"prototypes": tokens[:, place][None]}
    centred = found["prototypes"] - found["prototypes"].mean(-1, keepdims=True)
    logits = logits_of(
      model, {"params": found | {"prototypes": 7 * centred}}, FBANK[:1]
    )
    np.testing.assert_allclose(logits, 1.0, atol=1e-4)


def test_lengths_of_zero_vectors_are_no_division_by_zero():
  x = jnp.zeros((2, 4))
  assert not bool(probes.unit_length(x).any())
  gradient = jax.grad(lambda x: probes.unit_length(x).sum())(x)
  assert bool(jnp.isfinite(gradient).all())


def normed(x):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
