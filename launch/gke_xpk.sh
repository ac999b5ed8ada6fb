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
# When a host is lost its pod fails, the others end, and JobSet starts all again; a pod
# that is to go gets SIGTERM, all save, and JobSet starts all again. Exit code 2, a mistake
# in the command, ends it: xpk's JobSet starts again on 42, 127 to 255, and 1 by a flag.
set -u
workload=${1:?a name for the workload}
shift
# A secret of this job, so that no stranger can join. Who may read the cluster's pods sees
# it in their command.
token=${MOEX_JOB_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d " \n")}
train="MOEX_JOB_TOKEN=$(printf %q "$token") $(printf '%q ' moex train --distributed "$@")"
# In each pod, one line in a subshell of xpk that gets the SIGTERM. Exit code 0 is also
# that of a run that was asked to stop: to JobSet it would be the end of the work.
pod="$train & moex=\$!; asked=; trap 'asked=1; kill -TERM \$moex' TERM; wait \$moex; \
code=\$?; [ -z \"\$asked\" ] || { wait \$moex; code=\$?; }; \
[ \"\$asked:\$code\" != 1:0 ] || code=42; exit \$code"

# An old workload of this name is in the way of a new one.
xpk workload delete --cluster="${CLUSTER:?}" --workload="$workload" --force || true
exec xpk workload create \
  --cluster="$CLUSTER" \
  --workload="$workload" \
  --tpu-type="${TYPE:?}" \
  --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?}" \
  --max-restarts="${RESTARTS:-10}" \
  --restart-on-exit-codes=1 \
  --termination-grace-period-seconds=300 \
  ${ZONE:+--zone="$ZONE"} \
  --command="$pod"
