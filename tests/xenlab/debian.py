# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's packages, of the release that dom0 runs, without touching this machine's own package
state.

The mirror is the one that this machine's apt uses.  Only the release pocket is used: the security
pocket has newer binaries of Xen without the source that belongs to them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.xenlab.cache import LabError
from xenbackend.hypervisor.build import BOOKWORM
from xenbackend.hypervisor.debian import run

RELEASE, RELEASE_NUMBER = "bookworm", 12
XEN_VERSION = BOOKWORM.source


def mirror(release: str = RELEASE) -> str:
    """Return the address from which this machine's apt gets ``release``.  Raises :class:`LabError`
    if there is none, as on a machine that is no Debian.
    """
    try:
        lines = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", "Created-By: Packages"],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabError(
            f"the lab takes its parts from Debian's packages, and apt-get does not answer: {error}"
        ) from error
    for line in lines:
        site, _, codename = line.partition(" ")
        if codename == release:
            return site
    raise LabError(
        f"apt has no Debian mirror for {release}: run apt-get update, or add it to the sources"
    )


def debootstrap(where: Path, packages: tuple[str, ...]) -> None:
    run(
        [
            "debootstrap",
            "--variant=minbase",
            f"--include={','.join(packages)}",
            RELEASE,
            str(where),
            mirror(),
        ]
    )
