"""What a checkpoint is follows from its tensors, or is asked for."""

import json
import pathlib
import re

import pytest

from audiomosaic_jax import (
  import_torch,
  torch_config,
  torch_heads,
  torch_params,
  torch_settings,
)
from audiomosaic_jax.torch_settings import Choices
from configs import common, finetune, pretrain, supervised

GOLDEN = pathlib.Path(__file__).parent / "golden"
PUBLISHED = json.loads((GOLDEN / "import_shapes.json").read_text())
EXPERIMENTS = [name for name in PUBLISHED if "state_dict" in PUBLISHED[name]]
# Published experiment -> head, and fields of the model.
HEADS = {
  "pretrain": (
    "pretrain",
    {
      "projector": {"hidden_features": 512, "out_features": 128},
      "use_fc_norm": True,
      "temperature": 0.1,
      "learnable_temperature": False,
      "num_online_classes": 0,
    },
  ),
  "finetune_as20k": ("linear", {"pooling": "mean"}),
  "finetune_envsdd_ata_aasist": (
    "aasist",
    {"width": 128, "filters": (32, 32, 64, 64, 64, 64), "graph_width": 64},
  ),
  "linear_prob_as20k_layer5": ("linear", {}),
  "linear_prob_as20k_weighted_sum": ("weighted_sum", {"parity": "released"}),
  "linear_prob_as20k_attentive": (
    "attentive",
    {"parity": "released", "num_queries": 1},
  ),
}
# Arguments of the published class, as config.json of a folder has them.
SETTINGS = {
  "model_class": "AudioMosaicClassifier",
  "spec_size": [1024, 128],
  "patch_stride": [16, 16],
  "embed_dim": 768,
  "depth": 12,
  "num_heads": 12,
  "proj_bias": True,
  "pooling": "avg",
  "num_classes": 527,
  "audio_preprocessing": {
    "target_length": 1024,
    "num_mel_bins": 128,
    "norm_mean": -4.0,
    "norm_std": 4.5,
    "sample_rate": 16000,
    "frame_shift": 10.0,
  },
}


def shapes_of(experiment):
  tensors = PUBLISHED[experiment]["state_dict"]
  return {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}


def derive(shapes, settings=None, **choices):
  return torch_config.derive(shapes, settings or {}, Choices(**choices))


def classifier(*, frames=1024, **changes):
  tokens = frames // 16 * 8 + 1
  shapes = shapes_of("finetune_as20k") | {"pos_embed": (1, tokens, 768)}
  return {k: v for k, v in (shapes | changes).items() if v is not None}


def test_every_published_model_is_here():
  assert set(EXPERIMENTS) == set(HEADS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_derived_model_has_the_published_names_and_shapes(experiment):
  shapes = shapes_of(experiment)
  found = derive(shapes)
  assert found.head == HEADS[experiment][0]
  target = import_torch.abstract_variables(found.config)
  table = torch_params.rename_table(target)
  actual = {name: entry.shape for entry in table for name in entry.names}
  # A classifier has a head that no pattern may leave out.
  patterns = [*torch_params.IGNORED[:1], *found.ignore]
  if found.head == "aasist":
    patterns += torch_params.IGNORED
  expected = {
    name: shape
    for name, shape in shapes.items()
    if not any(re.fullmatch(pattern, name) for pattern in patterns)
  }
  assert actual == expected


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_derived_config_is_that_of_the_published_model(experiment):
  config = derive(shapes_of(experiment)).config
  encoder = common.vit("base").to_dict()
  encoder |= {"drop_path": 0.0, "remat": "none", "dtype": "float32"}
  encoder["pos_layout"] = "released"
  assert config.model.encoder.to_dict() == encoder
  model = config.model.to_dict()
  for name, value in HEADS[experiment][1].items():
    assert model[name] == value
  assert config.fbank.to_dict() == common.fbank().to_dict()
  assert config.spectrogram.to_dict() == common.AUDIOSET
  assert config.data.pipeline.to_dict() == {
    "clip_samples": 160_000,
    "pad": "pad",
  }
  if config.mode == "finetune":
    assert config.num_classes == (2 if "aasist" in experiment else 527)


def test_constants_are_those_of_the_configs():
  assert common.fbank().to_dict() == torch_settings.FBANK
  assert common.probe("", 5000).to_dict() == torch_config.PROBE
  published = (common.AUDIOSET, finetune.ESC50, finetune.SPEECH)
  assert list(torch_settings.STATISTICS.values()) == list(published)
  config = supervised.base("")
  supervised.set_head(config, "aasist")
  for name, value in torch_heads.AASIST.items():
    assert config.model[name] == value
  for dataset, frames in (("as20k", 1024), ("esc50", 512), ("spc2", 128)):
    own = finetune.get_config(f"dataset={dataset}")
    samples = torch_settings.CLIP_SAMPLES[frames]
    assert own.spectrogram.num_frames == frames
    assert own.data.pipeline.clip_samples == samples


def test_a_pretraining_config_has_every_field_that_the_published_one_has():
  ours = derive(shapes_of("pretrain")).config
  theirs = pretrain.get_config()
  for name in ("fbank", "spectrogram", "model", "probe"):
    assert set(ours[name]) == set(theirs[name])
  assert set(ours.model.encoder) == set(theirs.model.encoder)


@pytest.mark.parametrize(
  ("frames", "task"),
  [(1024, "audioset"), (512, "esc50"), (128, "speech_commands")],
)
def test_normalisation_follows_from_the_published_length(frames, task):
  found = derive(classifier(frames=frames))
  expected = torch_settings.STATISTICS[task]
  assert found.config.spectrogram.to_dict() == expected
  assert any(f"as published for {task}" in note for note in found.notes)


def test_a_length_of_no_published_task_needs_its_normalisation():
  with pytest.raises(
    ValueError, match=r"320 frames.*\[128, 512, 1024\].*stats"
  ):
    derive(classifier(frames=320))
  config = derive(classifier(frames=320), statistics=(-5.0, 4.0)).config
  assert config.spectrogram.to_dict() == {
    "num_frames": 320,
    "mean": -5.0,
    "std": 4.0,
  }
  # The last of 320 frames ends with the last sample.
  assert config.data.pipeline.clip_samples == 400 + 319 * 160


def test_inputs_of_the_hugging_face_preprocessing_are_divided_by_half():
  one = derive(classifier()).config
  two = derive(classifier(), normalization="huggingface").config
  assert two.spectrogram.std == one.spectrogram.std / 2
  assert "half of s" in two.normalization and "2 std" in one.normalization


def test_an_encoder_of_other_parts_is_told_by_its_tensors():
  shapes = {
    name.replace("projector", "old"): shape
    for name, shape in shapes_of("pretrain").items()
    if not name.endswith(".bias")
  }
  shapes |= {
    "pos_embed": (1, 512, 768),
    "norm.weight": (768,),
    "blocks.0.attn.q_norm.weight": (96,),
    "blocks.0.mlp.fc1.weight": (2049, 768),
  }
  del shapes["cls_token"], shapes["fc_norm.weight"]
  config = derive(shapes).config
  encoder = config.model.encoder
  assert not encoder.class_token and encoder.final_norm and encoder.qk_norm
  assert not encoder.qkv_bias and not encoder.proj_bias
  assert (encoder.norm, encoder.num_heads) == ("rmsnorm", 8)
  assert int(encoder.width * encoder.mlp_ratio) == 2049
  assert config.model.projector is None and not config.model.use_fc_norm


def test_every_hidden_width_is_met_by_its_ratio():
  for hidden in range(1, 4000):
    ratio = torch_config.ratio_of(hidden, 768)
    assert int(768 * ratio) == hidden


def test_learnable_scalars_and_the_online_classifier_are_told_by_tensors():
  shapes = shapes_of("pretrain") | {
    "logit_scale": (),
    "logit_bias": (),
    "online_classifier.weight": (7, 768),
    "online_classifier.bias": (7,),
  }
  model = derive(shapes).config.model
  assert model.learnable_temperature and model.learnable_bias
  assert model.num_online_classes == 7


def test_a_probe_of_one_layer_is_one_only_if_somebody_says_so():
  shapes = classifier()
  assert derive(shapes).head == "linear"
  notes = derive(shapes).notes
  assert "layer=N" in next(n for n in notes if n.startswith("head"))
  chosen = derive(shapes, head="layer", layer=5).config.model
  told = derive(
    shapes, {"model_class": "AudioMosaicLayerProbe", "probe_layer": 5}
  ).config.model
  assert chosen.head == told.head == "layer"
  assert chosen.layer == told.layer == 5


def test_the_encoder_of_a_classifier_can_be_had_alone():
  found = derive(classifier(), head="none")
  assert found.config.mode == "pretrain" and found.config.model.use_fc_norm
  params = import_torch.abstract_variables(found.config)["params"]
  assert set(params) == {"encoder", "fc_norm"}
  aasist = shapes_of("finetune_envsdd_ata_aasist")
  found = derive(aasist, head="none")
  params = import_torch.abstract_variables(found.config)["params"]
  assert set(params) == {"encoder"}
  used = {
    name
    for entry in torch_params.rename_table({"params": params})
    for name in entry.names
  }
  patterns = (*torch_params.IGNORED, *found.ignore)
  left = {
    name
    for name in aasist
    if not any(re.fullmatch(pattern, name) for pattern in patterns)
  }
  assert left == used


def test_config_json_tells_what_tensors_cannot():
  told = derive(
    classifier(), SETTINGS | {"num_heads": 6, "act_type": "silu"}
  ).config
  assert told.model.encoder.num_heads == 6
  assert told.model.encoder.activation == "silu"
  assert told.spectrogram.to_dict() == {
    "num_frames": 1024,
    "mean": -4.0,
    "std": 4.5,
  }
  chosen = derive(
    classifier(), SETTINGS, num_heads=24, statistics=(-1.0, 2.0)
  ).config
  assert chosen.model.encoder.num_heads == 24
  assert chosen.spectrogram.mean == -1.0


def test_what_config_json_leaves_out_is_the_default_of_the_published_class():
  settings = {k: v for k, v in SETTINGS.items() if k != "pooling"}
  assert derive(classifier(), SETTINGS).config.model.pooling == "mean"
  assert derive(classifier(), settings).config.model.pooling == "cls"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"depth": 13}, "config.json says depth is 13.*make it 12.*complete"),
    ({"spec_size": [512, 128]}, r"spec_size is \[512, 128\].*\[1024, 128\]"),
    ({"num_classes": 50}, "num_classes is 50.*527"),
    ({"patch_size": 14}, r"patch_size is \[14, 14\].*\[16, 16\]"),
    ({"num_heads": "12"}, "num_heads is '12', no int"),
    ({"pooling": "max"}, "pooling 'max' is not one of"),
    ({"audio_preprocessing": []}, "audio_preprocessing is"),
    (
      {"audio_preprocessing": {"norm_mean": 0.0, "norm_std": 0.0}},
      "std must be positive",
    ),
    ({"model_type": "audiomosaic-jax"}, "from_pretrained"),
  ],
)
def test_a_config_json_that_the_tensors_deny_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    derive(classifier(), SETTINGS | change)


@pytest.mark.parametrize(
  ("shapes", "choices", "message"),
  [
    ({"model.layers.0.weight": (2, 2)}, {}, "patch_embed.proj.weight is not"),
    (
      classifier(pos_embed=(513, 768)),
      {},
      r"pos_embed is \(513, 768\).*3 axes",
    ),
    (
      classifier(**{"patch_embed.proj.weight": (768, 3, 16, 16)}),
      {},
      r"\(768, 3, 16, 16\).*one\s+channel",
    ),
    (
      classifier(**{"blocks.30.norm1.weight": (768,)}),
      {},
      "tensors of blocks.30, but none of blocks.12",
    ),
    (classifier(), {"num_mel_bins": 80}, "512 positions.*80 mel bands"),
    (
      classifier(**{"patch_embed.proj.weight": (48, 1, 16, 16)}),
      {},
      "width 48 is no multiple.*give num_heads",
    ),
    (
      classifier(**{"blocks.0.attn.q_norm.weight": (64,)}),
      {"num_heads": 6},
      "num_heads=6, but q_norm has 64 of 768 channels, which makes 12",
    ),
    (classifier(), {"head": "attentive"}, "'attentive' does not fit.*'linear'"),
    (classifier(), {"head": "layer"}, "needs the block that it reads"),
    (
      classifier(),
      {"head": "linear", "layer": 3},
      "layer=3 is of head 'layer'",
    ),
    (classifier(), {"head": "knn"}, "head='knn'; use one of"),
    (classifier(), {"layout": "true"}, "layout='true'"),
    (classifier(), {"normalization": "std"}, "normalization='std'"),
    (classifier(), {"class_names": ("a", "b")}, "2 class names.*527"),
    (
      classifier(layer_weights=(5,)),
      {},
      "reads 5 layers, but there are 12 blocks",
    ),
  ],
)
def test_what_cannot_be_told_is_refused_with_the_fix(shapes, choices, message):
  with pytest.raises(ValueError, match=message):
    derive(shapes, **choices)


def test_an_unusual_depth_is_pointed_out():
  shapes = {k: v for k, v in classifier().items() if "blocks.11." not in k}
  assert any("depth = 11" in note for note in derive(shapes).notes)
  assert not any("depth" in note for note in derive(classifier()).notes)


def test_statistics_are_given_by_name_or_number():
  parse = torch_settings.parse_statistics
  assert parse("esc50") == (-6.6268077, 5.358466)
  assert parse("-4.5, 2") == (-4.5, 2.0)
  for text in ("esc", "1", "1,2,3"):
    with pytest.raises(ValueError, match="give one of"):
      parse(text)
  for text in ("0,0", "0,-1", "nan,1", "0,inf"):
    with pytest.raises(ValueError, match="std must be positive"):
      parse(text)


def test_num_frames_of_the_window_are_filled_by_its_clip():
  samples = torch_settings.clip_samples(torch_settings.FBANK, 320)
  assert 1 + (samples - 400) // 160 == 320
  assert 1 + (samples - 1 - 400) // 160 == 319
