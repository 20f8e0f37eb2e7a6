# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on one network, each with our package: ``xl migrate GUEST HOST``, as an administrator
types it.
"""

from __future__ import annotations

import pytest

from tests.xenlab.dom0.guests import STEPS_PER_S, guest
from tests.xenlab.dom0.host import check_clock
from tests.xenlab.dom0.pair import Pair, check_arrived
from tests.xenlab.parts import address

pytestmark = pytest.mark.hypervisors("hosts")


def test_xl_migrates_to_another_host_and_back(packaged_hosts: Pair) -> None:
    first, second = packaged_hosts
    with guest("far") as made:
        made.wait_for_heartbeats(2)
        said = first.run("xl", "migrate", "far", second.name, XEN_POSTCOPY="require")
        assert "Migration successful" in said
        check_arrived("far", first, second, "far--incoming")
        said = second.run(
            "xl",
            "migrate",
            "far",
            first.name,
            XEN_POSTCOPY="require",
            XEN_POSTCOPY_STRATEGY="postcopy",
        )
        assert "Migration successful" in said
        check_arrived("far", second, first, "far--incoming")


def test_the_command_line_migrates_to_another_host(packaged_hosts: Pair) -> None:
    first, second = packaged_hosts
    with guest("plain") as made:
        made.wait_for_heartbeats(2)
        try:
            print(
                first.run("xen-postcopy", "migrate", "plain", address(1), "--strategy", "postcopy")
            )
            check_arrived("plain", first, second, "plain")
        finally:
            second.run("xl", "destroy", "plain", ok=False)


def test_the_clock_of_a_guest_on_a_host_that_has_run_for_another_time(packaged_hosts: Pair) -> None:
    first, second = packaged_hosts
    uptimes = [float(host.run("cat", "/proc/uptime").split()[0]) for host in packaged_hosts]
    print(f"the hosts have run for {uptimes} s")
    with guest("clock", options=f"rate={STEPS_PER_S} clocks=1") as made:
        check_clock(made)
        first.run("xl", "migrate", "clock", second.name, XEN_POSTCOPY="require")
        check_clock(check_arrived("clock", first, second, "clock--incoming"))
        second.run("xl", "migrate", "clock", first.name, XEN_POSTCOPY="require")
        check_clock(check_arrived("clock", second, first, "clock--incoming"))
