#!/usr/bin/env bash
# Runs a job as several processes on the CPUs of this machine, joined as hosts
# would be: a rehearsal of a multi-host job, where it costs nothing.
#
#   launch/local.sh [--dry_run] 2 --config=configs/pretrain.py:smoke \
#     --workdir=runs/two
#
# Paths are relative to the repository. One process drives all accelerators of
# a machine, so training on a single machine needs no launcher.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.sh

if [[ ${1-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh [--dry_run] PROCESSES --config=FILE" \
    "--workdir=DIR ..." >&2
  exit 2
fi
count=$1
shift
address=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:12355}

processes=()
ending=
# A SIGTERM or Ctrl-C goes to all processes, which save and end together.
stop() {
  ending=1
  kill "${processes[@]}" 2>/dev/null || true
}
trap stop EXIT TERM INT
[[ ! $dry_run ]] || run cd "$PWD"
for ((id = 0; id < count; id++)); do
  command=(env JAX_PLATFORMS=cpu "JAX_COORDINATOR_ADDRESS=$address"
    "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$id"
    "$(find_python)" -m audiomosaic_jax.main "$@")
  if [[ $dry_run ]]; then
    echo "$(quote "${command[@]}") &"
  else
    "${command[@]}" &
    processes+=($!)
  fi
done
if [[ $dry_run ]]; then
  echo wait
  exit
fi

# A process that fails takes the others with it.
result=0
while [[ $(jobs -rp) ]]; do
  wait -n && status=0 || status=$?
  if ((status != 0 && status != STOPPED)) && [[ ! $ending ]]; then
    result=$status
    stop
  fi
done
if ((result == 0)); then
  for process in "${processes[@]}"; do
    wait "$process" || result=$?
  done
fi
exit "$result"
