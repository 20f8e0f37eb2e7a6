# SPDX-License-Identifier: GPL-2.0-or-later
"""The releases of Debian that dom0 can run, and how a dom0 is made of its packages.

Only the release pocket is used: the security pocket has newer binaries of Xen without the source
that belongs to them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from tests.xenlab.cache import directory
from xenbackend.hypervisor.build import BOOKWORM, TRIXIE, Release
from xenbackend.hypervisor.debian import Apt, mirror, run


@dataclass(frozen=True)
class Dom0:
    """What differs between the dom0s.

    The Python packages of the virtual environment that have native code are for one Python only.
    The tests in any other dom0 use Debian's.
    """

    release: Release
    suffix: str
    """The end of the names of the parts and machines."""
    test_packages: tuple[str, ...] = ()
    """Debian's packages that the tests need."""
    from_environment: tuple[str, ...] = ()
    """The Python packages that come from the virtual environment."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Debian's packages."""
        return (
            *(
                "python3",
                "python3-cffi",
                "python3-ply",
            ),  # python3-ply: cffi needs it, and debootstrap does not detect that
            *("iproute2", "kmod", "procps", "systemd-sysv"),
            *(f"xen-utils-{self.release.xen}", "xenstore-utils", "libxen-dev"),
            *("openssh-client", "openssh-server"),
            # Our package depends on these.
            *("python3-click", "python3-msgpack", "python3-numpy", "python3-trio"),
            *self.test_packages,
        )

    @property
    def further_packages(self) -> tuple[str, ...]:
        """Debian's packages whose dependencies debootstrap cannot resolve: the device model, and
        libvirt.
        """
        return (
            *("qemu-system-xen", "libvirt-daemon-system", "libvirt-daemon-driver-xen"),
            "libvirt-clients",
        )

    def part(self, name: str) -> str:
        """Return the name of one of this dom0's parts."""
        return name + self.suffix

    def apt(self) -> Apt:
        return _apt(self)

    def debootstrap(self, where: Path) -> None:
        include = f"--include={','.join(self.packages)}"
        codename = self.release.codename
        run(["debootstrap", "--variant=minbase", include, codename, str(where), mirror()])
        no_daemon = where / "usr/sbin/policy-rc.d"  # starts here
        no_daemon.write_text("#!/bin/sh\nexit 101\n")
        no_daemon.chmod(0o755)
        apt = ["chroot", str(where), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        run([*apt, "install", "--no-install-recommends", *self.further_packages])
        no_daemon.unlink()


@functools.cache
def _apt(dom0: Dom0) -> Apt:
    return Apt(directory() / dom0.part("apt"), dom0.release.codename)


DEBIAN_12 = Dom0(
    BOOKWORM,
    "",
    from_environment=(
        *("pytest", "pytest-timeout", "pytest-trio"),
        *("trio", "msgpack", "cffi", "numpy", "click", "cryptography"),
    ),
)
DEBIAN_13 = Dom0(
    TRIXIE,
    "-13",
    test_packages=("python3-pytest", "python3-pytest-timeout", "python3-pytest-trio"),
)
