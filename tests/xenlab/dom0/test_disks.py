# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest whose disk is served by dom0 (blkback on a loop device) is migrated by xl: its requests
neither fail nor read anything but what was written.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from migrate.errors import MigrationError
from sender.switchover import HOT_PAGES
from tests.support.pages import memory_of
from tests.xenlab.dom0.daemons import daemons
from tests.xenlab.dom0.devices import check_disk, guest_with_disk
from tests.xenlab.dom0.host import (
    PAGING,
    PATCHED,
    SLOW,
    Host,
    arrived,
    check_heartbeat,
    host,
    running,
)
from tests.xenlab.dom0.waiting import until
from xenbackend.libxenctrl.hypervisor import XenHypervisor

__all__ = ["host", "running"]

OF_XEN = 20
"""The pages of a guest with one vCPU that belong to the pinned set, at most."""
LEFT_S = 12
"""Of the 32 s for which dom0 waits for a missing page."""
ENDS_OF_PRECOPY = {"stop-and-copy": "downtime_target_ms = 3600000", "postcopy": 'bandwidth = "8M"'}
"""How precopy ends, with the configuration for that.  An hour is enough for any rest.  Postcopy
follows if an administrator does not let the policy choose.
"""


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


@PAGING
def test_a_guest_with_a_disk_is_not_migrated_without_a_toolstack(
    host: Host, tmp_path: Path
) -> None:
    with guest_with_disk("disk4") as made, daemons(tmp_path) as pair:
        to = f"127.0.0.1:{pair.port}"
        with pytest.raises(MigrationError, match=r"only its toolstack can move \(vbd\)"):
            pair.ask("sender", command="migrate", domain="disk4", destination=to)
        check_disk(made)


@PATCHED
@pytest.mark.parametrize("held", [0, 1000])
def test_pages_that_dom0_has_mapped_are_not_sent_in_the_downtime(running: Host, held: int) -> None:
    with guest_with_disk("disk3") as made, running.xen.open(made.domid) as domain:
        there = memory_of(domain)
        mapped = np.setdiff1d(there, domain.pinned(there))[-2000 : held - 2000]
        with closing(XenHypervisor()) as dom0, dom0.open(made.domid).map_pages(mapped):
            assert len(domain.held(mapped)) == held
            running.migrate("disk3", XEN_POSTCOPY_STRATEGY="postcopy")
            switchover = running.details("sender")["switchover"]
        print(f"{held} pages are mapped: {switchover}")
        assert switchover["pages"] <= HOT_PAGES + OF_XEN
        running.wait_for("completed")
        now = arrived("disk3")
        check_disk(now)
        check_heartbeat(now)


@pytest.mark.hypervisors("paging")
def test_a_link_that_is_silent_for_20_s_costs_no_request(host: Host, tmp_path: Path) -> None:
    """dom0 waits for 32 s for a missing page, and then the guest gets an I/O error."""
    with guest_with_disk("disk2"), daemons(tmp_path, SLOW) as pair:
        here = Host(tmp_path, host.xen)
        here.migrate_but_few_pages("disk2")
        pair.send_signal("sender", signal.SIGSTOP)
        try:
            until(lambda: pair.line("receiver")["io_fails_in_s"] is not None, "no loss is noticed")
            until(lambda: pair.line("receiver")["io_fails_in_s"] < LEFT_S, "no time passes")
            assert pair.line("receiver")["outstanding"] > 0
        finally:
            pair.send_signal("sender", signal.SIGCONT)
        now = arrived("disk2")
        check_disk(now)
        here.complete()
        check_disk(now)
        check_heartbeat(now)


@PATCHED
@pytest.mark.parametrize("end", ENDS_OF_PRECOPY)
def test_hybrid_costs_no_request_however_precopy_ends(host: Host, tmp_path: Path, end: str) -> None:
    configuration = f"[migration]\n{ENDS_OF_PRECOPY[end]}\n"
    with guest_with_disk("disk5"), daemons(tmp_path, configuration) as pair:
        here = Host(tmp_path, host.xen)
        with ThreadPoolExecutor() as pool:
            migrating = pool.submit(here.migrate, "disk5", XEN_POSTCOPY_STRATEGY="hybrid")
            if end == "postcopy":
                here.wait_for_precopy()
                pair.ask("sender", command="postcopy-now", migration="disk5")
            migrating.result()
        now = arrived("disk5")
        check_disk(now)
        here.wait_for("completed")
        check_disk(now)
        check_heartbeat(now)
        here.check_clean("disk5")
        assert bool(here.details("sender")["switchover"]["missing_pages"]) == (end == "postcopy")
