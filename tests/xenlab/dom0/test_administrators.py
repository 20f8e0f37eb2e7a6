# SPDX-License-Identifier: GPL-2.0-or-later
"""What administrators do to a guest in the middle of its migration by xl.  Each command works, or
is refused with a reason; the records state what has happened; nothing is left over.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.keepers import keepers
from tests.support.labs import until
from tests.xenlab.dom0.guests import WAIT_S, Guest, guest, xl
from tests.xenlab.dom0.host import (
    PATCHED,
    Host,
    check_heartbeat,
    host,
    slow,
)
from tests.xenlab.dom0.lab import remnants
from xenbackend.contract import DomainState

__all__ = ["host", "slow"]

RESTARTS = 'on_reboot = "restart"\n'


def state(host: Host, name: str) -> DomainState:
    with host.xen.open(int(xl("domid", name))) as domain:
        return domain.state()


def check_nothing_is_left(host: Host, *domids: int) -> None:
    """Check that there are no other domains, keepers and journals."""

    def left() -> list[object]:
        others = [info.domid for info in host.xen.domains() if info.domid not in domids]
        journals = (host.directory / "state").rglob("*.json")
        return [*others, *remnants(host.xen), *keepers(), *journals]

    until(lambda: not left(), f"something is left: {left()}", WAIT_S)


def wait_for_end(host: Host, problem: str) -> None:
    """Wait until both ends have ended for this reason."""

    def ended() -> bool:
        lines = [host.lines(daemon)[-1] for daemon in ("sender", "receiver")]
        return all(line["phase"] == "failed" and problem in line["problem"] for line in lines)

    until(ended, f"the reason is not shown: {problem}", WAIT_S)


# ---- while pages are missing ----
@PATCHED
def test_a_guest_is_destroyed_while_pages_are_missing(slow: Host) -> None:
    with slow.lacking_pages("adm4"):
        xl("destroy", "adm4")
        wait_for_end(slow, "its domain was destroyed")
        check_nothing_is_left(slow)


@PATCHED
def test_a_guest_shuts_down_while_pages_are_missing(slow: Host) -> None:
    with slow.lacking_pages("adm5"):
        xl("shutdown", "adm5")
        wait_for_end(slow, "it has shut down")
        check_nothing_is_left(slow)


@PATCHED
def test_a_guest_reboots_while_pages_are_missing(slow: Host) -> None:
    """xl at the destination makes it anew."""
    with slow.lacking_pages("adm6", extra=RESTARTS):
        before = int(xl("domid", "adm6"))
        xl("reboot", "adm6")
        wait_for_end(slow, "it has rebooted")
        until(lambda: "adm6" in xl("list"), "it is not made anew", WAIT_S)
        now = Guest("adm6", int(xl("domid", "adm6")))
        assert now.domid > before
        check_heartbeat(now)
        check_nothing_is_left(slow, now.domid)


# ---- before the handover ----
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
