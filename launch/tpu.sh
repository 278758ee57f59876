#!/usr/bin/env bash
# Cloud TPU VMs through queued resources, from one host to several slices.
# `launch/tpu.sh --help` lists the verbs, `launch/tpu.sh VERB --help` explains
# one; --dry_run prints the commands of a verb and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.sh

usage() {
  case ${1-} in
    create) cat <<'END' ;;
launch/tpu.sh create NAME --accelerator=TYPE --runtime=VERSION
    [--spot | --reserved | --best_effort] [--nodes=SLICES]
Asks for a slice, or for several (multislice); none of the three is on demand.
  v4-8, v4-32, ...       --runtime=tpu-ubuntu2204-base
  v5litepod-16 to -256   --runtime=v2-alpha-tpuv5-lite
  v6e-8, ...             --runtime=v2-alpha-tpuv6e
  --create_flag=FLAG     a flag of gcloud's create; may be given several times
END
    status) cat <<'END' ;;
launch/tpu.sh status NAME [--wait]
Prints the state of the request; --wait waits until it is ACTIVE, and fails if
it never will be.
END
    sync) cat <<'END' ;;
launch/tpu.sh sync NAME [--setup=COMMAND]
Copies the committed tree to every host, runs COMMAND there (to mount shared
storage, for example) and installs the package. Changes that are not committed
are not copied.
END
    run) cat <<'END' ;;
launch/tpu.sh run NAME -- --config=FILE --workdir=SHARED_DIR ...
Starts audiomosaic_jax.main on every host, in the background. SHARED_DIR is
mounted on all of them under that name.
END
    state) cat <<'END' ;;
launch/tpu.sh state NAME
Prints for every host whether the job is running, finished, stopped (saved, to
be continued), failed, or none.
END
    tail) cat <<'END' ;;
launch/tpu.sh tail NAME [--node=0] [--worker=0]
Follows the log of one host; node counts slices, worker hosts of a slice.
END
    fetch) cat <<'END' ;;
launch/tpu.sh fetch NAME --workdir=SHARED_DIR --output=DIR
Copies what a run wrote to this machine, all but checkpoints and caches.
END
    stop) cat <<'END' ;;
launch/tpu.sh stop NAME
SIGTERM to the job of every host: it saves at one step and ends. Waits for that.
END
    delete) cat <<'END' ;;
launch/tpu.sh delete NAME
Deletes the slices and the request.
END
    watch) cat <<'END' ;;
launch/tpu.sh watch NAME (flags of create) [--setup=COMMAND] [--failures=3]
    -- --config=FILE --workdir=SHARED_DIR ...
Keeps a job going until it has finished: asks for the slice, sets it up, runs,
looks every minute, and after a preemption deletes it and begins again. Gives
up after that many failures of the job on one slice.
END
    *) cat <<'END' ;;
launch/tpu.sh VERB NAME [--zone=ZONE] [--project=PROJECT] [--dry_run] ...
VERB is create, status, sync, run, state, tail, fetch, stop, delete or watch.
NAME is of the queued resource. Zone and project are gcloud's own when left out.
--ssh_flag=FLAG is a flag of gcloud's ssh and scp, for example
--ssh_flag=--tunnel-through-iap; it may be given several times.
END
  esac
}

verb=${1-}
case $verb in
  create | status | sync | run | state | tail | fetch | stop | delete | watch) ;;
  --help | -h) usage && exit ;;
  *) usage >&2 && exit 2 ;;
esac
shift
name='' accelerator='' runtime='' kind='' nodes=1 setup='' wait='' node=0
worker=0 workdir='' output='' failures=3 arguments=() where=() create_flags=()
ssh_flags=()
while (($#)); do
  case $1 in
    --help | -h) usage "$verb" && exit ;;
    --dry_run) dry_run=1 ;;
    --zone=?* | --project=?*) where+=("$1") ;;
    --accelerator=?*) accelerator=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --spot | --reserved | --best_effort)
      [[ ! $kind ]] || refuse "$kind and $1 exclude each other"
      kind=${1//_/-}
      ;;
    --nodes=?*) nodes=${1#*=} ;;
    --setup=?*) setup=${1#*=} ;;
    --wait) wait=1 ;;
    --node=?*) node=${1#*=} ;;
    --worker=?*) worker=${1#*=} ;;
    --workdir=?*) workdir=${1#*=} ;;
    --output=?*) output=${1#*=} ;;
    --failures=?*) failures=${1#*=} ;;
    --create_flag=?*) create_flags+=("${1#*=}") ;;
    --ssh_flag=?*) ssh_flags+=("${1#*=}") ;;
    --) arguments=("${@:2}") && break ;;
    -*) refuse "$1 is no flag of $verb; see launch/tpu.sh $verb --help" ;;
    *)
      [[ ! $name ]] || refuse "$name and $1: give one name, arguments after --"
      name=$1
      ;;
  esac
  shift
done

# Ends unless the variables that a verb needs are set.
need() {
  local variable
  for variable in "$@"; do
    [[ ${!variable} ]] || refuse "$verb needs --$variable=..."
  done
}
[[ $name ]] || refuse "$verb needs the name of the queued resource"
for number in nodes node worker failures; do
  [[ ${!number} =~ ^[0-9]+$ ]] || refuse "--$number=${!number} is no number"
done
case $verb in
  create | watch) need accelerator runtime ;;
  fetch) need workdir output ;;
esac
case $verb in
  run | watch)
    ((${#arguments[@]})) || refuse "$verb needs -- and the arguments of main"
    ;;
  *) ((!${#arguments[@]})) || refuse "$verb takes no arguments after --" ;;
esac

resources=(gcloud compute tpus queued-resources)
everywhere=(--node=all --worker=all --batch-size=all)

# Runs a shell command on the hosts that the flags before it choose.
on_hosts() {
  run "${resources[@]}" ssh "$name" "${where[@]}" "${ssh_flags[@]}" \
    "${@:1:$#-1}" --command="${!#}"
}

# Runs launch/tpu_vm.sh on the hosts; flags, --, words of the command.
on_vm() {
  local flags=()
  while [[ $1 != -- ]]; do
    flags+=("$1")
    shift
  done
  on_hosts "${flags[@]}" "audiomosaic-jax/launch/tpu_vm.sh $(quote "${@:2}")"
}

create() {
  local command=("${resources[@]}")
  # Only the alpha commands have it.
  [[ $kind != --best-effort ]] || command=(gcloud alpha "${command[@]:1}")
  command+=(create "$name" "${where[@]}" --accelerator-type="$accelerator"
    --runtime-version="$runtime" ${kind:+"$kind"} "${create_flags[@]}")
  if ((nodes > 1)); then
    run "${command[@]}" --node-count="$nodes" --node-prefix="$name"
  else
    run "${command[@]}" --node-id="$name"
  fi
}

# Prints the state of the request, MISSING if there is none.
request_state() {
  local answer command=("${resources[@]}" describe "$name" "${where[@]}"
    "--format=value(state.state)")
  if [[ $dry_run ]]; then
    run "${command[@]}"
  elif answer=$("${command[@]}" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$answer" >&2
    return 1
  fi
}

status() {
  local state
  while true; do
    state=$(request_state)
    echo "$state"
    [[ $wait && ! $dry_run && $state != ACTIVE ]] || return 0
    is_coming "$state" || return 1
    sleep 30
  done
}

is_coming() {
  [[ $1 =~ ^(ACCEPTED|WAITING_FOR_RESOURCES|PROVISIONING|CREATING)$ ]]
}

# Chained, because nothing ends a function that is called by `watch`.
sync() {
  local archive=dist/audiomosaic-jax.tar.gz tree=audiomosaic-jax unpack
  if [[ ! $dry_run && $(git status --porcelain) ]]; then
    echo "changes that are not committed stay here:" >&2
    git status --short >&2
  fi
  # What was renamed must go; the environment is kept.
  unpack="mkdir -p $tree && find $tree -mindepth 1 -maxdepth 1 ! -name .venv"
  unpack+=" -exec rm -rf {} + && tar -xzf audiomosaic-jax.tar.gz"
  run mkdir -p dist &&
    run git archive --prefix="$tree/" --output="$archive" HEAD &&
    run "${resources[@]}" scp "$archive" "$name:" "${where[@]}" \
      "${ssh_flags[@]}" "${everywhere[@]}" &&
    on_hosts "${everywhere[@]}" \
      "$unpack${setup:+ && { $setup; \}} && $tree/launch/tpu_vm.sh install"
}

run_job() {
  on_vm "${everywhere[@]}" -- start "${arguments[@]}"
}

state() {
  on_vm "${everywhere[@]}" -- state
}

tail_log() {
  on_hosts --node="$node" --worker="$worker" \
    "tail -n 100 -F audiomosaic-jax-run/log"
}

fetch() {
  local packed=fetched.tar.gz
  on_vm --node=0 --worker=0 -- pack "$workdir"
  run mkdir -p "$output"
  run "${resources[@]}" scp "$name:audiomosaic-jax-run/$packed" "$output/" \
    "${where[@]}" "${ssh_flags[@]}" --node=0 --worker=0
  run tar -xzf "$output/$packed" -C "$output"
  run rm "$output/$packed"
}

stop() {
  on_vm "${everywhere[@]}" -- stop
}

delete() {
  run "${resources[@]}" delete "$name" "${where[@]}" --force --quiet
}

# Prints the state of the job of the first host; fails if it cannot be asked.
job_state() {
  local script=audiomosaic-jax/launch/tpu_vm.sh
  on_hosts --node=0 --worker=0 \
    "if test -x $script; then $script state; else echo none; fi"
}

# One look at the slice and the job; returns 0 when the job has finished.
look() {
  local state job
  state=$(request_state) || return 1
  echo "$(date -u +%FT%TZ) slice: $state"
  if [[ $state == MISSING ]]; then
    failed=0
    create
    return 1
  elif is_coming "$state"; then
    return 1
  elif [[ $state != ACTIVE ]]; then
    delete
    return 1
  fi
  job=$(job_state 2>/dev/null) || return 1
  echo "$(date -u +%FT%TZ) job: $job"
  case $job in
    finished) return 0 ;;
    none) sync && run_job ;;
    stopped) run_job ;;
    failed* | lost)
      if ((++failed > failures)); then
        echo "the job failed $failed times; see launch/tpu.sh tail $name" >&2
        exit 1
      fi
      stop
      sync && run_job
      ;;
  esac
  return 1
}

watch() {
  failed=0
  if [[ $dry_run ]]; then
    echo "# every minute:" && request_state
    echo "# when there is none:" && create
    echo "# when it is neither ACTIVE nor coming:" && delete
    echo "# when it is ACTIVE:" && job_state
    echo "# when there is no job:" && sync && run_job
    echo "# when it was stopped:" && run_job
    echo "# when it failed, at most $failures times:" && stop && sync && run_job
    return
  fi
  # What fails is tried again a minute later.
  until look; do
    sleep 60
  done
}

[[ ! $dry_run ]] || run cd "$PWD"
case $verb in
  run) run_job ;;
  tail) tail_log ;;
  *) "$verb" ;;
esac
