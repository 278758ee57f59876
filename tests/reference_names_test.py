import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from models_heads_test import (
  AASIST,
  CASES,
  golden_model,
  shapes_of,
  state_of,
)
from tiny_vit import TINY_VIT

from audiomosaic_jax import reference_names, torch_params
from audiomosaic_jax.models import heads
from configs import common

GOLDEN = pathlib.Path(__file__).parent / "golden"
FULL_SIZE = TINY_VIT | {"mlp_ratio": 4.0, **common.VIT_SIZES["base"]}
MEAN = {"pooling": "mean"}
RELEASED = {"parity": "released", **MEAN}
# Published experiment -> head, classes, settings.
PUBLISHED = {
  "finetune_as20k": ("linear", 527, MEAN),
  "finetune_envsdd_ata_aasist": ("aasist", 2, AASIST),
  "linear_prob_as20k_layer5": ("layer", 527, {"layer": 5, **MEAN}),
  "linear_prob_as20k_weighted_sum": ("weighted_sum", 527, RELEASED),
  "linear_prob_as20k_attentive": (
    "attentive",
    527,
    {"num_queries": 1, **RELEASED},
  ),
}


def table_of(head, num_classes, settings, num_frames=1024):
  """Returns the rename table of a model of full size; computes nothing."""
  model = heads.build(
    head=head,
    grid=(num_frames // 16, 8),
    encoder=FULL_SIZE,
    num_classes=num_classes,
    freeze_encoder=True,
    **settings,
  )
  shapes = shapes_of(model, jnp.zeros((1, num_frames, 128)))
  return torch_params.rename_table(shapes)


def count(table, *, without=None):
  return sum(
    len(e.names) * int(np.prod(e.shape))
    for e in table
    if e.path[0] == "params" and e.path[1] != without
  )


def published():
  return json.loads((GOLDEN / "import_shapes.json").read_text())


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_names_shapes_and_counts_are_those_of_the_published_model(experiment):
  table = table_of(*PUBLISHED[experiment])
  stored = published()[experiment]
  unused = [r".*\.num_batches_tracked"]
  if "aasist" in experiment:
    unused += [*torch_params.AASIST_UNUSED, *torch_params.IGNORED]
  expected = {
    name: tuple(tensor["shape"])
    for name, tensor in stored["state_dict"].items()
    if not any(re.fullmatch(pattern, name) for pattern in unused)
  }
  actual = {name: entry.shape for entry in table for name in entry.names}
  assert actual == expected
  never_trained = sum(
    int(np.prod(tensor["shape"]))
    for name, tensor in stored["state_dict"].items()
    if name not in expected and tensor["kind"] == "param"
  )
  assert count(table) + never_trained == stored["total_parameters"]
  assert (never_trained > 0) == ("aasist" in experiment)


@pytest.mark.parametrize(
  ("head", "num_classes", "num_frames", "total"),
  [
    ("linear", 527, 1024, 86_056_463),  # AudioSet
    ("linear", 50, 512, 85_493_042),  # ESC-50
    ("linear", 11, 128, 85_315_595),  # Speech Commands, v1
    ("linear", 35, 128, 85_334_051),  # and v2
    ("linear", 2, 1024, 85_652_738),  # EnvSDD
  ],
)
def test_classifiers_have_the_published_number_of_parameters(
  head, num_classes, num_frames, total
):
  assert count(table_of(head, num_classes, MEAN, num_frames)) == total


def test_aasist_has_the_published_number_less_what_is_never_trained():
  unused_head = 768 * 1000 + 1000
  unused_norms = 2 * 768 + 2 * (32 + 32 + 64 + 64 + 64)
  total = count(table_of("aasist", 2, AASIST))
  assert total + unused_head + unused_norms == 86_834_674


@pytest.mark.parametrize(
  ("experiment", "trained"),
  [
    ("linear_prob_as20k_layer5", 406_799),
    ("linear_prob_as20k_weighted_sum", 406_812),
    ("linear_prob_as20k_attentive", 1_607_183),
  ],
)
def test_probes_train_the_published_tensors_beside_the_encoder(
  experiment, trained
):
  table = table_of(*PUBLISHED[experiment])
  assert count(table, without="encoder") == trained
  names = {n for e in table if e.path[1] != "encoder" for n in e.names}
  stored = published()[experiment]["state_dict"]
  assert names == {n for n, t in stored.items() if t["requires_grad"]}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_gives_back_every_byte_of_every_head(golden, case):
  z = golden("heads.npz")
  state = state_of(z, case)
  _, variables, _ = golden_model(z, case)
  used = torch_params.to_torch(variables, ignored={})
  assert set(used) <= set(state)
  for name, tensor in used.items():
    assert tensor.shape == state[name].shape
    assert tensor.tobytes() == state[name].tobytes(), name
  unused = (*torch_params.AASIST_UNUSED, *torch_params.IGNORED)
  for name in set(state) - set(used):
    assert case == "aasist"
    assert any(re.fullmatch(pattern, name) for pattern in unused)


def test_norms_that_aasist_never_trains_must_be_ignored_by_name(golden):
  z = golden("heads.npz")
  model, _, fbank = golden_model(z, "aasist")
  with pytest.raises(ValueError, match=r"21 tensors.*encoder\.1\.0\.bn1"):
    torch_params.from_torch(
      state_of(z, "aasist"), shapes_of(model, fbank), ignore=(r"fc_norm\.bias",)
    )


def test_no_two_modules_have_the_same_reference():
  references = [name for name, _ in reference_names.MODULES.values()]
  assert len(set(references)) == len(references)
  kinds = {kind for _, kind in reference_names.MODULES.values()}
  assert kinds == set(reference_names.KINDS)
