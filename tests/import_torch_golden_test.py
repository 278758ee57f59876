"""Imported models compute what the published code computed.

The stored parameters of the reference are written as its checkpoints would be,
imported, and read back from the folder of the import.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from import_torch_test import STATS, imported, load, params_of
from models_heads_test import CASES, QUICK, logits_of, state_of, tolerance
from pretrain_golden_test import Reference, encode_view

from audiomosaic_jax import experiment, load_encoder
from audiomosaic_jax.models import heads, vit
from audiomosaic_jax.torch_settings import Choices


def embedded(encoder, fbank):
  """Returns what an encoder makes of whole spectrograms."""
  columns = encoder.geometry.max_columns

  @jax.jit(compiler_options=QUICK)
  def embed(variables, fbank):
    return encoder.model.apply(
      variables,
      fbank,
      jnp.full(len(fbank), columns),
      max_columns=columns,
      return_layers=True,
    )

  return embed(encoder.variables, jnp.asarray(fbank))


CLIP = (0.1 * np.random.default_rng(0).normal(size=16_000)).astype(np.float32)
ENCODERS = ("encoder_a", "encoder_b", "encoder_c", "encoder_d")


@pytest.mark.parametrize("name", ENCODERS)
def test_an_imported_encoder_computes_what_the_reference_did(name, tmp_path):
  z = load(name)
  described = json.loads(str(z["cfg_json"]))
  choices = Choices(
    # The norm of its queries tells the heads of encoder_d.
    num_heads=None if name == "encoder_d" else described["num_heads"],
    activation=described.get("act_type"),
    statistics=STATS,
  )
  folder, config, variables = imported(params_of(z), tmp_path, choices)
  assert (config.mode, config.model.projector) == ("pretrain", None)
  model = vit.ViT(grid=experiment.token_grid(config), **config.model.encoder)

  @jax.jit(compiler_options=QUICK)
  def encode(variables, fbank):
    return model.apply(variables, fbank, None, train=False)

  tokens = encode({"params": variables["params"]["encoder"]}, z["x"][:, 0])
  np.testing.assert_allclose(tokens, z["eval/out"], atol=2e-5, rtol=0)

  # The same through the door that a program takes.
  out = embedded(load_encoder(folder), z["x"][:, 0])
  expected = z["eval/out"].mean(axis=1)
  np.testing.assert_allclose(out["embedding"], expected, atol=2e-5, rtol=0)
  for i in range(config.model.encoder.depth):
    patches = z[f"eval/block{i}"][:, 1:]
    columns = patches.reshape(*out["layers"][:, i].shape[:2], 8, -1)
    np.testing.assert_allclose(
      out["layers"][:, i], columns.mean(axis=2), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["pretrain", "pretrain_alt"])
def test_an_imported_pretraining_model_computes_what_the_reference_did(
  name, tmp_path
):
  reference = Reference(load(name))
  pooling = reference.model.pooling
  choices = Choices(num_heads=3, statistics=STATS, pooling=pooling)
  _, config, variables = imported(reference.named("param"), tmp_path, choices)
  model = experiment.build_model(config)

  @jax.jit(compiler_options=QUICK)
  def project(variables, fbank, keep_ids):
    return model.apply(
      variables, fbank, keep_ids, method=encode_view, mutable=["batch_stats"]
    )[0]

  ids = reference.keep_ids()[0]
  z, pooled, online = project(variables, reference.fbanks[0], ids)
  np.testing.assert_allclose(z, reference.z["z0"], atol=5e-5, rtol=0)
  np.testing.assert_allclose(pooled, reference.z["f0"], atol=2e-5, rtol=0)
  if name == "pretrain_alt":
    expected = reference.z["online_logits0"]
    np.testing.assert_allclose(online, expected, atol=2e-5, rtol=0)
    log_scale, _ = model.apply(variables, method="similarity")
    assert float(log_scale) == float(reference.z["param/logit_scale"])


@pytest.mark.parametrize("case", CASES)
def test_an_imported_classifier_computes_what_the_reference_did(case, tmp_path):
  z = load("heads")
  described = json.loads(str(z[f"{case}/cfg_json"]))
  choices = Choices(
    num_heads=3,
    statistics=STATS,
    pooling=described.get("pooling", "avg").replace("avg", "mean"),
    layer=described.get("probe_layer"),
  )
  folder, config, variables = imported(state_of(z, case), tmp_path, choices)
  assert (config.mode, config.model.head) == ("finetune", CASES[case][0])
  assert (config.num_classes, config.class_names) == (
    described["num_classes"],
    (),
  )
  model = heads.build(
    grid=experiment.token_grid(config),
    num_classes=config.num_classes,
    **config.model,
  )
  x = z[f"{case}/x"] if f"{case}/x" in z.files else z["x"]
  np.testing.assert_allclose(
    logits_of(model, variables, jnp.asarray(x[:, 0])),
    z[f"{case}/logits"],
    atol=tolerance(z, case),
    rtol=0,
  )

  encoder = load_encoder(folder)
  assert encoder.class_names[-1] == str(config.num_classes - 1)
  assert encoder.classify([CLIP], 16_000).shape == (1, config.num_classes)
  if config.model.head == "linear":
    np.testing.assert_allclose(
      embedded(encoder, x[:, 0])["logits"],
      z[f"{case}/logits"],
      atol=tolerance(z, case),
      rtol=0,
    )
