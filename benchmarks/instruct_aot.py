"""Compiles a training step of the audio-language model for TPUs, without one.

  pip install 'libtpu==0.0.42.*'
  python -m benchmarks.instruct_aot --topologies=v5e:2x4,v4:2x2x1
  python -m benchmarks.instruct_aot --topologies=v5e:2x4 --batch_size=256 \
    --settings=TINY_LLAMA_DIR/config.json --markdown=table.md

The decoder has the size of LLaMA-7B, or that of the config.json that is given;
none of its weights are read. The base is bfloat16 and split over the devices,
what is learned is on each of them. Nothing is executed: memory and collectives
are the compiler's plan.
"""

import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from audiomosaic_jax import instruct, optimizer, sharding, train_state
from audiomosaic_jax.language import build, partition
from audiomosaic_jax.models import llama_config, lora
from audiomosaic_jax.models.llama import Llama, abstract_params
from benchmarks import hlo, report, tpu_aot, train_step

ConfigDict = ml_collections.ConfigDict
GIB = 2**30
LLAMA_7B = {
  "model_type": "llama",
  "vocab_size": 32_000,
  "hidden_size": 4096,
  "intermediate_size": 11_008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "rms_norm_eps": 1e-6,
}
COLUMNS = (
  *(
    "topology",
    "devices",
    "batch",
    "micro-batch per device",
    "argument",
    "temp",
  ),
  *("total", "HBM", "result", "collectives MB", "compile s"),
)


def shapes_of(config: ConfigDict, llama: Llama, mesh, stage: str) -> tuple:
  """Returns step and its arguments, as shapes with their places."""
  model = build.build_model(config, llama)
  own = build.abstract_own(model, config)
  trainable = config.stages[stage].trainable
  learns, _ = partition.split(own, trainable)
  schedule = optimizer.make_schedule(
    **config.schedule,
    base_lr=config.stages[stage].base_lr,
    warmup_steps=config.warmup_steps,
    total_steps=10_000,
  )
  tx = optimizer.make_optimizer(learns, schedule=schedule, **config.optimizer)
  state = jax.eval_shape(
    lambda own: train_state.create(
      {"params": partition.split(own, trainable)[0]}, tx, {}
    ).replace(params=own),
    own,
  )
  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    instruct.make_train_step(model, tx, trainable, config, mesh),
    donate_argnums=0,
    out_shardings=everywhere,
  )
  base = lora.split(abstract_params(llama))[1]
  base = jax.tree.map(_placed, base, sharding.decoder_sharding(base, mesh))
  size, length = config.batch_size, config.text.buckets[-1]
  samples = config.data.pipeline.clip_samples
  rows = sharding.batch_sharded(mesh)
  batch = {
    "waveform": ((size, samples), jnp.int16),
    "ids": ((size, length), jnp.int32),
    "labels": ((size, length), jnp.int32),
    "valid": ((size, length), jnp.bool_),
    "has_audio": ((size,), jnp.bool_),
  }
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for name, (shape, dtype) in batch.items()
  }
  place = functools.partial(_placed, place=everywhere)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return step, (jax.tree.map(place, state), base, batch, place(key))


def compile_step(
  config: ConfigDict, settings: dict[str, Any], topology: str
) -> list[str]:
  """Compiles the step for a topology; returns a row of the table."""
  devices = tpu_aot.topology_devices(topology)
  mesh = sharding.make_mesh(devices)
  llama = Llama(
    **llama_config.from_hf_config(settings),
    **config.model.llama,
    use_kernel=sharding.Everywhere(mesh),
  )
  step, arguments = shapes_of(config, llama, mesh, STAGE.value)
  started = time.perf_counter()
  row = [
    topology,
    str(len(devices)),
    str(config.batch_size),
    str(config.micro_batch_size),
  ]
  hbm = tpu_aot.HBM_GIB.get(devices[0].device_kind, float("inf"))
  try:
    compiled = step.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    seconds = time.perf_counter() - started
    refusal = tpu_aot.out_of_memory(str(error))
    return [*row, "", "", "", f"{hbm:.2f}", refusal, "", f"{seconds:.0f}"]
  seconds = time.perf_counter() - started
  memory = train_step.memory_bytes(compiled)
  found = hlo.collectives(compiled.as_text())
  total = memory["total"] / GIB
  return [
    *row,
    *(f"{memory[name] / GIB:.2f}" for name in ("argument", "temp")),
    f"{total:.2f}",
    f"{hbm:.2f}",
    "fits" if total <= hbm else "plans more than the HBM",
    _by_kind(found),
    f"{seconds:.0f}",
  ]


def _by_kind(found: list[hlo.Collective]) -> str:
  """Returns MB per step and device of each kind of collective."""
  sums: dict[str, float] = {}
  for one in found:
    sums[one.kind] = sums.get(one.kind, 0) + one.num_bytes / 1e6
  return ", ".join(f"{kind} {size:.0f}" for kind, size in sums.items())


def _placed(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def main(argv: list[str]) -> None:
  """Prints the table, and writes it."""
  del argv
  config = CONFIG.value
  config.fbank.update(config.fallback.fbank)
  config.spectrogram.update(config.fallback.spectrogram)
  config.data.pipeline.update(config.fallback.data.pipeline)
  settings = LLAMA_7B
  if SETTINGS.value:
    settings = json.loads(pathlib.Path(SETTINGS.value).read_text())
  rows = []
  for topology in TOPOLOGIES.value:
    for batch_size in map(int, BATCH_SIZES.value):
      config.batch_size = batch_size
      config.micro_batch_size = MICRO_BATCH_SIZE.value
      rows.append(compile_step(config, settings, topology))
      caption = f"{STAGE.value}, per device in GiB; {tpu_aot.versions()}"
      text = report.table_text(caption, COLUMNS, rows)
      print(text, flush=True)
  if MARKDOWN.value:
    pathlib.Path(MARKDOWN.value).write_text(f"```\n{text}\n```\n")


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/instruct.py:variant=base", "The experiment."
  )
  TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:2x4", "v4:2x2x1"], "Of TPUs, such as v5e:2x4."
  )
  STAGE = flags.DEFINE_string("stage", "stage_2", "Whose step to compile.")
  BATCH_SIZES = flags.DEFINE_list("batch_size", ["256"], "Of an update.")
  MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size", 32, "Of a forward pass, per device."
  )
  SETTINGS = flags.DEFINE_string(
    "settings", "", "A config.json; the size of LLaMA-7B by default."
  )
  MARKDOWN = flags.DEFINE_string("markdown", "", "File to write the table to.")
  app.run(main)
