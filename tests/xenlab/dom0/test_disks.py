# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest whose disk is served by dom0 (blkback on a loop device) is migrated by xl: its requests
neither fail nor read anything but what was written.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.labs import until
from tests.xenlab.dom0.daemons import daemons
from tests.xenlab.dom0.devices import check_disk, guest_with_disk
from tests.xenlab.dom0.host import (
    PAGING,
    Host,
    arrived,
    check_heartbeat,
    host,
    running,
)

__all__ = ["host", "running"]

LEFT_S = 12
"""Of the 32 s for which dom0 waits for a missing page."""


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
