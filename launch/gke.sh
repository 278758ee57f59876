#!/usr/bin/env bash
# Runs a job on Google Kubernetes Engine, as a JobSet of launch/gke/*.yaml.
# `launch/gke.sh --help` explains; --dry_run prints the command and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.sh

usage() {
  cat <<'END'
launch/gke.sh tpu NAME --accelerator=tpu-v5-lite-podslice --topology=4x4
    --chips=4 [--slices=1] (and what follows)
launch/gke.sh gpu NAME --accelerator=nvidia-h100-80gb --nodes=2 --chips=8
    --image=IMAGE --claim=CLAIM --max_restarts=20 [--spot] [--namespace=SPACE]
    [--dry_run] -- --config=FILE --workdir=/shared/DIR ...

--chips is the TPU chips or GPUs of one host. CLAIM is a PersistentVolumeClaim
that several nodes can write to (ReadWriteMany), mounted at /shared. IMAGE is
built from launch/Dockerfile. The cluster needs JobSet.
END
}

kind=${1-}
case $kind in
  tpu | gpu) shift ;;
  --help | -h) usage && exit ;;
  *) usage >&2 && exit 2 ;;
esac
name='' accelerator='' topology='' chips='' slices=1 nodes='' image='' claim=''
max_restarts='' spot='' where=() arguments=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --dry_run) dry_run=1 ;;
    --accelerator=?*) accelerator=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --chips=?*) chips=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --nodes=?*) nodes=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --claim=?*) claim=${1#*=} ;;
    --max_restarts=?*) max_restarts=${1#*=} ;;
    --namespace=?*) where=("$1") ;;
    --spot) spot=1 ;;
    --) arguments=("${@:2}") && break ;;
    -*) refuse "$1 is no flag; see launch/gke.sh --help" ;;
    *)
      [[ ! $name ]] || refuse "$name and $1: give one name, arguments after --"
      name=$1
      ;;
  esac
  shift
done

# What is filled in is checked, so that it cannot become another piece of YAML.
check() {
  local variable=$1 pattern=$2
  [[ ${!variable} =~ ^($pattern)$ ]] ||
    refuse "--$variable=${!variable} must match $pattern"
}
label='[a-z0-9]([-a-z0-9.]*[a-z0-9])?'
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  refuse "NAME is '$name'; give small letters, digits and -, 40 at most"
check accelerator "$label"
check claim "$label"
check image '[A-Za-z0-9][-A-Za-z0-9._/:@]*'
for number in chips slices max_restarts; do
  check "$number" '[1-9][0-9]*'
done
((${#arguments[@]})) || refuse "give -- and the arguments of main"
if [[ $kind == tpu ]]; then
  check topology '[1-9][0-9]*(x[1-9][0-9]*)+'
  all=$((${topology//x/*}))
  hosts=$((all / chips))
  ((hosts * chips == all)) ||
    refuse "topology $topology has $all chips, no multiple of --chips=$chips"
else
  check nodes '[1-9][0-9]*'
  hosts=$nodes
fi

# Prints words as a JSON list, which is YAML, too.
json_list() {
  local word separator=''
  printf '['
  for word in "$@"; do
    word=${word//$'\\'/$'\\\\'}
    word=${word//'"'/'\"'}
    word=${word//$'\n'/'\n'}
    word=${word//$'\t'/'\t'}
    [[ $word != *[[:cntrl:]]* ]] || refuse "a control character in $word"
    printf '%s"%s"' "$separator" "$word"
    separator=', '
  done
  printf ']'
}

manifest=$(grep -v '^ *#' "launch/gke/$kind.yaml")
if [[ ! $spot ]]; then
  manifest=$(grep -v 'With --spot only' <<<"$manifest")
fi
fill() {
  manifest=${manifest//"__$1__"/"$2"}
}
fill NAME "$name"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill CHIPS "$chips"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill IMAGE "$image"
fill CLAIM "$claim"
fill MAX_RESTARTS "$max_restarts"
fill ARGS "$(json_list "--stopped_status=$STOPPED" "${arguments[@]}")"

command=(kubectl apply "${where[@]}" --filename=-)
if [[ $dry_run ]]; then
  printf "%s <<'END_OF_JOBSET'\n%s\nEND_OF_JOBSET\n" \
    "$(quote "${command[@]}")" "$manifest"
else
  "${command[@]}" <<<"$manifest"
fi
