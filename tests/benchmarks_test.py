"""The benchmarks count what they should; no test asserts a time."""

import dataclasses

import jax
import pytest

from audiomosaic_jax import contrastive, sharding
from benchmarks import hlo, tpu_aot, train_step, weak_scaling
from configs import pretrain

# A loop of four turns around a fusion and a reduction, a loop of unknown
# length with a reduction in its condition, and a gather that was started.
PROGRAM = """\
HloModule step

%inside (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"999"}
}

%cond (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %f = f32[8]{0} fusion(%x), calls=%inside, \
backend_config={"estimated_cycles":"10"}
  %r = (bf16[1,4]{1,0:T(2,128)(2,1)}, f32[]) all-reduce(%f), to_apply=%add
}

%until (p: (s32[])) -> pred[] {
  %any = u32[]{:T(128)} all-reduce(%q), to_apply=%add, \
metadata={op_name="jit(train_step)/jit(_beta)/while"}
  ROOT %more = pred[] compare(%any, %zero), direction=NE
}

%again (p: (s32[])) -> (s32[]) {
  ROOT %t = (s32[]) tuple(%i)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[]) while(%t), condition=%cond, body=%body, \
metadata={op_name="jit(train_step)/jvp()/shard_map/vmap(AudioMosaic.encode)"}
  %u = (s32[]) while(%t), condition=%until, body=%again
  %g = (f32[2,3], f32[16,3]) all-gather-start(%z), dimensions={0}
  ROOT %o = f32[8] add(%a, %a), backend_config={"estimated_cycles":"5"}
}
"""


def tiny_config():
  """The smoke experiment on the smallest encoder that has all parts."""
  config = pretrain.get_config("smoke,augment_level=0")
  config.model.encoder.update(width=16, depth=2, num_heads=2)
  config.model.projector.update(hidden_features=24, out_features=8)
  config.runtime.peak_flops_per_device = 1e12
  return config


def report(fits=True, batch=4, **roles):
  return tpu_aot.Report(
    topology="v5e:2x4",
    device_kind="TPU v5 lite",
    num_devices=8,
    batch_per_device=batch,
    tensor_devices=1,
    compile_s=1.0,
    memory={
      "argument": 3 << 30,
      "output": 3 << 30,
      "alias": 3 << 30,
      "temp": 1 << 30,
      "code": 1 << 20,
      "total": (4 << 30) + (1 << 20),
    }
    if fits
    else None,
    refusal="" if fits else "Used 20G of 15.75G hbm",
    collectives=roles,
    cycles={"model forward": 30, "rest": 10},
    flops_per_step=1e12,
  )


def collective(kind, *dims, counted=True):
  shapes = tuple(("f32", d) for d in dims)
  return hlo.Collective(kind, shapes, 1, counted, "")


def test_collectives_in_a_loop_count_once_per_turn():
  reduction = hlo.collectives(PROGRAM)[0]
  assert reduction.kind == "all-reduce"
  assert reduction.shapes == (("bf16", (1, 4)), ("f32", ()))
  assert (reduction.times, reduction.counted) == (4, True)
  assert reduction.num_bytes == 4 * (4 * 2 + 4)


def test_loops_that_depend_on_data_are_marked():
  reduction = hlo.collectives(PROGRAM)[1]
  assert reduction.op_name.endswith("_beta)/while")
  assert (reduction.times, reduction.counted) == (1, False)


def test_a_started_gather_counts_its_result_and_not_its_operand():
  gather = hlo.collectives(PROGRAM)[2]
  assert (gather.kind, gather.num_bytes) == ("all-gather", 16 * 3 * 4)


def test_cycles_of_a_fusion_count_once_and_go_to_its_loop():
  found = hlo.cycles(PROGRAM, hlo.part)
  assert found.pop("model forward") == 4 * 10
  assert list(found.values()) == [5]


@pytest.mark.parametrize(
  ("expected", "op_name"),
  [
    ("model forward", "jvp()/shard_map/vmap(AudioMosaic.encode)/encoder/while"),
    ("model forward", "jvp(AudioMosaic.project)/projector/norm_0/reduce_sum"),
    ("model backward", "transpose(jvp())/shard_map/psum_invariant"),
    ("model backward", "transpose(jvp(AudioMosaic.project))/projector/dense_0"),
    ("loss", "transpose(jvp(be,ne->bn))/dot_general"),
    ("Fourier transforms", "shard_map/vmap(augment)/jit(fft)"),
    (
      "phase vocoder: scan",
      "shard_map/vmap(augment)/while/body/closed_call/mul",
    ),
  ],
)
def test_an_instruction_goes_to_its_part_of_the_step(expected, op_name):
  assert hlo.part(f"jit(train_step)/{op_name}") == expected


def test_text_that_is_not_hlo_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo.collectives("HloModule nothing")


@pytest.mark.parametrize(
  ("expected", "found"),
  [
    ("embeddings", collective("all-gather", (16, 8))),
    ("unexpected", collective("all-gather", (16, 201, 16))),
    ("unexpected", collective("all-to-all", (16, 8))),
    ("unexpected", collective("collective-permute", (16, 8))),
    ("embedding gradients", collective("all-reduce", (16, 8), (16, 8))),
    ("embedding gradients", collective("all-reduce", (24,), (16, 8))),
    ("BatchNorm statistics", collective("all-reduce", (24,), (24,))),
    ("scalars", collective("all-reduce", ())),
    ("scalars of a random loop", collective("all-reduce", (), counted=False)),
    # Whole and block by block, with a bias that is as long as the embedding.
    ("gradients", collective("all-reduce", (256, 16), (1, 16, 64), (8,), ())),
    # The projector's matrix [24, 8], transposed.
    ("gradients", collective("all-reduce", (256, 16), (8, 24))),
    # Positions without the row of the class token.
    ("gradients", collective("all-reduce", (64, 16))),
    ("unexpected", collective("all-reduce", (16, 64, 16))),
    # The blockwise loss on a pod: two numbers for each of 16 clips.
    ("embeddings", collective("all-reduce", (16,), (16,))),
  ],
)
def test_every_collective_has_a_role(expected, found):
  config = tiny_config()
  setup = train_step.build(config, sharding.make_mesh())
  shapes = train_step.parameter_shapes(setup)
  assert hlo.role(found, config, shapes) == expected


@pytest.mark.parametrize(
  ("expected", "found"),
  [
    # Four clips of 25 tokens, mapped one by one; and their spectrograms.
    ("activations", collective("all-reduce", (4, 1, 25, 16))),
    ("views", collective("all-gather", (4, 128, 128), (4, 24))),
    ("parameters", collective("all-gather", (16, 3, 16))),
    # A device's half of the stacked kernels and biases of fc1.
    ("gradients", collective("all-reduce", (2, 16, 32), (2, 32))),
    ("unexpected", collective("all-reduce", (4, 1, 26, 16))),
    ("unexpected", collective("all-gather", (4, 128, 64))),
  ],
)
def test_every_collective_of_a_shared_encoder_has_a_role(expected, found):
  config = tiny_config()
  config.tensor_devices = 2
  setup = train_step.build(config, contrastive.make_mesh(config))
  shapes = train_step.parameter_shapes(setup)
  assert hlo.role(found, config, shapes) == expected


def test_verdicts_hold_for_the_least_communication():
  lines = tpu_aot.verdicts(
    report(
      embeddings=[collective("all-gather", (16, 8))],
      gradients=[collective("all-reduce", (256, 16))],
    )
  )
  assert all(line.startswith("yes") for line in lines)


def test_verdicts_name_what_is_unexpected():
  moved = collective("all-to-all", (16, 8))
  refused = [
    line
    for line in tpu_aot.verdicts(report(unexpected=[moved]))
    if line.startswith("NO")
  ]
  assert any("all-to-all" in line for line in refused)
  assert any("unexpected" in line for line in refused)


@pytest.mark.parametrize(
  ("largest", "start", "tried"),
  [
    (100, 32, [32, 64, 128, 96]),
    (24, 64, [64, 32, 16, 24]),
    (0, 2, [2, 1]),
  ],
)
def test_the_search_doubles_or_halves_and_then_bisects(largest, start, tried):
  found = tpu_aot.search(lambda b: report(b <= largest, b), start)
  assert [r.batch_per_device for r in found] == tried


def test_the_page_tells_the_largest_batch_and_what_did_not_fit():
  gather = collective("all-gather", (32, 8))
  reports = [
    report(batch=4, embeddings=[gather]),
    report(batch=8, embeddings=[gather]),
    report(fits=False, batch=16),
  ]
  text = tpu_aot.page(reports, "python -m benchmarks.tpu_aot", "jax 0.10.2")
  assert "out of memory: Used 20G of 15.75G hbm" in text
  assert "## v5e:2x4, 8 clips per device" in text
  assert "4 clips per device" not in text
  assert "nothing was executed" in text


def test_bytes_of_embeddings_grow_with_the_devices_and_gradients_hardly():
  # A million float32 numbers of either kind, on eight devices.
  gather = collective("all-gather", (10**6,))
  reduction = collective("all-reduce", (10**6,))
  rows = weak_scaling.rows(
    {"embeddings": [gather], "gradients": [reduction]},
    device_kind="TPU v5 lite",
    num_devices=8,
    batch_per_device=4,
    cycles=150_000_000,
    counts=(8, 32),
  )
  # 4 MB * 7/8 + 2 * 4 MB * 7/8 at 200 GB/s; four times the embeddings at 31/32.
  assert rows == [
    "| 8 | 32 | 10.5 | 0.05 | 100 | 99.9 % |",
    "| 32 | 128 | 23.2 | 0.12 | 100 | 99.9 % |",
  ]


def test_a_scattered_sum_sends_what_the_other_devices_keep():
  scatter = collective("reduce-scatter", (1000,))
  assert weak_scaling.sent_bytes(scatter, 8) == 7 * 4000


def test_unknown_links_are_called_unknown():
  (row,) = weak_scaling.rows(
    {},
    device_kind="TPU v99",
    num_devices=8,
    batch_per_device=4,
    cycles=1,
    counts=(8,),
  )
  assert "unknown links" in row


def test_the_compilers_words_are_cut_out_of_its_error():
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4G."
  )
  assert tpu_aot.out_of_memory(message) == "Used 20.10G of 15.75G hbm"
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (18.18G) exceeds available HBM (15.75G)."
  )
  assert tpu_aot.out_of_memory(message).startswith("total memory required")
  assert tpu_aot.out_of_memory("other\nlines") == "other"


@pytest.mark.parametrize("argument", ["", "released", "demo"])
def test_the_step_of_every_preset_has_the_shapes_of_its_state(argument):
  config = pretrain.get_config(argument)
  setup = train_step.build(config, sharding.make_mesh())
  state, scalars, views = jax.eval_shape(setup.step, *setup.shapes)
  before = jax.tree.map(lambda x: (x.shape, x.dtype), setup.shapes[0])
  assert before == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert scalars["loss"].shape == ()
  assert views["z"][0].shape[0] == config.batch_size


def test_a_batch_that_does_not_divide_is_refused_before_compiling():
  config = tiny_config()
  config.batch_size = 17
  with pytest.raises(ValueError, match="not divisible"):
    train_step.build(config, sharding.make_mesh())


@pytest.mark.slow
def test_the_table_has_the_step_every_piece_and_the_operations(tmp_path):
  mesh = sharding.make_mesh(jax.devices()[:1])
  figures = train_step.measure(
    tiny_config(), mesh, repeats=1, breakdown=True, profile=str(tmp_path)
  )
  text = train_step.table(figures)
  for name in ("pairs/s", "MFU", "memory per device", *figures["pieces_ms"]):
    assert name in text
  longest = figures["operations"]["rows"][0]
  assert longest["name"] in text and longest["seconds"] > 0
  assert figures["pairs_per_s"] > 0
  assert figures["memory_bytes_per_device"] > 0
  unread = dict(figures, pieces_ms=None, operations=None)
  assert "piece" not in train_step.table(unread)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_devices", [1, 2])
def test_the_whole_recipe_moves_nothing_but_embeddings_and_sums(tensor_devices):
  config = tiny_config()
  config.tensor_devices = tensor_devices
  config.augment_waveform = pretrain.get_config("smoke").augment_waveform
  setup = train_step.build(config, contrastive.make_mesh(config))
  text = setup.step.lower(*setup.shapes).compile().as_text()
  roles = hlo.roles(text, config, train_step.parameter_shapes(setup))
  checked = dataclasses.replace(report(), collectives=roles)
  lines = tpu_aot.verdicts(checked)
  assert not [line for line in lines if not line.startswith("yes")]
