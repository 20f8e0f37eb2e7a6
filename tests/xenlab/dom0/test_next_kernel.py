# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with the kernel of Debian 13 on the Xen of Debian 12, with memory paging: xl migrates the
guest from the first host to itself.  The second host has the kernel.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.xenlab.dom0.guests import LINUX, NEAR, PARTS, STEPS_PER_S, Kind, guest, run
from tests.xenlab.dom0.host import Host, check_clock, check_clock_over_migrations, host, running
from tests.xenlab.dom0.pair import both

__all__ = ["host", "running"]

pytestmark = pytest.mark.hypervisors("12-to-13")


@pytest.fixture(scope="module")
def kind() -> Kind:
    """Return what guests boot at the second host, copied to this one."""
    _here, there = both()
    copied = replace(LINUX, kernel="vmlinux-13", initramfs="initramfs-13")
    NEAR.mkdir(exist_ok=True)
    for name, copy in (("vmlinux", copied.kernel), ("initramfs", copied.initramfs)):
        run("scp", "-q", f"{there.name}:{PARTS / name}", str(NEAR / copy))
    return copied


def test_a_guest_with_the_kernel_of_the_next_release_arrives(kind: Kind, running: Host) -> None:
    with guest("next", kind=kind, options=f"rate={STEPS_PER_S} clocks=1") as made:
        check_clock(made)
        check_clock_over_migrations(running, "next", "hybrid", "postcopy")
