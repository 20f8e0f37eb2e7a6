#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# dom0's first process: starts the toolstack's daemons, then waits for the machine's one command.
xen=$(echo /usr/lib/xen-[0-9]*/bin)
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$xen HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
for where in /tmp /run /var/lib/xenstored; do
    mkdir -p $where
    mount -t tmpfs tmpfs $where
done
mkdir -p /dev/shm /dev/pts /run/xen /var/run/xen /var/log/xen /var/lib/xen/dump
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t xenfs xenfs /proc/xen
# Xen's own hotplug scripts compare a lock's file with /dev/stdin, again and again if there is none.
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ip link set lo up

xenstored || echo "xenstored did not start"
tries=0
until xenstore-read -s / >/dev/null 2>&1 || [ $tries -ge 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
xen-init-dom0
xenconsoled --log=guest --log-dir=/var/log/xen
exec /bin/sh /opt/xenlab/runner.sh
