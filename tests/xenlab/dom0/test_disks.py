# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest whose disk is served by dom0 (blkback on a loop device) is migrated by xl: its requests
neither fail nor read anything but what was written.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.labs import until
from tests.xenlab.dom0.daemons import daemons
from tests.xenlab.dom0.guests import STEPS_PER_S, Guest, guest, run
from tests.xenlab.dom0.host import (
    PAGING,
    Host,
    arrived,
    check_heartbeat,
    host,
    running,
)

__all__ = ["host", "running"]

BLOCKS = 4096
"""The blocks that ``guest/disk.h`` uses."""
SCRIPT = """#!/bin/sh
# Xen's own script takes half a minute in an emulated dom0.  The device is a loop device already.
if [ "$1" = add ]; then
    device=$(xenstore-read "$XENBUS_PATH/params")
    xenstore-write "$XENBUS_PATH/physical-device" "7:${device#/dev/loop}" \\
        "$XENBUS_PATH/physical-device-path" "$device" "$XENBUS_PATH/hotplug-status" connected
fi
"""
PERSISTENT = Path("/sys/module/xen_blkback/parameters/feature_persistent")
LEFT_S = 12
"""Of the 32 s for which dom0 waits for a missing page."""


@contextmanager
def guest_with_disk(name: str) -> Iterator[Guest]:
    """Without persistent grants each request names the page that the guest reads or writes."""
    PERSISTENT.write_text("0")
    image, script = Path(f"/tmp/{name}.disk"), Path("/tmp/block")
    script.write_text(SCRIPT)
    script.chmod(0o755)
    with image.open("wb") as file:
        file.truncate(BLOCKS * 4096)
    device = run("losetup", "--find", "--show", str(image)).strip()
    disk = f'disk = ["format=raw,vdev=xvda,access=rw,script={script},target={device}"]\n'
    try:
        with guest(name, extra=disk, options=f"rate={STEPS_PER_S} disk=4 buffers=512") as made:
            made.wait_for_requests(40)
            yield made
    finally:
        run("losetup", "--detach", device)
        image.unlink()


def check_disk(guest: Guest) -> None:
    use = guest.wait_for_requests(40)
    assert (use.errors, use.mismatches) == (0, 0)


@PAGING
@pytest.mark.parametrize("strategy", ["hybrid", "postcopy"])
def test_a_guest_with_a_disk_arrives(running: Host, strategy: str) -> None:
    with guest_with_disk("disk1"):
        running.migrate("disk1", XEN_POSTCOPY_STRATEGY=strategy)
        now = arrived("disk1")
        check_disk(now)
        running.wait_for("completed")
        check_disk(now)
        check_heartbeat(now)
        running.check_clean("disk1")


@pytest.mark.hypervisors("paging")
def test_a_link_that_is_silent_for_20_s_costs_no_request(host: Host, tmp_path: Path) -> None:
    """dom0 waits for 32 s for a missing page, and then the guest gets an I/O error."""
    with guest_with_disk("disk2"), daemons(tmp_path, '[migration]\nbandwidth = "2M"\n') as pair:
        here = Host(tmp_path, host.xen)
        here.migrate("disk2", XEN_POSTCOPY_STRATEGY="postcopy")
        here.wait_for("postcopy")
        pair.send_signal("sender", signal.SIGSTOP)
        try:
            until(lambda: pair.line("receiver")["io_fails_in_s"] is not None, "no loss is noticed")
            until(lambda: pair.line("receiver")["io_fails_in_s"] < LEFT_S, "no time passes")
            assert pair.line("receiver")["outstanding"] > 0
        finally:
            pair.send_signal("sender", signal.SIGCONT)
        now = arrived("disk2")
        check_disk(now)
        here.wait_for("completed")
        check_disk(now)
        check_heartbeat(now)
