"""What a profile says of the operations of a program."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile_table

# A product in a fusion, a slice of a stack of matrices, and an update in place.
PROGRAM = """\
HloModule step

%product (p.0: f32[64,32], p.1: bf16[32,16]) -> f32[64,16] {
  %p.0 = f32[64,32]{1,0} parameter(0)
  %p.1 = bf16[32,16]{1,0} parameter(1)
  ROOT %d = f32[64,16]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%slice (q.0: f32[12,64,32], q.1: s32[]) -> f32[64,32] {
  %q.0 = f32[12,64,32]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %s = f32[1,64,32]{2,1,0} dynamic-slice(%q.0, %q.1, %q.1, %q.1), \
dynamic_slice_sizes={1,64,32}
  ROOT %n = f32[64,32]{1,0} negate(%s)
}

%write (r.0: f32[12,64,32], r.1: f32[1,64,32], r.2: s32[]) -> f32[12,64,32] {
  %r.0 = f32[12,64,32]{2,1,0} parameter(0)
  %r.1 = f32[1,64,32]{2,1,0} parameter(1)
  %r.2 = s32[] parameter(2)
  ROOT %u = f32[12,64,32]{2,1,0} dynamic-update-slice(%r.0, %r.1, %r.2, %r.2)
}

ENTRY %main (a: f32[12,64,32], b: bf16[32,16]) -> f32[64,16] {
  %a = f32[12,64,32]{2,1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %i = s32[] constant(3)
  %one = f32[64,32]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice, \
metadata={op_name="jit(step)/while/body/closed_call/neg"}
  %w = f32[12,64,32]{2,1,0} fusion(%a, %one, %i), kind=kLoop, calls=%write
  %g = (f32[64,16]{1,0}, s8[8]{0}) custom-call(%one, %b), \
custom_call_target="__cublas$gemm"
  %h = (bf16[2,3,10,8]{3,1,2,0}, u8[0]{0}) custom-call(%one, %one, %one), \
custom_call_target="__cudnn$fmhaSoftmax"
  %k = (bf16[2,3,10,8]{3,1,2,0}, u8[0]{0}) custom-call(%one, %one, %one), \
custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %f = c64[4,257]{1,0} fft(%one), fft_type=RFFT, fft_length={512}
  ROOT %y = f32[64,16]{1,0} fusion(%one, %b), kind=kOutput, calls=%product
}
"""


def operation(**changes):
  fields = {
    "name": "y",
    "part": "",
    "flops": 0.0,
    "num_bytes": 0.0,
    "seconds": 1.0,
    "times": 1.0,
  }
  return profile_table.Operation(**fields | changes)


def test_a_product_counts_the_same_in_a_fusion_and_in_a_library():
  program = profile_table.Program(PROGRAM)
  assert program.flops("y") == 2 * 64 * 32 * 16
  assert program.flops("g") == pytest.approx(2 * 64 * 32 * 16)
  assert program.flops("one") == 2 * 64 * 32
  assert program.flops("f") == 5 * 4 * 257 * 9
  assert program.flops("a") == 0


def test_fused_attention_counts_its_products():
  program = profile_table.Program(PROGRAM)
  one = 2 * (2 * 3) * 10 * 10 * 8
  assert program.flops("h") == 2 * one
  assert program.flops("k") == 5 * one


def test_kernels_of_an_operation_run_together_and_those_of_layers_add_up(
  monkeypatch,
):
  text = """\
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %add.1 = f32[8]{0} add(%a, %a), metadata={op_name="jit(f)/loss/add"}
  ROOT %add.2 = f32[8]{0} add(%add.1, %a), metadata={op_name="jit(f)/loss/add"}
}
"""
  events = [("add.1", "first", 1.0), ("add.1", "second", 2.0)]
  events += [("add.2", "first", 4.0), ("unknown", "first", 8.0)]
  monkeypatch.setattr(profile_table, "_events", lambda folder: 2 * events)
  (found,) = profile_table.operations(text, "", repeats=2)
  assert found == operation(
    name="add", part="loss/add", flops=16, num_bytes=192, seconds=7, times=2
  )
  assert profile_table.scope(found.part) == "loss"


def test_bytes_are_those_that_move():
  program = profile_table.Program(PROGRAM)
  matrix = 4 * 64 * 32
  assert program.num_bytes("y") == matrix + 2 * 32 * 16 + 4 * 64 * 16
  # One matrix of the twelve is read, or written.
  assert program.num_bytes("one") == matrix + 4 + matrix
  assert program.num_bytes("w") == matrix + 4 + matrix


def test_the_place_in_the_program_is_without_what_jax_adds():
  program = profile_table.Program(PROGRAM)
  assert program.part("one") == "while/body/neg"
  assert program.part("y") == ""


@pytest.mark.parametrize(
  ("expected", "flops", "num_bytes"),
  [
    (("compute", 0.8), 80.0, 1.0),
    (("memory", 0.5), 10.0, 5.0),
    (("neither", 0.05), 5.0, 0.1),
  ],
)
def test_the_larger_limit_bounds_unless_both_are_far(
  expected, flops, num_bytes
):
  bound = profile_table.bound(
    operation(flops=flops, num_bytes=num_bytes), peak_flops=100, bandwidth=10
  )
  assert bound == (expected[0], pytest.approx(expected[1]))


def test_a_recorded_product_is_found_again(tmp_path):
  @jax.jit
  def step(x):
    return jnp.tanh(x @ x)

  x = jnp.ones((256, 256))
  compiled = step.lower(x).compile()
  profile_table.record(lambda: compiled(x), str(tmp_path), 3)
  found = profile_table.operations(compiled.as_text(), str(tmp_path), 3)
  assert sum(each.flops for each in found) >= 2 * 256**3
  assert all(each.seconds > 0 and each.times == 1 for each in found)
  figures = profile_table.describe(found, peak_flops=1e9, bandwidth=1e9)
  text = profile_table.table(figures, 1)
  assert "bound by" in text and found[0].name in text


def test_a_folder_without_a_trace_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="xplane"):
    profile_table.operations(PROGRAM, str(tmp_path), 1)
