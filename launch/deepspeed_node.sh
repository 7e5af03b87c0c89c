#!/bin/bash
# One deepspeed launcher on one node of a step: PYTHON HOSTFILE MASTER_ADDR MASTER_PORT SCRIPT OPTIONS...
python=$1 hosts=$2 address=$3 port=$4
shift 4
# Ignored here and in what is started from here; the ranks listen for themselves.
trap '' USR1 USR2
exec "$python" -m deepspeed.launcher.runner --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" \
  --master_addr "$address" --master_port "$port" "$@"
