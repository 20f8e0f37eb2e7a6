# SPDX-License-Identifier: GPL-2.0-or-later
"""The choice of the hypervisor that a daemon works with."""

from __future__ import annotations

import errno
from pathlib import Path

from xenbackend import release
from xenbackend.contract import Hypervisor
from xenbackend.errors import XenError


def open_hypervisor(simulated: Path | None) -> Hypervisor:
    """Open the simulated host that listens at ``simulated``, or this host's Xen.  Raises
    ``XenError``, also if this program was built for another release of Xen (EACCES).
    """
    if simulated is not None:
        from xenbackend.simulated.client import SimulatedHypervisor

        return SimulatedHypervisor(simulated)
    if problem := release.mismatch():
        raise XenError("Xen", errno.EACCES, why=problem)
    try:
        from xenbackend.libxenctrl.hypervisor import XenHypervisor
    except ImportError as error:
        raise XenError(
            "Xen",
            errno.ENOSYS,
            why=f"the module for the real Xen is not usable ({error}): install libxen-dev and gcc "
            "and then this program again, which builds it; without Xen, use --simulated SOCKET "
            "with a simulated host",
        ) from error
    return XenHypervisor()
