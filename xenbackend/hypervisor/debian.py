# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's packages, of any release, without touching this machine's own package state.

The mirror is the one that this machine's apt uses.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class BuildError(Exception):
    """Something cannot be built; the text has the reason and what to do."""


def run(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its output.  Raises :class:`BuildError` with the last lines of the
    output.
    """
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=cwd,
            env={
                **os.environ,
                "LC_ALL": "C.UTF-8",
                "DEBIAN_FRONTEND": "noninteractive",
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = done.stdout.splitlines()
        tail = "\n".join([line for line in lines if "error:" in line][:5] + lines[-15:])
        raise BuildError(f"{' '.join(command)[:200]} ended with status {done.returncode}:\n{tail}")
    return done.stdout


def mirror(label: str = "Debian") -> str:
    """Return the address of this machine's mirror of an archive, which has every release of Debian.
    Raises :class:`BuildError` if apt has none.
    """
    fields = "$(LABEL)|$(SITE)"
    targets = run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"])
    for line in targets.splitlines():
        found, site = line.split("|")
        if found == label:
            return site
    raise BuildError(f"apt has no mirror of {label}: run apt-get update, or add one to the sources")


class Apt:
    """apt for one release of Debian, with sources and state of its own in ``directory``.

    ``security``: with the archive of security updates.
    """

    def __init__(self, directory: Path, codename: str, *, security: bool = False):
        directory = directory.absolute()
        for part in ("lists/partial", "cache/archives/partial"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        sources = directory / "sources.list"
        archives = [f"{mirror()} {codename}"]
        if security:
            archives.append(f"{mirror('Debian-Security')} {codename}-security")
        lines = [f"[signed-by={KEYRING}] {archive} main\n" for archive in archives]
        sources.write_text("".join(f"deb {line}deb-src {line}" for line in lines))
        self._options = [
            "-qq",
            *("-o", f"Dir::Etc::sourcelist={sources}"),
            *("-o", "Dir::Etc::sourceparts=-"),
            *("-o", f"Dir::State::lists={directory}/lists"),
            *("-o", f"Dir::Cache={directory}/cache"),
            *("-o", "APT::Sandbox::User=root"),
        ]
        run(["apt-get", *self._options, "update"])

    def source(self, package: str, version: str | None, where: Path) -> Path:
        """Unpack the source tree of a version, or of the newest, with Debian's patches applied, and
        return its path.
        """
        name = f"{package}={version}" if version else package
        run(["apt-get", *self._options, "source", name], cwd=where)
        return next(path for path in where.iterdir() if path.is_dir())

    def unpack(self, package: str, where: Path) -> None:
        """Unpack the files of a binary package."""
        run(["apt-get", *self._options, "download", package], cwd=where)
        run(["dpkg-deb", "-x", str(next(where.glob("*.deb"))), str(where)])

    def newest_kernel(self) -> str:
        """Return the package that ``linux-image-amd64`` stands for."""
        out = run(["apt-cache", *self._options, "depends", "linux-image-amd64"])
        return next(word for word in out.split() if word.startswith("linux-image-6"))
