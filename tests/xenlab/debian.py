# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's packages, of the release that dom0 runs, without touching this machine's own package
state.

The mirror is the one that this machine's apt uses.  Only the release pocket is used: the security
pocket has newer binaries of Xen without the source that belongs to them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.xenlab.cache import LabError, run

RELEASE, RELEASE_NUMBER = "bookworm", 12
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
XEN_VERSION = "4.17.5+72-g01140da4e8-1"


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


class Apt:
    """apt with sources and state of its own, in ``directory``."""

    def __init__(self, directory: Path):
        for part in ("lists/partial", "cache/archives/partial"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        sources = directory / "sources.list"
        line = f"[signed-by={KEYRING}] {mirror()} {RELEASE} main\n"
        sources.write_text(f"deb {line}deb-src {line}")
        self._options = [
            "-qq",
            *("-o", f"Dir::Etc::sourcelist={sources}"),
            *("-o", "Dir::Etc::sourceparts=-"),
            *("-o", f"Dir::State::lists={directory}/lists"),
            *("-o", f"Dir::Cache={directory}/cache"),
            *("-o", "APT::Sandbox::User=root"),
        ]
        run(["apt-get", *self._options, "update"])

    def source(self, package: str, version: str, where: Path) -> Path:
        """Unpack the source tree, with Debian's patches applied, and return its path."""
        run(["apt-get", *self._options, "source", f"{package}={version}"], cwd=where)
        return next(path for path in where.iterdir() if path.is_dir())

    def unpack(self, package: str, where: Path) -> None:
        """Unpack the files of a binary package."""
        run(["apt-get", *self._options, "download", package], cwd=where)
        run(["dpkg-deb", "-x", str(next(where.glob("*.deb"))), str(where)])

    def newest_kernel(self) -> str:
        """Return the package that ``linux-image-amd64`` stands for."""
        out = run(["apt-cache", *self._options, "depends", "linux-image-amd64"])
        return next(word for word in out.split() if word.startswith("linux-image-6"))


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
