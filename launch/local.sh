#!/usr/bin/env bash
# Runs a job as several processes on the CPUs of this machine, joined as hosts
# would be: a rehearsal of a multi-host job, where it costs nothing.
#
#   launch/local.sh 2 --config=configs/pretrain.py:smoke --workdir=runs/two \
#     --config.probe.task=
#
# Paths are relative to the repository. One process drives all accelerators of
# a machine, so training on a single machine needs no launcher.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES --config=FILE --workdir=DIR ..." >&2
  exit 2
fi
export JAX_NUM_PROCESSES=$1
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:12355}
export JAX_PLATFORMS=cpu
shift

python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
processes=()
# A process that fails takes the others with it; so does Ctrl-C.
trap 'kill "${processes[@]}" 2>/dev/null || true' EXIT
for ((id = 0; id < JAX_NUM_PROCESSES; id++)); do
  JAX_PROCESS_ID=$id "$python" -m audiomosaic_jax.main "$@" &
  processes+=($!)
done
for _ in "${processes[@]}"; do
  wait -n
done
