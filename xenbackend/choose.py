"""Which hypervisor a daemon works with."""

from __future__ import annotations

import errno
from pathlib import Path

from xenbackend.contract import Hypervisor, XenError


def open_hypervisor(simulated: Path | None) -> Hypervisor:
    """The simulated host listening at ``simulated``, or this host's Xen.  Raises ``XenError``."""
    if simulated is not None:
        from xenbackend.simulated.client import SimulatedHypervisor

        return SimulatedHypervisor(simulated)
    raise XenError(
        "Xen",
        errno.ENOSYS,
        why="this release has no libxenctrl backend yet; use --simulated SOCKET with a simulated host",
    )
