# SPDX-License-Identifier: GPL-2.0-or-later
"""From a host with Debian 12 (Xen 4.17 with memory paging) to one with Debian 13 (its own Xen 4.20,
without).  Postcopy is refused with the reason, and precopy moves the guest: ours or Xen's own.

The daemons are those of the working tree.  The clocks of the hosts differ, because each has booted
by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.xenlab.dom0.daemons import TREE
from tests.xenlab.dom0.guests import STEPS_PER_S, guest
from tests.xenlab.dom0.host import check_clock
from tests.xenlab.dom0.package import CONFIG, Host
from tests.xenlab.dom0.pair import Pair, both, check_moved, configure, on_both
from tests.xenlab.dom0.runner import PACKAGES
from tests.xenlab.dom0.waiting import until

pytestmark = pytest.mark.hypervisors("12-to-13")
OF_TREE = "/usr/local/sbin/of-tree"
HELPER = "/usr/local/sbin/xen-postcopy-xl-helper"


def install(host: Host, number: int) -> None:
    """Name the helper of the working tree to xl, and start the daemons."""
    host.write(
        OF_TREE, f'#!/bin/sh\ncd {TREE} && PYTHONPATH={TREE}:{PACKAGES} exec python3 -m "$@"\n'
    )
    host.write(HELPER, f'#!/bin/sh\nexec {OF_TREE} migrate.xl.helper "$@"\n')
    host.run("chmod", "+x", OF_TREE, HELPER)
    host.run("mkdir", "-p", CONFIG.rpartition("/")[0])
    configure(host, number, HELPER)
    for role in ("sender", "receiver"):
        host.run("systemd-run", "--unit", f"test-{role}", OF_TREE, "migrate.cli", role)

    def listens() -> bool:
        return all(
            "listening at" in host.run("journalctl", "-u", f"test-{role}")
            for role in ("sender", "receiver")
        )

    until(listens, f"the daemons of {host.name} do not start")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    hosts = both()
    on_both(hosts, install)
    yield hosts
    for host in hosts:
        host.run("systemctl", "stop", "test-sender", "test-receiver")
        print(host.run("journalctl", "-u", "test-*", ok=False))


@pytest.mark.parametrize("strategy", ["precopy", "hybrid"])
def test_xl_moves_a_guest_to_the_next_release(pair: Pair, strategy: str) -> None:
    here, there = pair
    name = f"up-{strategy}"
    with guest(name, options=f"rate={STEPS_PER_S} clocks=1") as made:
        check_clock(made)
        asked = ("env", f"LIBXL_SAVE_HELPER={HELPER}", f"XEN_POSTCOPY_STRATEGY={strategy}")
        move = ("xl", "migrate", name, there.name)
        if strategy == "hybrid":
            refused = here.run(*asked, "XEN_POSTCOPY=require", *move, ok=False)
            assert "built without memory paging" in refused, refused
            made.wait_for_heartbeats(2)
        required = ["XEN_POSTCOPY=require"] if strategy == "precopy" else []
        printed = here.run(*asked, *required, *move)
        try:
            assert "Migration successful" in printed, printed
            by_xen = "using Xen's own live migration" in printed
            assert by_xen == (strategy == "hybrid"), printed
            check_clock(check_moved(name, here, there, f"{name}--incoming"))
        finally:
            there.run("xl", "destroy", name, ok=False)
