#!/bin/bash
# A TPU slice of Google Cloud, waited for in the queue, then one process on each host.
#
#   NAME=moex ZONE=us-east5-a TYPE=v5litepod-16 WORKDIR=/mnt/shared/first \
#     launch/queued_resources.sh --config=configs/moe_1b.py
#
# Environment: gcloud, logged in, with a project; NAME, ZONE, TYPE; RUNTIME (of the TPU
# VM, v2-alpha-tpuv5-lite), SPOT=1 for spot capacity; SETUP, the command that puts moex
# and its .venv into ~/moex and mounts the folder that holds WORKDIR, on each host
# (Filestore, or a bucket by Cloud Storage FUSE): all hosts write one run directory.
# Resume: the same line; it takes the slice that is there, or a new one. A slice that is
# preempted or in maintenance gets SIGTERM and saves; this script queues for another.
set -u
name=${NAME:?} zone=${ZONE:?} type=${TYPE:?} workdir=${WORKDIR:?}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite} restarts=${RESTARTS:-10} failed=0
setup=${SETUP:-test -x ~/moex/.venv/bin/moex}
gcloud=(gcloud compute tpus)

state() {
  "${gcloud[@]}" queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)' 2>/dev/null
}

everywhere() {
  "${gcloud[@]}" tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

ready() { # a slice that is ACTIVE; waits in the queue for as long as that takes
  local now options=()
  [ -z "${SPOT:-}" ] || options+=(--spot)
  while true; do
    now=$(state)
    case "$now" in
      ACTIVE) return 0 ;;
      "") # there is none of this name
        "${gcloud[@]}" queued-resources create "$name" --node-id="$name" \
          --zone="$zone" --accelerator-type="$type" --runtime-version="$runtime" \
          "${options[@]}" || return 1
        ;;
      FAILED | SUSPENDED) # preempted, among others
        "${gcloud[@]}" queued-resources delete "$name" --zone="$zone" \
          --force --quiet || return 1
        ;;
    esac
    sleep 30
  done
}

# A secret of this job, so that no stranger can join.
token=${MOEX_JOB_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d " \n")}
train=$(printf '%q ' .venv/bin/moex train --distributed "--workdir=$workdir" "$@")
train="MOEX_JOB_TOKEN=$(printf %q "$token") $train"
for ((attempt = 0; attempt <= restarts; attempt++)); do
  [ "$attempt" = 0 ] || echo "queued_resources.sh: restart $attempt" >&2
  ready || exit 1
  if ! everywhere "$setup"; then
    failed=1
    [ "$attempt" = 0 ] && break # more likely a mistake in SETUP
    sleep 60                    # a slice that was just preempted is ACTIVE for a while
    continue
  fi
  # Exit code 0 is also that of a run that was asked to stop; the last line says which.
  everywhere "cd ~/moex && $train" | tee "$name.log"
  failed=${PIPESTATUS[0]}
  if [ "$failed" = 0 ] && ! grep -q "stopped at step" "$name.log"; then
    exit 0
  fi
  [ "$failed" = 2 ] && exit 2 # a mistake in the command
done
exit "$failed"
