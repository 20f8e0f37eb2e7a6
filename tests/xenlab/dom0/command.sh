#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# With the toolstack up: the one command that this machine was booted for, and what is to come back of it.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/xen-4.17/bin HOME=/root LANG=C.UTF-8
echo "xenlab: toolstack is up"

cd /mnt/tree
export LAB_OUT=/mnt/io/out
export PYTHONPATH=/mnt/tree:/mnt/tree/.venv/lib/python3.11/site-packages PYTHONDONTWRITEBYTECODE=1
sh /mnt/io/command > /mnt/io/output 2>&1
status=$?
cp /var/log/xen/guest-*.log /mnt/io/out/ 2>/dev/null
xl dmesg > /mnt/io/hypervisor.log 2>&1
echo $status > /mnt/io/status
sync
echo o > /proc/sysrq-trigger
sleep 60
