# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks and networks of guests, which dom0 serves by blkback and netback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.xenlab.dom0.guests import STEPS_PER_S, Guest, guest, run

BLOCKS = 4096
"""The blocks that ``guest/disk.h`` uses."""
DISK_SCRIPT = """#!/bin/sh
# Xen's own script takes half a minute in an emulated dom0.  The device is a loop device already.
if [ "$1" = add ]; then
    device=$(xenstore-read "$XENBUS_PATH/params")
    xenstore-write "$XENBUS_PATH/physical-device" "7:${device#/dev/loop}" \\
        "$XENBUS_PATH/physical-device-path" "$device" "$XENBUS_PATH/hotplug-status" connected
fi
"""
NETWORK_SCRIPT = """#!/bin/sh
# As Xen's vif-bridge, without what takes time in an emulated dom0.
if [ "$1" = online ]; then
    ip link set "$vif" master $(xenstore-read "$XENBUS_PATH/bridge") up
    xenstore-write "$XENBUS_PATH/hotplug-status" connected
fi
"""
PERSISTENT = Path("/sys/module/xen_blkback/parameters/feature_persistent")
BRIDGE = "xenbr"
HOST_ADDRESS, GUEST_NUMBER = "10.99.0.1", 2
"""The guest's number is the last byte of its address (``guest/net.h``)."""
GUEST_ADDRESS = f"10.99.0.{GUEST_NUMBER}"
USES_DEVICES = f"rate={STEPS_PER_S} pages=4000 disk=4 buffers=256"
"""The guest's program leaves memory to the drivers."""


def script(name: str, text: str) -> Path:
    """Write a hotplug script for libxl."""
    path = Path("/tmp") / name
    path.write_text(text)
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def image(name: str) -> Iterator[Path]:
    """Yield a file of zeros for a disk."""
    path = Path(f"/tmp/{name}.disk")
    with path.open("wb") as file:
        file.truncate(BLOCKS * 4096)
    try:
        yield path
    finally:
        path.unlink()


@contextlib.contextmanager
def disk(name: str, vdev: str = "xvda") -> Iterator[str]:
    """Yield the specification of a disk for xl.  Without persistent grants each request names the
    page that the guest reads or writes.
    """
    PERSISTENT.write_text("0")
    with image(name) as path:
        device = run("losetup", "--find", "--show", str(path)).strip()
        target = f"script={script('block', DISK_SCRIPT)},target={device}"
        try:
            yield f"format=raw,vdev={vdev},access=rw,{target}"
        finally:
            run("losetup", "--detach", device)


@contextlib.contextmanager
def bridge() -> Iterator[str]:
    """Yield the name of a bridge with dom0's address."""
    run("ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0")
    try:
        run("ip", "address", "add", f"{HOST_ADDRESS}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        yield BRIDGE
    finally:
        run("ip", "link", "delete", BRIDGE)


def vif(number: int = 0, *, own_script: bool = True) -> str:
    """Return the specification of a network interface for xl."""
    use = f",script={script('vif', NETWORK_SCRIPT)}" if own_script else ""
    return f"mac=00:16:3e:00:00:{number:02x},bridge={BRIDGE}{use}"


@contextlib.contextmanager
def guest_with_disk(name: str) -> Iterator[Guest]:
    with disk(name) as specification:
        options = f"rate={STEPS_PER_S} disk=4 buffers=512"
        with guest(name, extra=f'disk = ["{specification}"]\n', options=options) as made:
            made.wait_for_requests(40)
            yield made


@contextlib.contextmanager
def guest_with_devices(name: str, *, xen_s_own_scripts: bool = False) -> Iterator[Guest]:
    """Yield a guest that uses a disk and a network."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(bridge())
        if xen_s_own_scripts:
            file = stack.enter_context(image(name))
            specification = f"format=raw,vdev=xvda,access=rw,target={file}"
        else:
            specification = stack.enter_context(disk(name))
        network = vif(own_script=not xen_s_own_scripts)
        made = stack.enter_context(
            guest(
                name,
                extra=f'disk = ["{specification}"]\nvif = ["{network}"]\n',
                options=f"{USES_DEVICES} net={GUEST_NUMBER}",
            )
        )
        made.wait_for_requests(40)
        made.wait_for_network()
        yield made


def check_disk(guest: Guest) -> None:
    use = guest.wait_for_requests(40)
    assert (use.errors, use.mismatches) == (0, 0)
