# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that uses a disk and a network, which dom0 serves (blkback and netback), is migrated by
xl.  No request to the disk fails, and a TCP connection between dom0 and the guest survives.
"""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.xenlab.dom0.devices import check_disk, guest_with_devices
from tests.xenlab.dom0.guests import Guest
from tests.xenlab.dom0.host import (
    PAGING,
    Host,
    arrived,
    check_heartbeat,
    host,
    running,
)
from tests.xenlab.dom0.traffic import Traffic

__all__ = ["host", "running"]


def check_devices(guest: Guest, traffic: Traffic) -> None:
    traffic.check(guest)
    check_disk(guest)


@PAGING
@pytest.mark.parametrize("strategy", ["hybrid", "postcopy"])
def test_a_guest_with_a_disk_and_a_network_arrives(running: Host, strategy: str) -> None:
    with guest_with_devices("net1"), closing(Traffic()) as traffic:
        traffic.wait_for_answers()
        running.migrate("net1", XEN_POSTCOPY_STRATEGY=strategy)
        now = arrived("net1")
        check_devices(now, traffic)
        running.wait_for("completed")
        check_devices(now, traffic)
        check_heartbeat(now)
        running.check_clean("net1")
