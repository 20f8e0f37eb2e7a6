# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests with several vCPUs, and the clock of a guest, over several migrations by xl.

The vCPUs share one emulated processor.  On each of them a thread writes and checks memory of its
own.
"""

from __future__ import annotations

import pytest

from tests.xenlab.dom0.guests import STEPS_PER_S, Guest, guest
from tests.xenlab.dom0.host import (
    Host,
    arrived,
    check_clock,
    check_clock_over_migrations,
    check_heartbeat,
    host,
    running,
)

__all__ = ["host", "running"]

# What these tests show does not depend on how pages are evicted.
pytestmark = pytest.mark.hypervisors("paging")


def check_cpus(guest: Guest, vcpus: int) -> None:
    """Check that the guest works on each vCPU, and that none of them has read wrong contents."""
    uses = guest.wait_for_cpus(vcpus)
    print(*uses, sep="\n")
    assert sorted(use.number for use in uses) == list(range(vcpus))
    assert [use.errors for use in uses] == [0] * vcpus


@pytest.mark.parametrize("vcpus", [2, 4])
def test_a_guest_works_on_all_of_its_vcpus_wherever_it_is(running: Host, vcpus: int) -> None:
    name, options = f"smp{vcpus}", f"rate={STEPS_PER_S // vcpus} cpus={vcpus}"
    with guest(name, vcpus=vcpus, options=options) as made:
        check_cpus(made, vcpus)
        for strategy in ("hybrid", "postcopy"):
            running.migrate(name, XEN_POSTCOPY_STRATEGY=strategy)
            now = arrived(name)
            check_cpus(now, vcpus)
            running.wait_for("completed")
            check_cpus(now, vcpus)
            check_heartbeat(now)
            running.check_clean(name)


def test_a_guest_arrives_with_a_vcpu_that_was_never_online(running: Host) -> None:
    """When a guest resumes, Linux registers the areas of offline vCPUs as well.  Nothing at the
    source shows which pages these are.
    """
    with guest("spare", extra="maxvcpus = 2\n", options=f"rate={STEPS_PER_S}") as made:
        made.wait_for_heartbeats(2)
        running.migrate("spare", XEN_POSTCOPY_STRATEGY="postcopy")
        now = arrived("spare")
        running.wait_for("completed")
        check_heartbeat(now)
        running.check_clean("spare")


def test_the_clock_never_goes_back_and_sleepers_wake_over_three_migrations(running: Host) -> None:
    with guest("clock", vcpus=2, options=f"rate={STEPS_PER_S // 2} cpus=2 clocks=1") as made:
        check_clock(made)
        check_clock_over_migrations(running, "clock", "hybrid", "postcopy", "hybrid")
