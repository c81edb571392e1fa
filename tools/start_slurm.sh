#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, in a folder of its own, for trying the suite on it.
#
#   eval "$(tools/start_slurm.sh start [FOLDER])"   points this shell's SLURM commands at it
#   tools/start_slurm.sh stop [FOLDER]
#
# Needs Debian's packages slurm-wlm and munge. Nothing outside the folder is touched: keys, sockets,
# logs and state lie in it, and the ports are free ones. Without accounting and without cgroups.
set -euo pipefail

fail() {
  echo "start_slurm: $*" >&2
  exit 2
}

action="${1:-}"
folder="${2:-_build/slurm}"
case "$action" in
  start | stop) ;;
  *) fail "expected start or stop; found ${action:-nothing}" ;;
esac
# A second start must not find its own srun.
PATH="${PATH//"$(realpath -m "$folder")/bin:"/}:/usr/sbin:/sbin"

stop_daemon() {
  local pid
  pid="$(cat "$folder/$1.pid" 2>/dev/null)" || return 0
  # A number that the system has given to another process since is left alone.
  [ "$(ps -o comm= -p "$pid" 2>/dev/null)" = "$1" ] || return 0
  kill "$pid"
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  fail "$1 (process $pid): expected it to end in ten seconds; it did not. Its log is $folder/$1.log"
}

stop_all() {
  # Jobs outlive the daemons.
  if [ -f "$folder/slurmctld.pid" ]; then
    SLURM_CONF="$(cd "$folder" && pwd)/slurm.conf" timeout 10 scancel --partition=main || true
  fi
  for name in slurmd slurmctld munged; do stop_daemon "$name"; done
}

if [ "$action" = stop ]; then
  stop_all
  exit 0
fi

missing=()
for name in munged mungekey slurmctld slurmd sbatch squeue srun scontrol sinfo; do
  command -v "$name" >/dev/null 2>&1 || missing+=("$name")
done
[ "${#missing[@]}" = 0 ] ||
  fail "expected SLURM's and munge's programs; found no ${missing[*]}." \
    "Install them: apt-get install slurm-wlm munge"
[ "$(id -u)" = 0 ] ||
  fail "expected root, for SLURM's node daemon; found $(id -un). Run it as root or in a container."

mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
# A socket's path ends at 107 characters.
[ "${#folder}" -le 90 ] || fail "$folder: expected at most 90 characters; found ${#folder}"
stop_all
mkdir -p "$folder/state" "$folder/spool"
[ -f "$folder/munge.key" ] || mungekey --create --keyfile "$folder/munge.key"

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
host="$(hostname -s)"
# nproc takes these for the number of cores.
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)"
memory="$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)"
cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
KillWait=5
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

# The folder may be another user's, as a checkout is; munge refuses that without --force.
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
  --seed-file="$folder/munged.seed" 2>>"$folder/munged.err" || {
  cat "$folder/munged.err" >&2
  fail "munged did not start; its log is $folder/munged.log"
}
slurmctld -f "$folder/slurm.conf" || fail "slurmctld did not start; its log is $folder/slurmctld.log"
slurmd -f "$folder/slurm.conf" || fail "slurmd did not start; its log is $folder/slurmd.log"

# Snakemake's job steps drop SLURM_CONF before they call srun.
mkdir -p "$folder/bin"
cat >"$folder/bin/srun" <<STEP
#!/bin/sh
SLURM_CONF='$folder/slurm.conf' exec $(command -v srun) "\$@"
STEP
chmod +x "$folder/bin/srun"

export SLURM_CONF="$folder/slurm.conf"
for _ in $(seq 150); do
  if [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ]; then
    echo "export SLURM_CONF='$SLURM_CONF' PATH='$folder/bin':\"\$PATH\""
    exit 0
  fi
  sleep 0.2
done
stop_all
fail "expected an idle node within 30 seconds; found '$(sinfo -h -o %T 2>&1 || true)'." \
  "The logs are in $folder"
