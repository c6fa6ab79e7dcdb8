#!/usr/bin/env bash
# A Slurm of one node in the directory $1, run by the current user, until this script is told to end.
# Says "ready" when it takes jobs; SLURM_CONF=$1/slurm.conf reaches it.
set -euo pipefail
directory=$1
host=$(hostname -s)
mkdir -p "$directory"/{state,spool}
mapfile -t ports < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')
cat >"$directory/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES
EOF
export SLURM_CONF=$directory/slurm.conf
(umask 077 && head -c 128 /dev/urandom >"$directory/munge.key")
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 0' TERM
munged --foreground --force --key-file "$directory/munge.key" --socket "$directory/munge.socket" \
  --pid-file "$directory/munge.pid" --log-file "$directory/munge.log" --seed-file "$directory/munge.seed" &
until [[ -S $directory/munge.socket ]]; do sleep 0.1; done
slurmctld -D &>"$directory/slurmctld.log" &
slurmd -D -N "$host" &>"$directory/slurmd.log" &
until sinfo -h -o %t 2>/dev/null | grep -q idle; do sleep 0.2; done
echo ready
wait
