"""An audio-language model of seconds: narrow, on a few packaged notes."""

import jax
import jax.numpy as jnp

from audiomosaic_jax import checkpoint, experiment, sharding, train_state
from audiomosaic_jax.data import questions
from audiomosaic_jax.language import base, build, demo, stages
from configs import instruct as configs


def tiny_config(workdir, split="valid", limit=12, **overrides):
  """A run of two stages on the first notes of a split, two steps each."""
  config = configs.get_config("debug")
  config.stages.order = ("stage_1", "stage_2")
  config.base.random.update(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=280,
  )
  config.model.encoder.update(
    patch_size=16,
    width=32,
    depth=2,
    num_heads=2,
    drop_path=0.0,
    norm="layernorm",
    mlp_ratio=2.0,
    activation="gelu",
    qk_norm=False,
    qkv_bias=True,
    proj_bias=True,
    pos_embed="learnable",
    pos_layout="paper",
    class_token=True,
    final_norm=True,
  )
  config.model.llama.update(lora_rank=4, lora_targets=("q_proj", "v_proj"))
  config.fbank.update(config.fallback.fbank)
  config.spectrogram.update(config.fallback.spectrogram)
  config.data.pipeline.update(clip_samples=20_720, pad="repeat")
  config.batch_size, config.micro_batch_size = 8, 8
  for name in configs.STAGES:
    config.stages[name].epochs = 16 / limit
  config.warmup_steps, config.log_every = 0, 1
  config.checkpoint.save_every = 1
  config.evaluation.max_clips = 4
  config.evaluation.num_resamples = 0
  config.evaluation.batch_size = 4
  config.data.audio_root = ""
  config.update_from_flattened_dict(overrides)
  write_questions(workdir, split, limit)
  return config


def write_questions(workdir, split, limit):
  """Writes a part of the packaged questions where the run looks for them."""
  folder = workdir / "questions"
  folder.mkdir(parents=True, exist_ok=True)
  records = questions.demo_records(split, seed=0)[:limit]
  questions.write_records(records, folder / "train.json")
  demo.write_captions(records, folder)


def open_base(config, workdir, mesh):
  """Returns the base of a run, written if it is not there."""
  demo.write(config, workdir)
  return base.open_base(
    **base.place(config, workdir), mesh=mesh, **config.model.llama
  )


def write_run(workdir):
  """Writes a run whose first stage is finished after no step; returns it."""
  config = tiny_config(workdir)
  mesh = sharding.make_mesh(jax.devices()[:1])
  held = open_base(config, workdir, mesh)
  model = build.build_model(config, held.llama)
  own = build.init_own(model, config, None, jax.random.key(0))
  state = train_state.TrainState(jnp.int32(0), own, {}, (), {})
  found = base.fingerprint_of(held.params)
  folder = workdir / "stage_1"
  with checkpoint.Checkpointer(
    folder / "checkpoints", keep_last=1, keep_every=0
  ) as saved:
    saved.save(0, state, {"base": found})
  stages.write_record(folder, {"steps": 0, "base": found})
  experiment.save_config(config, workdir)
  return workdir


def host(tree):
  return jax.tree.map(jax.device_get, tree)
