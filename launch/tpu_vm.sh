#!/usr/bin/env bash
# Trains on a TPU VM slice, the same command on every host.
#
#   TPU=my-tpu ZONE=us-east5-a CONFIG=configs/tlm_440m.py WORKDIR=/mnt/shared/runs/tlm_440m \
#     launch/tpu_vm.sh --data.path /mnt/shared/prepared --data.tokenizer /mnt/shared/tokenizer.json
#
# /mnt/shared is storage that all hosts have mounted, such as Filestore or a bucket with gcsfuse.
# Needs gcloud, and Python 3.12 on the hosts. Copies this folder to every host, installs it and trains
# until the run is complete. Status 1 and 2 are mistakes that must be fixed first; after any other
# status the command is repeated and resumes from the last checkpoint.
set -euo pipefail

: "${TPU:?name the TPU}" "${ZONE:?name its zone}" "${CONFIG:?}" "${WORKDIR:?}"
on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "$1"; }

archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU":/tmp/tlm-jax.tar.gz --zone "$ZONE" --worker all
on_all 'mkdir -p ~/tlm-jax && tar xzf /tmp/tlm-jax.tar.gz -C ~/tlm-jax &&
  cd ~/tlm-jax && python3.12 -m venv .venv && .venv/bin/pip install --quiet --editable ".[tpu]"'

words=$(printf ' %q' "$@")
while true; do
  status=0
  # The TPU's metadata server tells JAX about the other hosts.
  on_all "cd ~/tlm-jax && .venv/bin/python train.py --config $CONFIG --workdir $WORKDIR \
    --processes.join always$words" || status=$?
  case $status in
    0 | 1 | 2) exit "$status" ;;
    *) echo "status $status: resuming from the last checkpoint" >&2; sleep 30 ;;
  esac
done
