"""An encoder that listens for a Llama that answers: LTU's four stages.

  python -m audiomosaic_jax.main --config=configs/instruct.py:stage=1 \
    --workdir=runs/ask --config.base.folder=VICUNA_7B_DIR \
    --config.init.run=runs/pretrain --config.data.folder=OPENAQA_DIR \
    --config.data.audio_root=AUDIO_DIR

and then stage=2, 3, 4 with the same --workdir; without an argument, all of
them one after the other. A stage starts from the last state of the one before.

  python -m audiomosaic_jax.main --config=configs/instruct.py:debug \
    --workdir=runs/ask

runs all stages on the packaged notes with a tiny random Llama, in minutes on a
CPU. It shows that everything works, not what a language model can do.

Switches:  parity=released  the published code's order of audio tokens, its
                            shuffling in training, its positions and statistics
           variant=base     insist on a size of encoder; else that of the run
           batch_size=64    of an update; micro-batches are as they were

The published training took LLaMA-7B and OpenAQA: 2 epochs of 1.2 million
classification questions in stages 1 and 2, one of 1.9 million closed questions
in stage 3, one of 5.6 million in stage 4.
"""

import ml_collections
from ml_collections import config_dict

from configs import common, supervised

ConfigDict = ml_collections.ConfigDict

STAGES = ("stage_1", "stage_2", "stage_3", "stage_4")
PRESETS = ("full", "debug")
# What learns: whole paths of parameters.
BRIDGE = (r"projector/.*", r"encoder/norm(_pre)?/.*")
ALL = (r"projector/.*", r"encoder/.*", r"llama/.*/lora_[ab]")


def get_config(argument: str = "") -> ConfigDict:
  """Returns the experiment; `argument` is the text after the colon."""
  args = common.parse_arguments(
    argument,
    preset="full",
    stage="all",
    variant="",
    batch_size=256,
    parity="paper",
  )
  common.choose("preset", args.preset, PRESETS)
  common.choose("stage", args.stage, ("all", "1", "2", "3", "4"))
  common.choose("parity", args.parity, supervised.PARITIES)
  config = full(args.variant)
  config.model.encoder.drop_path = 0.0
  config.batch_size = args.batch_size
  if args.preset == "debug":
    debug(config, args.given)
  if args.parity == "released":
    released(config)
  if args.stage != "all":
    config.stages.order = (f"stage_{args.stage}",)
  return config


def stage(
  name: str, learns: tuple[str, ...], base_lr: float, epochs: float
) -> dict:
  """One stage: its questions, what it trains, how fast and how long."""
  return {
    "files": (f"{name}.json",),
    "trainable": learns,
    "base_lr": base_lr,
    "epochs": epochs,
  }


def full(variant: str) -> ConfigDict:
  """The published training."""
  return ConfigDict(
    {
      "mode": "instruct",
      "seed": 0,
      "stages": {
        "order": STAGES,
        "stage_1": stage("combine_cla", BRIDGE, 1e-3, 2.0),
        "stage_2": stage("combine_cla", ALL, 1e-4, 2.0),
        "stage_3": stage("all_closed_qa", ALL, 1e-4, 1.0),
        "stage_4": stage("openaqa_5.6M", ALL, 1e-4, 1.0),
      },
      # Questions of an update; those that a device sees at once, 0 is all it
      # has.
      "batch_size": 256,
      "micro_batch_size": 32,
      "base": {
        # Hugging Face folder of a Llama.
        "folder": "",
        # Folder or file of the tokenizer; "" is the same folder.
        "tokenizer": "",
        # Fields of the config.json of a random one to write there; {} is none.
        "random": {},
      },
      "data": {
        # Folder of the stages' files.
        "folder": "",
        # Write questions about the packaged notes there first.
        "demo": False,
        # Folder that the audio ids in them are relative to.
        "audio_root": "",
        "guard": {"max_bad_fraction": 0.05, "cache_bytes": 0},
        # Arguments of data.pipeline.train_iterator.
        "pipeline": {
          "clip_samples": config_dict.placeholder(int),
          "crop": "start",
          "pad": config_dict.placeholder(str),
          "num_threads": 16,
          "prefetch_size": 2,
          "num_workers": 0,
        },
      },
      "text": {
        # Tokens of question and answer; the audio's are not counted.
        "cutoff": 108,
        # Batches are padded to the first of these that holds them.
        "buckets": (64, 112),
        # Learn the answers alone, not the questions.
        "response_only": False,
      },
      "fbank": supervised.nothing(common.fbank()),
      "spectrogram": supervised.nothing(ConfigDict(dict(common.AUDIOSET))),
      "init": {
        # Workdir of a pretraining run, or "" for a random encoder.
        "run": "",
        "states": (),
        # Published weights of encoder, projector and adapters, or "".
        "weights": "",
        # Arguments of models.positions.resize_positions.
        "positions": {"layout": "paper", "method": "bilinear"},
      },
      "model": {
        "encoder": supervised.encoder(variant),
        # Audio tokens: every second column of patches, 320 ms.
        "time_stride": 2,
        "pooling_order": "time",
        "shuffle_tokens": False,
        "count_padding": False,
        "feature_divisor": 50.0,
        # Attributes of models.llama.Llama that its config.json leaves open.
        "llama": {
          "lora_rank": 8,
          "lora_alpha": 16.0,
          "lora_dropout": 0.05,
          "lora_targets": ("q_proj", "v_proj"),
          "remat": "full",
          "dtype": "bfloat16",
          "param_dtype": "bfloat16",
        },
      },
      # Arguments of optimizer.make_optimizer, except the schedule.
      "optimizer": {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "frozen": (),
        "grad_clip_norm": 1.0,
      },
      # Arguments of optimizer.make_schedule, except rate and steps.
      "schedule": {
        "name": "linear",
        "min_lr": 0.0,
        "milestones": config_dict.placeholder(tuple),
        "milestone_factor": config_dict.placeholder(float),
      },
      "warmup_steps": 100,
      # How answers are drawn; a temperature of 0 takes the likeliest token.
      "generation": {
        "max_new_tokens": 400,
        "temperature": 0.1,
        "top_k": 500,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
      },
      "evaluation": evaluation(),
      "checkpoint": {"save_every": 500, "keep_last": 1, "keep_every": 0},
      "fallback": supervised.fallback(variant or "base"),
      "log_every": 10,
      "runtime": common.runtime(),
    }
  )


def evaluation() -> ConfigDict:
  """Sets of closed questions and of captions; those not there are left out."""
  missing = {"data_dir": "", "max_missing_fraction": 0.3}
  table = {"name": "task", "data_dir": ""}
  sets = {
    "esc50": closed_set({"name": "esc50", "data_dir": ""}, "all"),
    "vggsound": closed_set({"name": "vggsound", **missing}, "test"),
    "fsd50k": closed_set({"name": "fsd50k", **missing}, "eval", "map"),
    "audioset": closed_set({"name": "audioset", **missing}, "eval", "map"),
    # Folders with a labels.csv of path and label.
    "dcase17": closed_set(table, ""),
    "vocalsound": closed_set(table, ""),
    "tut17": closed_set(table, ""),
    "beijing_opera": closed_set(table, ""),
  }
  return ConfigDict(
    {
      "sets": {**sets, "order": tuple(sets)},
      "captions": {
        "order": ("audiocaps", "clotho"),
        "audiocaps": caption_set(
          "Close-ended question: Write an audio caption describing the sound,"
          " in AudioCaps style."
        ),
        "clotho": caption_set(
          "Close-ended question: Create a caption for audio, in Clotho style."
        ),
      },
      # "likelihood" of each label's answer, or "similarity" of the written
      # answer to it.
      "scorer": "likelihood",
      # What compares texts: "llama" is the base's own last hidden states, else
      # the folder of a model of sentence-transformers.
      "embedder": "llama",
      "instruction": "Close-ended question: Write an audio caption describing"
      " the sound.",
      "answer": "The sound of {label}.",
      # Divide a label's log-likelihood by its number of tokens.
      "per_token": False,
      "batch_size": 8,
      # Labels whose answers a decoder sees at once.
      "answers_at_once": 16,
      "max_new_tokens": 64,
      # Clips of each set, drawn with the seed; 0 is all.
      "max_clips": 0,
      "num_resamples": 1000,
      "confidence": 0.95,
    }
  )


def closed_set(source: dict, split: str, metric: str = "accuracy") -> dict:
  """Arguments of data.datasets.make_dataset, and what is measured."""
  return {"source": dict(source), "split": split, "metric": metric}


def caption_set(instruction: str) -> dict:
  """A table of captions (see data.caption_tables), its clips, the question."""
  return {"table": "", "folder": "", "instruction": instruction}


def debug(config: ConfigDict, given: tuple[str, ...]) -> None:
  """Everything once, tiny, on the packaged notes: a test, not a model."""
  config.base.random = ConfigDict(
    {
      "model_type": "llama",
      "vocab_size": 320,
      "hidden_size": 128,
      "intermediate_size": 256,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "rms_norm_eps": 1e-6,
    }
  )
  config.base.folder = "{workdir}/base"
  config.data.update(folder="{workdir}/questions", demo=True)
  config.data.guard.cache_bytes = 2**30
  config.data.pipeline.update(num_threads=2, prefetch_size=8, crop="random")
  if config.model.encoder.width is None:
    config.fallback = supervised.fallback("micro")
  config.fallback.spectrogram.num_frames = 128
  config.fallback.data.pipeline.update(clip_samples=20_720, pad="repeat")
  for name, epochs in zip(STAGES, (2.0, 4.0, 4.0, 6.0), strict=True):
    config.stages[name].update(
      files=("train.json",), base_lr=2e-3, epochs=epochs
    )
  config.micro_batch_size = 16
  if "batch_size" not in given:
    config.batch_size = 32
  config.warmup_steps = 10
  config.text.update(cutoff=96, buckets=(48, 96), response_only=True)
  config.model.encoder.update(dtype="float32", remat="none")
  config.model.llama.update(
    remat="none", dtype="float32", param_dtype="float32", lora_dropout=0.0
  )
  # A base that knows nothing has more to learn than queries and values.
  config.model.llama.update(
    lora_rank=16,
    lora_alpha=32.0,
    lora_targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
  )
  config.generation.update(
    max_new_tokens=40, temperature=0.0, repetition_penalty=1.0
  )
  config.checkpoint.save_every = 200
  sets = config.evaluation.sets
  with config.unlocked():
    sets.demo = ConfigDict(
      closed_set({"name": "task", "data_dir": "demo"}, "test")
    )
    config.evaluation.captions.demo = ConfigDict(
      caption_set(config.evaluation.instruction)
      | {"table": "{workdir}/questions/captions.csv"}
    )
  sets.order = config.evaluation.captions.order = ("demo",)
  config.evaluation.batch_size = 32


def released(config: ConfigDict) -> None:
  """What the published code does where it differs from what it says."""
  config.init.positions.layout = "released"
  config.model.update(
    pooling_order="reference", shuffle_tokens=True, count_padding=True
  )
  # Parity: LTU divides by one standard deviation, `standardize` by two. Its
  # 1024 frames follow from the run, as the length of the clips does.
  config.spectrogram.update(mean=-5.081, std=4.4849 / 2)
