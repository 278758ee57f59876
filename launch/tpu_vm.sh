#!/usr/bin/env bash
# Runs a job on one host of a Cloud TPU VM slice. Start it on all at once:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command=\
#   "cd audiomosaic-jax && launch/tpu_vm.sh --config=configs/pretrain.py \
#   --workdir=SHARED_DIR"
#
# SHARED_DIR is a folder that all hosts have mounted.
set -euo pipefail
cd "$(dirname "$0")/.."

metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

endpoints=$(metadata worker-network-endpoints)
IFS=, read -ra hosts <<<"$endpoints"
if ((${#hosts[@]} > 1)); then
  # A host is given as its address, or as name:id:address.
  export JAX_COORDINATOR_ADDRESS="${hosts[0]##*:}:8476"
  export JAX_NUM_PROCESSES=${#hosts[@]}
  JAX_PROCESS_ID=$(metadata agent-worker-number)
  export JAX_PROCESS_ID
fi

python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
exec "$python" -m audiomosaic_jax.main "$@"
