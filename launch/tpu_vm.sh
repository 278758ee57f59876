#!/usr/bin/env bash
# What launch/tpu.sh has each host of a Cloud TPU slice do.
#
#   install     make .venv here, with the package in it
#   start ARG...  start audiomosaic_jax.main in the background
#   state       print none, running, finished, stopped, lost or failed STATUS
#   stop        have it save and end; wait for that
#   pack DIR    put the small files of a run into $HOME/audiomosaic-jax-run
#
# The job outlives the connection. Its log, process and exit status are kept in
# $HOME/audiomosaic-jax-run.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.sh
kept=$HOME/audiomosaic-jax-run
mkdir -p "$kept"

metadata() {
  curl --silent --show-error --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Prints one value of the lines KEY: 'value' in the tpu-env attribute.
tpu_env() {
  sed -n "s/^$1: *'\{0,1\}\([^']*\)'\{0,1\} *$/\1/p" <<<"$2"
}

# Sets the three variables by which processes find each other, if there are
# several: JAX asks the same metadata, but only where it is told to look.
find_peers() {
  local endpoints environment slices slice first
  endpoints=$(metadata worker-network-endpoints)
  environment=$(metadata tpu-env) || environment=
  slices=$(tpu_env MEGASCALE_NUM_SLICES "$environment")
  slice=$(tpu_env MEGASCALE_SLICE_ID "$environment")
  first=$(tpu_env MEGASCALE_COORDINATOR_ADDRESS "$environment")
  IFS=, read -ra hosts <<<"$endpoints"
  if ((${#hosts[@]} * ${slices:-1} > 1)); then
    # A host is given as its address, or as name:id:address.
    first=${first:-${hosts[0]##*:}}
    export JAX_COORDINATOR_ADDRESS="${first%%:*}:8476"
    export JAX_NUM_PROCESSES=$((${#hosts[@]} * ${slices:-1}))
    JAX_PROCESS_ID=$(($(metadata agent-worker-number) + \
      ${slice:-0} * ${#hosts[@]}))
    export JAX_PROCESS_ID
  fi
}

# After a restart of the host the number may be another program's.
alive() {
  [[ -s $kept/process ]] &&
    [[ $(ps -o args= -p "$(<"$kept/process")") == *tpu_vm.sh\ supervise* ]]
}

state() {
  if alive; then
    echo running
  elif [[ ! -e $kept/process ]]; then
    echo none
  elif [[ ! -s $kept/status ]]; then
    echo lost # The host went down with it.
  else
    case $(<"$kept/status") in
      0) echo finished ;;
      "$STOPPED") echo stopped ;;
      *) echo "failed $(<"$kept/status")" ;;
    esac
  fi
}

install() {
  # Images of TPU VMs come with a Python that is too old.
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
}

start() {
  if alive; then
    refuse "a job is running here; stop it first, or tail its log"
  fi
  find_peers
  rm -f "$kept/status"
  echo "$(date -u +%FT%TZ) start: $(quote "$@")" >>"$kept/log"
  nohup setsid launch/tpu_vm.sh supervise "$@" >>"$kept/log" 2>&1 </dev/null &
  echo $! >"$kept/process"
  echo "started; its log is $kept/log"
}

# Runs the job and keeps how it ended; a SIGTERM is for the job.
supervise() {
  local job status=0
  "$(find_python)" -m audiomosaic_jax.main "--stopped_status=$STOPPED" "$@" &
  job=$!
  trap 'kill "$job" 2>/dev/null || true' TERM
  while kill -0 "$job" 2>/dev/null; do
    wait "$job" || true # Returns early when the trap is called.
  done
  wait "$job" || status=$?
  echo "$status" >"$kept/status"
}

stop() {
  local second
  if alive; then
    kill "$(<"$kept/process")"
    for ((second = 0; second < 300; second++)); do
      alive || break
      sleep 1
    done
    if alive; then
      echo "still running after $second s, killed" >&2
      kill -KILL -- "-$(<"$kept/process")"
    fi
  fi
  state
}

pack() {
  tar -czf "$kept/fetched.tar.gz" -C "$1" --exclude=checkpoints \
    --exclude=compiled --exclude=features --exclude='.*.tmp' .
}

case ${1-} in
  install | start | state | stop | pack | supervise) "$@" ;;
  *) refuse "${1-} is no verb; see the first lines of this file" ;;
esac
