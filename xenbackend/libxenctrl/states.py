# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of a domain, and how the domain ended, from what Xen reports of it (``struct
xen_info``).
"""

from __future__ import annotations

from typing import Protocol

from xenbackend.contract import DomainState, End

SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_SUSPEND = range(3)
"""xen/include/public/sched.h"""
STATES = {
    SHUTDOWN_POWEROFF: (DomainState.SHUT_DOWN, "the guest has shut down"),
    SHUTDOWN_REBOOT: (DomainState.SHUT_DOWN, "the guest has rebooted"),
    SHUTDOWN_SUSPEND: (DomainState.SUSPENDED, ""),
}
"""The states of domains that were shut down for a reason.  Any other reason is a crash."""
ENDS = {
    SHUTDOWN_POWEROFF: End.SHUT_DOWN,
    SHUTDOWN_REBOOT: End.REBOOTED,
    SHUTDOWN_SUSPEND: End.SUSPENDED,
}
"""The same for domains that are gone."""


class Info(Protocol):
    """The fields of ``struct xen_info`` that are used here; the flags are 0 or 1."""

    paused: int
    dying: int
    shutdown: int
    shutdown_reason: int
    cpu_ns: int
    """The time for which the vCPUs have run."""


def state_of(info: Info, *, restoring: bool = False) -> tuple[DomainState, str]:
    """Return the state of a domain, and :attr:`DomainInfo.reason`.  ``restoring``: this process or
    a predecessor has restored a guest into the domain.

    Such a domain is paused before the guest runs, and an administrator may pause it afterwards.
    The time for which its vCPUs have run distinguishes the two.
    """
    if info.shutdown:
        return STATES.get(info.shutdown_reason, (DomainState.CRASHED, "the guest crashed"))
    if not info.paused:
        return DomainState.RUNNING, ""
    never_ran = restoring and not info.cpu_ns
    return DomainState.INCOMING if never_ran else DomainState.PAUSED, ""


def end_of(remnant: Info) -> End:
    """Return how a domain ended of which Xen has a remnant."""
    if not (remnant.dying and remnant.shutdown):
        return End.DESTROYED
    return ENDS.get(remnant.shutdown_reason, End.CRASHED)
