#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# From the kernel to dom0's disks: the root file system, which is thrown away with the machine, and
# the Python packages.  The lab's own programs come from here: nothing of the host is mounted yet.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /lib/order); do
    /bin/busybox insmod "/lib/$module"
done
tries=0
until [ -b /dev/vdb ] || [ $tries -ge 100 ]; do
    tries=$((tries + 1))
    /bin/busybox sleep 0.1
done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox poweroff -f
/bin/busybox mkdir -p /root/mnt/packages /root/opt
/bin/busybox mount -t ext4 -o ro /dev/vdb /root/mnt/packages
/bin/busybox cp -r /xenlab /root/opt
init="/bin/sh /opt/xenlab/init.sh"
if /bin/busybox grep -q xenlab=systemd /proc/cmdline; then
    init=/lib/systemd/systemd
    echo 'XENCONSOLED_ARGS="--log=guest --log-dir=/var/log/xen"' >> /root/etc/default/xen
    /bin/busybox mkdir -p /root/var/log/xen
    units=/root/etc/systemd/system
    /bin/busybox mkdir -p $units/multi-user.target.wants
    /bin/busybox cp /xenlab/xenlab.service $units/
    /bin/busybox ln -sf ../xenlab.service $units/multi-user.target.wants/
fi
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc /sys
exec /bin/busybox switch_root /root $init
