#!/usr/bin/env bash
# A Slurm cluster of this one machine, without systemd or cgroups, to test against.
#
#   sudo apt-get install slurm-wlm munge
#   sudo bash tests/slurm/cluster.sh start DIR     # then: export SLURM_CONF=DIR/slurm.conf
#   sudo bash tests/slurm/cluster.sh stop DIR
set -euo pipefail
action=$1
dir=$(realpath -m -- "$2")
export SLURM_CONF=$dir/slurm.conf

case $action in
    start)
        mkdir -p "$dir/state" "$dir/spool"
        chmod 700 "$dir"
        dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none
        chmod 400 "$dir/munge.key"
        host=$(hostname -s)
        cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=60
ReturnToService=2
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
        munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
            --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
        slurmctld
        slurmd
        for _ in $(seq 30); do
            sinfo --noheader --format=%T 2>/dev/null | grep -qx idle && break
            sleep 1
        done
        sinfo
        ;;
    stop)
        for name in slurmd slurmctld munged; do
            kill "$(cat "$dir/$name.pid")" || true
        done
        ;;
    *)
        echo "usage: cluster.sh start|stop DIR" >&2
        exit 2
        ;;
esac
