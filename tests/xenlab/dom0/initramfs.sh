#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# From the kernel to dom0's disk.  The folders of the machine outside come over 9p: the working tree,
# the parts, and "io", through which commands and their results pass.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /lib/order); do
    /bin/busybox insmod "/lib/$module"
done
tries=0
until [ -b /dev/vda ] || [ $tries -ge 100 ]; do
    tries=$((tries + 1))
    /bin/busybox sleep 0.1
done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox poweroff -f
options=trans=virtio,version=9p2000.L,msize=262144
/bin/busybox mount -t 9p -o $options io /root/mnt/io
for share in tree parts; do
    # Nobody changes them meanwhile, and each Python that starts reads a thousand files.
    /bin/busybox mount -t 9p -o ro,$options,cache=loose $share /root/mnt/$share
done
init="/bin/sh /mnt/tree/tests/xenlab/dom0/init.sh"
if /bin/busybox grep -q xenlab=systemd /proc/cmdline; then
    init=/lib/systemd/systemd
    echo 'XENCONSOLED_ARGS="--log=guest --log-dir=/var/log/xen"' >> /root/etc/default/xen
    /bin/busybox mkdir -p /root/var/log/xen
    units=/root/etc/systemd/system
    /bin/busybox cp /root/mnt/tree/tests/xenlab/dom0/xenlab.service $units/
    /bin/busybox mkdir -p $units/multi-user.target.wants
    /bin/busybox ln -sf ../xenlab.service $units/multi-user.target.wants/
fi
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc /sys
exec /bin/busybox switch_root /root $init
