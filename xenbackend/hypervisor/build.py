# SPDX-License-Identifier: GPL-2.0-or-later
"""A hypervisor with memory paging from Debian's source package.

What differs between the releases of Debian is in :class:`Release` and in the patch of each.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from xenbackend.hypervisor.debian import BuildError, run

HERE = Path(__file__).parent
PAGING_CONFIG = (
    "CONFIG_EXPERT=y\nCONFIG_UNSUPPORTED=y\nCONFIG_MEM_PAGING=y\n# CONFIG_LIVEPATCH is not set\n"
)
"""What is added to Debian's configuration of the hypervisor."""


@dataclass(frozen=True)
class Release:
    """A release of Debian, and its Xen."""

    number: int
    codename: str
    xen: str
    """Xen's release, as in the names of Debian's packages."""
    source: str
    """The version of the packages of Xen with which the lab's tests run."""

    @property
    def patch(self) -> Path:
        """The patch that adds ``populate_evicted``."""
        return HERE / f"populate-evicted-{self.xen}.patch"


BOOKWORM = Release(12, "bookworm", "4.17", "4.17.5+72-g01140da4e8-1")
TRIXIE = Release(13, "trixie", "4.20", "4.20.4+63-g7abfd2bce2-0+deb13u1")
RELEASES = (BOOKWORM, TRIXIE)


@dataclass(frozen=True)
class Built:
    """The files of a hypervisor."""

    image: Path
    """The multiboot image."""
    compressed: Path
    config: Path


def compile_hypervisor(tree: Path, patch: Path | None) -> Built:
    """Compile the hypervisor with memory paging in a source tree of Debian, which is changed.

    ``patch``: the patch of the release, or none.  Raises :class:`BuildError` if the patch does not
    apply exactly, or if the tree has no memory paging.
    """
    if patch:
        run(["patch", "-p1", "--fuzz=0", "-i", str(patch)], cwd=tree)
    config = tree / "xen" / ".config"
    config.write_text((tree / "debian" / "xen-kconfig").read_text() + PAGING_CONFIG)
    alone = {"MAKEFLAGS": ""}  # an outer make would pass its variables on
    run(["make", "-C", "xen", "olddefconfig"], cwd=tree, env=alone)
    if "CONFIG_MEM_PAGING=y" not in config.read_text():
        raise BuildError("the hypervisor's configuration does not take memory paging")
    run(["make", "-C", "xen", f"-j{(os.cpu_count() or 1) + 1}"], cwd=tree, env=alone)
    return Built(tree / "xen" / "xen", tree / "xen" / "xen.gz", config)
