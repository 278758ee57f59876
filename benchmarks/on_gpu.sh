#!/usr/bin/env bash
# The rows of docs/performance.md that need a GPU, in one call (of the memory
# rows, the last):
#
#   bash benchmarks/on_gpu.sh OUT
#
# writes a log and JSON files to the folder OUT. What takes long to compile is
# compiled first, side by side and into a cache, so that a rented GPU does not
# wait; then each program is timed alone. Needs the extras dev, bench and cuda.
# DEVICE=cpu VARIANT=micro PAIRS=8 MANY_PAIRS=8 tries it without a GPU.
set -uo pipefail

OUT=$(realpath -m "${1:?usage: bash benchmarks/on_gpu.sh OUT}")
DEVICE=${DEVICE:-cuda}
VARIANT=${VARIANT:-base}
PAIRS=${PAIRS:-256}
MANY_PAIRS=${MANY_PAIRS:-512}
FILE_PAIRS=$((PAIRS < 64 ? PAIRS : 64))
WORKERS=${WORKERS:-$(nproc)}
VARIANTS=${VARIANTS:-tiny,small,base,large}

mkdir -p "$OUT/cache"
cd "$(dirname "$0")/.." || exit 1
exec > >(tee "$OUT/log") 2>&1

export JAX_PLATFORMS=$DEVICE XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=$OUT/cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export TORCHINDUCTOR_CACHE_DIR=$OUT/cache/inductor
# Without command buffers the profiler can name operations.
named=--xla_gpu_enable_command_buffer=
[[ $DEVICE == cpu ]] && named=

config() { echo "--config=configs/pretrain.py:variant=$VARIANT,batch_size=$1"; }
say() { echo "== $SECONDS s: $*"; }
quiet() {
  local log
  log=$(mktemp "$OUT/cache/XXXX.log")
  "$@" > "$log" 2>&1 || echo "failed, see $log: $*"
}
step() { python3 -m benchmarks.train_step --nobreakdown "$@"; }
versus() {
  python3 -m benchmarks.versus_torch --device="$DEVICE" "$(config "$PAIRS")" "$@"
}
files() {
  python3 -m benchmarks.whole_path --device="$DEVICE" --nocompile \
    --workers="$WORKERS" "$(config "$FILE_PAIRS")" "$@"
}
saving=(--config.micro_batch_size=$((MANY_PAIRS < 32 ? MANY_PAIRS : 32)))
saving+=(--config.model.encoder.remat=full --config.model.encoder.scan_unroll=1)

say compile
jobs=()
quiet versus --rounds=1 --torch=torch.compile & jobs+=($!)
quiet step --compile_only "$(config "$MANY_PAIRS")" & jobs+=($!)
XLA_FLAGS=$named quiet step --compile_only "$(config "$MANY_PAIRS")" & jobs+=($!)
quiet step --compile_only "$(config "$FILE_PAIRS")" & jobs+=($!)
quiet step --compile_only "$(config "$MANY_PAIRS")" "${saving[@]}" & jobs+=($!)
wait "${jobs[@]}"  # Not for tee.

say the model step beside PyTorch
versus --turn_steps=10 --json="$OUT/versus_torch.json"
say the whole step, its share of the peak
step "$(config "$MANY_PAIRS")" --json="$OUT/step.json"
say where it goes
XLA_FLAGS=$named step "$(config "$MANY_PAIRS")" --repeats=3 \
  --profile="$OUT/cache/profile" --json="$OUT/profile.json"
say with little memory
step "$(config "$MANY_PAIRS")" "${saving[@]}" --json="$OUT/little_memory.json"
say from files
files --rounds=2 --turn_steps=$((2 * WORKERS)) --json="$OUT/whole_path.json"
say inference
env -u JAX_COMPILATION_CACHE_DIR python3 -m benchmarks.inference \
  --device="$DEVICE" --dtype=bfloat16 --variants="$VARIANTS" \
  --json="$OUT/inference.json"
say "done"
