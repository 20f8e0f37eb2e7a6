# SPDX-License-Identifier: GPL-2.0-or-later
"""What administrators do to a guest in the middle of its migration by xl.  Each command works, or
is refused with a reason; the records state what has happened; nothing is left over.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.keepers import keepers
from tests.xenlab.dom0.daemons import daemons
from tests.xenlab.dom0.devices import check_disk, disk, guest_with_devices, vif
from tests.xenlab.dom0.guests import Guest, guest, run, xl
from tests.xenlab.dom0.host import (
    PATCHED,
    SLOW,
    Host,
    arrived,
    check_heartbeat,
    host,
    slow,
)
from tests.xenlab.dom0.lab import remnants
from tests.xenlab.dom0.traffic import Traffic
from tests.xenlab.dom0.waiting import until
from xenbackend.contract import DomainState

__all__ = ["host", "slow"]

PAGING_ONLY = pytest.mark.hypervisors("paging")
"""How pages are evicted makes no difference to these tests."""
CONNECTED = "4"
"""``XenbusStateConnected`` (xen/include/public/io/xenbus.h)."""
SECOND_DISK, SECOND_VIF = "51728", "1"
"""The numbers of xvdb and of the second interface in xenstore."""
RESTARTS, STAYS = 'on_reboot = "restart"\n', 'on_poweroff = "preserve"\n'


def state(host: Host, name: str) -> DomainState:
    with host.xen.open(int(xl("domid", name))) as domain:
        return domain.state()


def run_time_ns(host: Host, name: str) -> int:
    """Return for how long the guest has run at the present host."""
    with host.xen.open(int(xl("domid", name))) as domain:
        return int(domain.native_info().cpu_ns)


def missing(host: Host) -> int:
    return int(host.lines("receiver")[-1]["outstanding"])


def check_nothing_is_left(host: Host, *domids: int) -> None:
    """Check that there are no other domains, keepers and journals."""

    def left() -> list[object]:
        others = [info.domid for info in host.xen.domains() if info.domid not in domids]
        journals = (host.directory / "state").rglob("*.json")
        return [*others, *remnants(host.xen), *keepers(), *journals]

    until(lambda: not left(), f"something is left: {left()}")


def wait_for_end(host: Host, problem: str) -> None:
    """Wait until both ends have ended for this reason."""

    def ended() -> bool:
        lines = [host.lines(daemon)[-1] for daemon in ("sender", "receiver")]
        return all(line["phase"] == "failed" and problem in line["problem"] for line in lines)

    until(ended, f"the reason is not shown: {problem}")


# ---- while pages are missing ----
@PAGING_ONLY
def test_devices_come_and_go_while_pages_are_missing(host: Host, tmp_path: Path) -> None:
    def wait_for_device(kind: str, number: str) -> None:
        front_end = f"/local/domain/{now.domid}/device/{kind}/{number}/state"
        until(
            lambda: run("xenstore-read", front_end).strip() == CONNECTED,
            f"the guest does not use {kind} {number}",
        )

    with (
        daemons(tmp_path, SLOW),
        guest_with_devices("adm1"),
        closing(Traffic()) as traffic,
        disk("adm1-second", "xvdb") as second,
    ):
        here = Host(tmp_path, host.xen)
        here.migrate_but_few_pages("adm1")
        now = arrived("adm1")
        # Linux does not notice a device that is attached before it has connected its first ones.
        check_disk(now)
        traffic.check(now)
        xl("rename", "adm1", "adm1-renamed")
        xl("rename", "adm1-renamed", "adm1")
        xl("block-attach", "adm1", second)
        xl("network-attach", "adm1", *vif(1).split(","))
        wait_for_device("vbd", SECOND_DISK)
        wait_for_device("vif", SECOND_VIF)
        xl("block-detach", "adm1", SECOND_DISK)
        xl("network-detach", "adm1", SECOND_VIF)
        assert missing(here) > 0
        traffic.check(now)
        here.complete()
        traffic.check(now)
        check_disk(now)
        check_heartbeat(now)
        here.check_clean("adm1")


@PAGING_ONLY
def test_a_guest_that_is_paused_gets_its_memory_and_stays_paused(
    host: Host, tmp_path: Path
) -> None:
    """Also if the receiver is restarted meanwhile."""
    with daemons(tmp_path, SLOW) as pair:
        here = Host(tmp_path, host.xen)
        with here.lacking_pages("adm2"):
            xl("pause", "adm2")
            before_ns = run_time_ns(here, "adm2")
            pair.kill("receiver")
            pair.start("receiver")
            here.wait_for("postcopy")
            assert missing(here) > 0
            here.complete()
            assert state(here, "adm2") is DomainState.PAUSED
            assert run_time_ns(here, "adm2") == before_ns > 0
            xl("unpause", "adm2")
            check_heartbeat(arrived("adm2"))
            here.check_clean("adm2")


@PAGING_ONLY
def test_a_guest_that_xl_leaves_paused_gets_its_memory(slow: Host) -> None:
    """``xl migrate -p``."""
    with guest("adm3") as made:
        made.wait_for_heartbeats(2)
        slow.migrate("adm3", receive="xl migrate-receive -p", XEN_POSTCOPY_STRATEGY="postcopy")
        slow.wait_for("completed")
        assert state(slow, "adm3") is DomainState.PAUSED
        assert run_time_ns(slow, "adm3") == 0
        xl("unpause", "adm3")
        check_heartbeat(arrived("adm3"))
        slow.check_clean("adm3")


@PATCHED
@pytest.mark.parametrize(
    ("command", "problem"),
    [("destroy", "its domain was destroyed"), ("shutdown", "it has shut down")],
)
def test_a_guest_ends_while_pages_are_missing(slow: Host, command: str, problem: str) -> None:
    with slow.lacking_pages("adm4"):
        xl(command, "adm4")
        wait_for_end(slow, problem)
        check_nothing_is_left(slow)


@PATCHED
def test_a_guest_reboots_while_pages_are_missing(slow: Host) -> None:
    """xl at the destination makes it anew."""
    with slow.lacking_pages("adm6", extra=RESTARTS):
        before = int(xl("domid", "adm6"))
        xl("reboot", "adm6")
        wait_for_end(slow, "it has rebooted")
        until(lambda: "adm6" in xl("list"), "it is not made anew")
        now = Guest("adm6", int(xl("domid", "adm6")))
        assert now.domid > before
        check_heartbeat(now)
        check_nothing_is_left(slow, now.domid)


@PATCHED
def test_a_sender_that_is_stopped_waits_for_the_last_page(host: Host, tmp_path: Path) -> None:
    with daemons(tmp_path, SLOW) as pair:
        here = Host(tmp_path, host.xen)
        with here.lacking_pages("adm7"):
            pair.send_signal("sender", signal.SIGTERM)
            log = tmp_path / "sender.log"
            until(
                lambda: "waiting for guests elsewhere: adm7" in log.read_text(),
                "it does not wait",
            )
            assert missing(here) > 0
            here.resume()
            assert pair.wait("sender") == 0
            until(lambda: pair.phase("receiver") == "completed", "pages are missing")
            check_heartbeat(arrived("adm7"))
            here.check_clean("adm7")


# ---- before the handover ----
@PATCHED
def test_a_guest_that_has_shut_down_is_refused_with_a_reason(slow: Host) -> None:
    with guest("adm10", extra=STAYS) as made:
        made.wait_for_heartbeats(2)
        xl("shutdown", "adm10")
        until(lambda: state(slow, "adm10") is DomainState.SHUT_DOWN, "it does not end")
        with pytest.raises(RuntimeError, match="is shut down: only a running guest can be"):
            slow.migrate("adm10")


@PATCHED
def test_a_paused_guest_is_refused_with_a_reason(slow: Host) -> None:
    with guest("adm8") as made:
        made.wait_for_heartbeats(2)
        xl("pause", "adm8")
        with pytest.raises(RuntimeError, match="is paused: only a running guest can be migrated"):
            slow.migrate("adm8")
        assert state(slow, "adm8") is DomainState.PAUSED
        xl("unpause", "adm8")
        with ThreadPoolExecutor() as pool:
            migrating = pool.submit(slow.migrate, "adm8", XEN_POSTCOPY_STRATEGY="hybrid")
            slow.wait_for_precopy()
            xl("pause", "adm8")
            with pytest.raises(RuntimeError, match="adm8 is paused, but not by this migration"):
                migrating.result()
        assert state(slow, "adm8") is DomainState.PAUSED
        xl("unpause", "adm8")
        check_heartbeat(made)
        slow.check_clean("adm8")


@PATCHED
@pytest.mark.parametrize("command", ["destroy", "shutdown"])
def test_a_guest_that_ends_while_it_is_copied_leaves_nothing(slow: Host, command: str) -> None:
    with guest("adm9") as made, ThreadPoolExecutor() as pool:
        made.wait_for_heartbeats(2)
        migrating = pool.submit(slow.migrate, "adm9", XEN_POSTCOPY_STRATEGY="hybrid")
        slow.wait_for_precopy()
        xl(command, "adm9")
        with pytest.raises(RuntimeError):
            migrating.result()
        wait_for_end(slow, "adm9 has ended during the migration: ")
        check_nothing_is_left(slow)
