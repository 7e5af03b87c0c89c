#!/bin/bash
# First process of a node of tests/support/slurm.py, in namespaces of its own: NAME ADDRESS GATEWAY FOLDER.
# Its children are the node: when it is killed, so are they.
name=$1 address=$2 gateway=$3 folder=$4
hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
# No name server is reachable: reverse look-ups of ranks would each wait for one.
mount --bind "$folder/resolv.conf" "$(readlink -f /etc/resolv.conf)"
[ -e /etc/nsswitch.conf ] && mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
for _ in $(seq 500); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.02; done
ip addr add "$address/24" dev eth0 && ip link set eth0 up && ip route add default via "$gateway"
slurmd -D -s -N "$name" >/dev/null 2>&1 &
while kill -0 $! 2>/dev/null; do wait; sleep 0.1; done
