#!/usr/bin/env bash
# A run on every worker of a TPU VM or pod, with gcloud. Workers find each other through the metadata server.
#   TPU=my-pod ZONE=us-east5-a bash tools/launch/tpu_gcloud.sh configs/pretrain_7b_tpu.py \
#     --data.prepared /mnt/data/main --run /mnt/data/runs/7b
# /mnt/data must be the same on all workers (Filestore, or a bucket mounted with gcsfuse).
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}"
arguments=$(printf '%q ' "$@")

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

# several things are copied only into a folder that is there
on_all "mkdir -p llm-jax"
gcloud compute tpus tpu-vm scp --recurse --zone "$ZONE" --worker=all \
  llm_jax configs pyproject.toml README.md LICENSE "$TPU:~/llm-jax/"
on_all "cd llm-jax && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
on_all "cd llm-jax && .venv/bin/llm-jax doctor $arguments"
# nohup: the run outlives this connection; `llm-jax supervise` outlives a preempted or lost worker.
# In braces, so that no shell in the background holds the connection open
on_all "cd llm-jax && { nohup .venv/bin/llm-jax supervise -- .venv/bin/llm-jax pretrain $arguments > run.log 2>&1 < /dev/null & }"
