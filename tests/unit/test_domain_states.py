# SPDX-License-Identifier: GPL-2.0-or-later
"""What Xen's description of a domain, and the number of a page, mean."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from migrate.protocol.pfns import pfn_array
from xenbackend.contract import DomainState, End
from xenbackend.libxenctrl.platform import device_memory
from xenbackend.libxenctrl.states import end_of, state_of

SHUTDOWN_CRASH, SHUTDOWN_WATCHDOG = 3, 4


@dataclass
class Info:
    """A domain that runs and has run."""

    paused: int = 0
    dying: int = 0
    shutdown: int = 0
    shutdown_reason: int = 0
    cpu_ns: int = 5


@pytest.mark.parametrize(
    ("reason", "state", "text", "end"),
    [
        (0, DomainState.SHUT_DOWN, "the guest has shut down", End.SHUT_DOWN),
        (1, DomainState.SHUT_DOWN, "the guest has rebooted", End.REBOOTED),
        (2, DomainState.SUSPENDED, "", End.SUSPENDED),
        (SHUTDOWN_CRASH, DomainState.CRASHED, "the guest crashed", End.CRASHED),
        (SHUTDOWN_WATCHDOG, DomainState.CRASHED, "the guest crashed", End.CRASHED),
    ],
)
@pytest.mark.parametrize("restoring", [True, False])
def test_a_domain_that_has_shut_down_is_named_by_the_reason(
    reason: int, state: DomainState, text: str, end: End, restoring: bool
) -> None:
    shut_down = Info(paused=1, shutdown=1, shutdown_reason=reason)
    assert state_of(shut_down, restoring=restoring) == (state, text)
    assert end_of(Info(dying=1, shutdown=1, shutdown_reason=reason)) is end


def test_a_domain_that_is_gone_without_a_shutdown_was_destroyed() -> None:
    assert end_of(Info(dying=1)) is End.DESTROYED
    assert end_of(Info(shutdown=1)) is End.DESTROYED  # another domain has the number now


@pytest.mark.parametrize(
    ("info", "restoring", "state"),
    [
        (Info(), False, DomainState.RUNNING),
        (Info(), True, DomainState.RUNNING),
        (Info(cpu_ns=0), True, DomainState.RUNNING),  # no vCPU has had a CPU yet
        (Info(paused=1), False, DomainState.PAUSED),
        (Info(paused=1, cpu_ns=0), False, DomainState.PAUSED),
        (Info(paused=1, cpu_ns=0), True, DomainState.INCOMING),
        (Info(paused=1), True, DomainState.PAUSED),
    ],
)
def test_a_paused_domain_is_incoming_only_if_its_guest_has_never_run(
    info: Info, restoring: bool, state: DomainState
) -> None:
    assert state_of(info, restoring=restoring) == (state, "")


def test_only_memory_between_that_of_the_guest_and_xen_s_own_pages_is_of_a_device() -> None:
    found = device_memory(pfn_array([0, 0xEFFFF, 0xF0000, 0xFEFEF, 0xFEFF0, 0x100000]))
    assert found.tolist() == [0xF0000, 0xFEFEF]
