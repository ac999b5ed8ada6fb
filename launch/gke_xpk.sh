#!/bin/bash
# TPU slices of a GKE cluster, by xpk: one process on each host, JobSet restarts them.
#
#   CLUSTER=mine TYPE=v5litepod-16 IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/moex \
#     launch/gke_xpk.sh first --config=configs/moe_1b.py --workdir=/shared/first
#
# Environment: xpk and gcloud, logged in, with a project and ZONE; a cluster made by
# `xpk cluster create`; IMAGE, a container with moex[tpu] where `moex` is on the PATH;
# SLICES (1), RESTARTS (10). --workdir lies on a volume that every pod mounts, attached
# once by `xpk storage attach NAME --cluster=... --type=gcpfilestore --auto-mount=true
# --mount-point=/shared --readonly=false` (or --type=gcsfuse).
# Resume: the same line; SLICES and TYPE may change. The first word names the workload.
# When a host is lost its pod fails, the others end, and JobSet starts all again.
set -u
workload=${1:?a name for the workload}
shift
train=$(printf '%q ' moex train --distributed "$@")

# An old workload of this name is in the way of a new one.
xpk workload delete --cluster="${CLUSTER:?}" --workload="$workload" --force || true
exec xpk workload create \
  --cluster="$CLUSTER" \
  --workload="$workload" \
  --tpu-type="${TYPE:?}" \
  --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?}" \
  --max-restarts="${RESTARTS:-10}" \
  --termination-grace-period-seconds=300 \
  ${ZONE:+--zone="$ZONE"} \
  --command="$train"
