"""Takes an audio-language model apart for other programs.

  python -m audiomosaic_jax.language.export --model=runs/ask --output=exported

  llama/               the base with the adapters merged in, as a folder of the
                       Hugging Face Hub, tokenizer included
  adapter/             the adapters alone, as PEFT reads them
  audio.safetensors    encoder and projector, under their published names
  audio_config.json    front end, sizes, order of the audio tokens

The folder is read back and must give the logits of the run: to 2e-4 in
float32; the type of a half-precision base rounds what is merged into it, and
the difference is printed.
"""

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from audiomosaic_jax import files, torch_files, weight_files
from audiomosaic_jax.data import text
from audiomosaic_jax.language import (
  audio_weights,
  base,
  chat,
  llama_weights,
  peft_adapters,
)
from audiomosaic_jax.models import lora

LLAMA, ADAPTER = "llama", "adapter"
AUDIO, AUDIO_CONFIG = "audio.safetensors", "audio_config.json"
TOLERANCE = 2e-4
QUESTION = "What is happening?"


def export(
  talker: chat.Chat,
  output: str | os.PathLike,
  *,
  base_folder: str | os.PathLike,
  tokenizer: str | os.PathLike = "",
  shard_bytes: int,
) -> float:
  """Writes the parts of a model.

  Args:
    talker: the model.
    output: folder that does not exist.
    base_folder: of the base; its config.json is that of what is written.
    tokenizer: a folder or file, which is copied; "" is that of the base.
    shard_bytes: of a file of weights, at most.

  Returns:
    The largest difference of logits between the model and what was written.

  Raises:
    FileExistsError: the folder is there.
    FileNotFoundError: there is no tokenizer.
    ValueError: in float32, the difference is above TOLERANCE.
  """
  output = pathlib.Path(output).expanduser()
  if output.exists():
    raise FileExistsError(f"{output} is there; remove it or give another")
  tokens = tokenizer_files(tokenizer or base_folder)
  temporary = files.temporary_path(output)
  temporary.mkdir(parents=True)
  llama, params = talker.model.llama, talker.params["llama"]
  settings = llama_weights.read_settings(base_folder)
  adapters, _ = lora.split(params)
  merged = lora.merge(params, alpha=llama.lora_alpha) if adapters else params
  llama_weights.write_folder(
    merged, settings, temporary / LLAMA, shard_bytes=shard_bytes
  )
  for name, path in tokens.items():
    shutil.copyfile(path, temporary / LLAMA / name)
  if adapters:
    peft_adapters.write_adapter(adapters, llama, LLAMA, temporary / ADAPTER)
  audio = {name: talker.params[name] for name in ("encoder", "projector")}
  tensors = audio_weights.to_tensors(audio)
  torch_files.write_tensors(tensors, temporary / AUDIO)
  about = json.dumps(describe(talker), indent=2)
  files.write_text(temporary / AUDIO_CONFIG, about + "\n")
  difference = compare(talker, temporary)
  if llama.param_dtype == "float32" and difference > TOLERANCE:
    raise ValueError(
      f"what was written to {temporary} gives logits that differ by "
      f"{difference:.1e}, more than {TOLERANCE}; please report this"
    )
  temporary.rename(output)
  return difference


def tokenizer_files(place: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Returns the files of a tokenizer, by the names they have in a folder.

  Args:
    place: a folder or a file, as of `text.open_tokenizer`.

  Raises:
    FileNotFoundError: there is none.
  """
  place = pathlib.Path(place).expanduser()
  if place.is_file():
    json_name, model_name = text.TOKENIZER_FILES
    found = {json_name if place.suffix == ".json" else model_name: place}
    folder = place.parent
  else:
    found = {name: place / name for name in text.TOKENIZER_FILES}
    folder = place
  if not any(path.exists() for path in found.values()):
    raise FileNotFoundError(
      f"{place} has none of {text.TOKENIZER_FILES}; give base.tokenizer the "
      "folder of the tokenizer, or its file"
    )
  found |= {name: folder / name for name in text.CONFIG_FILES}
  return {name: path for name, path in found.items() if path.exists()}


def describe(talker: chat.Chat) -> dict[str, Any]:
  """Returns what another program needs to know to use the audio weights."""
  config, model = talker.config, talker.model
  return {
    "fbank": config.fbank.to_dict(),
    "spectrogram": config.spectrogram.to_dict(),
    "clip_samples": config.data.pipeline.clip_samples,
    "pad": config.data.pipeline.pad,
    "encoder": {**config.model.encoder.to_dict(), "grid": model.encoder.grid},
    "time_stride": model.time_stride,
    "pooling_order": model.pooling_order,
    "feature_divisor": model.projector.divisor,
    "num_audio_tokens": model.num_audio_tokens,
    "prompt": text.render("{instruction}"),
  }


def compare(talker: chat.Chat, folder: pathlib.Path) -> float:
  """Returns the largest difference of logits after a question about noise."""
  llama = base.read_llama(
    folder / LLAMA,
    use_kernel=None,
    **talker.config.model.llama.to_dict() | {"lora_rank": 0},
  )
  one = jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("data",))
  merged = llama_weights.read_params(
    weight_files.open_weights(folder / LLAMA), llama, one
  )
  audio = audio_weights.from_tensors(
    weight_files.open_weights(folder / AUDIO), talker.params
  )
  model = talker.model.clone(llama=llama)
  ids = text.encode_prompt(QUESTION, "", talker.tokenizer)
  ids = jnp.asarray(ids)[None]
  size = (1, model.encoder.grid[0] * model.encoder.patch_size)
  bands = talker.config.fbank.num_mel_bins
  noise = jax.random.normal(jax.random.key(0), (*size, bands))

  def logits(model, params):
    return model.apply(
      {"params": params},
      noise,
      ids,
      jnp.ones(ids.shape, bool),
      jnp.ones(1, bool),
      train=False,
    )

  found = jax.jit(logits, static_argnums=0)(model, {**audio, "llama": merged})
  wanted = jax.jit(logits, static_argnums=0)(talker.model, talker.params)
  return float(np.abs(np.asarray(found) - np.asarray(wanted)).max())


def define_flags() -> dict[str, flags.FlagHolder]:
  """Defines the flags of the command, which other programs may not want."""
  return {
    "model": flags.DEFINE_string(
      "model", None, "Workdir of a run of configs/instruct.py."
    ),
    "output": flags.DEFINE_string("output", None, "Folder to write."),
    "stage": flags.DEFINE_string(
      "stage", "", "A stage of it; the last finished by default."
    ),
    "base": flags.DEFINE_string(
      "base", "", "Folder of the Llama, if it has moved."
    ),
    "shard_gib": flags.DEFINE_float(
      "shard_gib", 5.0, "A file of weights is no larger."
    ),
  }


def main(argv: list[str], arguments: dict[str, flags.FlagHolder]) -> None:
  """Loads a model and writes its parts."""
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  given = {name: flag.value for name, flag in arguments.items()}
  try:
    talker = chat.load_chat(
      given["model"], stage=given["stage"], base_folder=given["base"]
    )
    places = base.place(
      talker.config, pathlib.Path(given["model"]).expanduser()
    )
    difference = export(
      talker,
      given["output"],
      base_folder=places["folder"],
      tokenizer=places["tokenizer"],
      shard_bytes=int(given["shard_gib"] * 2**30),
    )
  except (OSError, ValueError) as error:
    raise SystemExit(f"error: {error}") from None
  print(f"written: {given['output']}, logits within {difference:.1e}")


if __name__ == "__main__":
  ARGUMENTS = define_flags()
  flags.mark_flags_as_required(["model", "output"])
  app.run(lambda argv: main(argv, ARGUMENTS))
