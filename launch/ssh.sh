#!/bin/bash
# Plain machines that SSH reaches: one process on each, all started again when one fails.
#
#   HOSTS="node1 node2" launch/ssh.sh --config=configs/moe_1b.py --workdir=/shared/first
#
# Environment: HOSTS; the first one is the coordinator, by a name that all others know.
# FOLDER (this one): the repository with its .venv, the same path on all hosts. PORT
# (8476), open between them. RESTARTS (10). SSH without passwords. --workdir is a folder
# that all hosts share (NFS). Data may lie on disks of their own if it is the same.
# Resume: the same line, with other HOSTS if need be. Ctrl-C or SIGTERM saves on all; exit
# code 143 then. SIGTERM to a process itself saves, and all are started again.
set -uo pipefail
read -ra hosts <<<"${HOSTS:?names of the hosts, such as HOSTS="node1 node2"}"
folder=${FOLDER:-$PWD} port=${PORT:-8476} restarts=${RESTARTS:-10} asked=0
log=$(mktemp)
# A secret of this job, so that no stranger can join; hosts read it where nobody sees it.
token=${MOEX_JOB_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d " \n")}
# The file is at home, where nobody else can write; all hosts may share one home.
pidfile() { echo "\$HOME/.moex-ssh-$port-$1.pid"; }
trap 'rm -f "$log"' EXIT

# shellcheck disable=SC2329
stop() { # SIGTERM to one process: it tells the others, and all save at one step
  asked=1
  # shellcheck disable=SC2029
  ssh "${hosts[0]}" "kill -TERM \$(cat $(pidfile 0))"
}
trap stop INT TERM

one() { # the process of host number $1
  local train
  train=$(printf '%q ' .venv/bin/moex train "${@:2}" \
    "--coordinator=${hosts[0]}:$port" "--num-processes=${#hosts[@]}" "--process-id=$1")
  # A session of its own: Ctrl-C comes to this script alone.
  setsid ssh -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "${hosts[$1]}" \
    "read -r MOEX_JOB_TOKEN; export MOEX_JOB_TOKEN; cd $(printf '%q' "$folder") &&" \
    "(umask 077 && echo \$\$ >$(pidfile "$1")) && exec $train" <<<"$token" |
    tee -a "$log"
}

for ((attempt = 0; attempt <= restarts; attempt++)); do
  [ "$attempt" = 0 ] || echo "ssh.sh: restart $attempt of $restarts" >&2
  processes=()
  : >"$log"
  for i in "${!hosts[@]}"; do
    one "$i" "$@" &
    processes+=($!)
  done
  failed=0 mistake=1
  for i in "${!hosts[@]}"; do
    wait "${processes[i]}"
    code=$?
    while kill -0 "${processes[i]}" 2>/dev/null; do # a signal ended the wait
      wait "${processes[i]}"
      code=$?
    done
    [ "$code" = 0 ] && continue
    echo "ssh.sh: ${hosts[i]} ended with exit code $code" >&2
    failed=$code
    [ "$code" = 2 ] || mistake=0
  done
  # Exit code 0 is also that of a run that was asked to stop; the last line says which.
  if [ "$failed" = 0 ]; then
    grep -q "stopped at step" "$log" || exit 0
    failed=143 mistake=0
  fi
  [ "$mistake" = 1 ] && exit 2
  [ "$asked" = 1 ] && exit "$failed"
  sleep 5
done
exit "$failed"
