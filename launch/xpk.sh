#!/usr/bin/env bash
# A workload on a cluster that XPK made: the same command on every host of the slice.
#
#   CLUSTER=tapers IMAGE=REGISTRY/tlm-jax:tpu CONFIG=tlm_440m WORKDIR=/shared/runs/tlm_440m \
#     launch/xpk.sh --data.path /shared/prepared --data.tokenizer /shared/tokenizer.json
#
# /shared is the mount point of a storage named by STORAGE (xpk storage create). Words after the
# script's name go to tlm train; words in XPK_WORDS (--zone Z --spot) go to xpk. The workload is
# restarted, and resumes, after status 75 and whenever a host is lost; 1 and 2 are mistakes.
set -euo pipefail

: "${CLUSTER:?name the cluster}" "${IMAGE:?name the image}" "${CONFIG:?name a config}" "${WORKDIR:?}"
read -r -a more <<<"${XPK_WORDS:-}"
words=$(printf ' %q' "$@")
exec xpk workload create --cluster "$CLUSTER" --workload "${NAME:-tlm-440m}" \
  --tpu-type "${TPU_TYPE:-v5litepod-16}" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" --storage "${STORAGE:-shared}" \
  --env JAX_COMPILATION_CACHE_DIR=/shared/compiled \
  --max-restarts 100 --restart-on-exit-codes 75 --termination-grace-period-seconds 120 \
  --command "exec tlm train --config $CONFIG --workdir $WORKDIR$words" ${more[@]+"${more[@]}"}
