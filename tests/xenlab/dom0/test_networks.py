# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that uses a disk and a network, which dom0 serves (blkback and netback), is migrated by
xl.  No request to the disk fails, and a TCP connection between dom0 and the guest survives.
"""

from __future__ import annotations

import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.xenlab.dom0.daemons import Daemons, daemons
from tests.xenlab.dom0.devices import check_disk, guest_with_devices
from tests.xenlab.dom0.guests import Guest
from tests.xenlab.dom0.host import (
    PAGING,
    SLOW,
    Host,
    arrived,
    check_heartbeat,
    host,
    running,
)
from tests.xenlab.dom0.traffic import Traffic
from tests.xenlab.dom0.waiting import until

__all__ = ["host", "running"]

SHORT_S, LONG_S = 10, 40
"""Silences that are shorter and longer than the time for which dom0 waits for a missing page."""


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


@pytest.mark.hypervisors("paging")
def test_xen_s_own_hotplug_scripts_end_in_time(running: Host) -> None:
    """dom0 has one CPU, and libxl kills a script after 40 s."""
    with guest_with_devices("net2", xen_s_own_scripts=True), closing(Traffic()) as traffic:
        traffic.wait_for_answers()
        output = running.migrate("net2", XEN_POSTCOPY_STRATEGY="postcopy")
        assert "because of timeout" not in output
        now = arrived("net2")
        check_devices(now, traffic)
        running.wait_for("completed")
        check_devices(now, traffic)
        check_heartbeat(now)
        running.check_clean("net2")


def silence(pair: Daemons, silent_s: float) -> float:
    """Stop the sender for so long.  Returns the time that was left for I/O to missing pages at the
    end, as ``list`` shows it.
    """
    pair.send_signal("sender", signal.SIGSTOP)
    began = time.monotonic()
    try:
        until(lambda: pair.line("receiver")["io_fails_in_s"] is not None, "no loss is noticed")
        until(lambda: time.monotonic() > began + silent_s, "no time passes")
        line = pair.line("receiver")
        assert line["outstanding"] > 0
        left_s: float = line["io_fails_in_s"]
        return left_s
    finally:
        pair.send_signal("sender", signal.SIGCONT)


@pytest.mark.hypervisors("paging")
def test_a_silent_link_costs_at_most_the_requests_that_list_announces(
    host: Host, tmp_path: Path
) -> None:
    """A short silence costs nothing.  A long one may cost requests, when the time has passed that
    ``list`` counts down.  Nothing is read but what was written, and the guest and its connection
    continue.
    """
    with (
        guest_with_devices("net3"),
        closing(Traffic()) as traffic,
        daemons(tmp_path, SLOW) as pair,
    ):
        here = Host(tmp_path, host.xen)
        here.migrate_but_few_pages("net3")
        now = arrived("net3")
        assert silence(pair, SHORT_S) > 0
        traffic.wait_for_answers()
        check_disk(now)
        assert silence(pair, LONG_S) == 0
        traffic.check(now)
        here.complete()
        use = now.wait_for_requests(40)
        print(f"after a silence of {LONG_S} s: {use}")
        assert use.mismatches == 0
        assert now.wait_for_requests(40).errors == use.errors
        traffic.check(now)
        check_heartbeat(now)
        here.check_clean("net3")
