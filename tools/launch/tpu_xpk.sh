#!/usr/bin/env bash
# A run on a TPU cluster in GKE, with xpk, on one slice or several. Workers find each other by their environment.
#   CLUSTER=my-cluster IMAGE=region-docker.pkg.dev/project/repo/llm-jax TPU_TYPE=v5p-64 SLICES=2 \
#     bash tools/launch/tpu_xpk.sh configs/pretrain_7b_tpu.py --data.prepared /data/main --run /data/runs/7b
# IMAGE: tools/launch/Dockerfile built with EXTRA=tpu, and /data mounted by `xpk storage attach`.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${IMAGE:?a pushed image}" "${TPU_TYPE:?as in v5p-64}"
arguments=$(printf '%q ' "$@")

# under `supervise` a drained pod ends with 143, not with the 0 of a run that is done, so that it is started again
xpk workload create \
  --cluster "$CLUSTER" \
  --workload "llm-jax-$(date +%m%d-%H%M)" \
  --docker-image "$IMAGE" \
  --tpu-type "$TPU_TYPE" \
  --num-slices "${SLICES:-1}" \
  --max-restarts 10 \
  --command "llm-jax doctor $arguments && llm-jax supervise -- llm-jax pretrain $arguments"
