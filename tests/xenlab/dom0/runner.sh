#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# With the toolstack up: the process that runs the machine's one command.
xen=$(echo /usr/lib/xen-[0-9]*/bin)
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$xen HOME=/root LANG=C.UTF-8
export PYTHONPATH=/mnt/packages PYTHONDONTWRITEBYTECODE=1
exec python3 /opt/xenlab/runner.py
