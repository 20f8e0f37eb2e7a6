# SPDX-License-Identifier: GPL-2.0-or-later
"""A release: the tree of its sources with the native modules built, and the programs of that tree.

An earlier release comes from the history of this repository.  It is built once and kept in the
lab's cache.  Its dependencies are those of the present virtual environment.

The simulated host stands for the Xen of a host, which an upgrade of this project does not change.
Its description of a guest and its context of vCPUs have changed since 0.1.0.  The patch
``simulated-host.patch`` gives the simulated host of 0.1.0 the present form of both.  Everything
else of the earlier release is unchanged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import migrate
from migrate.errors import MigrationError
from tests.xenlab.cache import fingerprint, part
from xenbackend.hypervisor.debian import run

TREE = Path(__file__).parents[3]
PATCH = Path(__file__).with_name("simulated-host.patch")
COMMITS = {"0.1.0": "d686f372cc93e78debdaad893740f63c84d2ff2d"}
"""The commit of each earlier release, by its version."""
FROM_OUTSIDE = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME")
"""Variables by which Python would find another tree than the one in which a program is started."""
COMMAND_S = 120.0


class NoHistoryError(Exception):
    """The tree does not have the commit of an earlier release."""


@dataclass(frozen=True)
class Release:
    version: str
    tree: Path

    def __str__(self) -> str:
        return self.version

    def popen(
        self, command: list[str], *, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command of the form ``python -m MODULE ...`` with this release's modules."""
        found = os.environ if env is None else env
        kept = {name: value for name, value in found.items() if name not in FROM_OUTSIDE}
        return subprocess.Popen(command, cwd=self.tree, env=kept, **options)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``xen-postcopy ARGUMENTS``."""
        command = [sys.executable, "-m", "migrate.cli", *arguments]
        return self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *arguments: str) -> str:
        """Run ``xen-postcopy ARGUMENTS``, and return the output.

        Raises :class:`MigrationError` if the command fails or does not end.
        """
        with self.start(*arguments) as process:
            try:
                output, _none = process.communicate(timeout=COMMAND_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise MigrationError(f"{arguments[0]} of {self} does not end") from None
        if process.returncode:
            raise MigrationError(
                f"{' '.join(arguments)} of {self} ended with status {process.returncode}: {output}"
            )
        return str(output)

    def check(self) -> None:
        """Raises :class:`MigrationError` if the programs are not those of this release."""
        command = [sys.executable, "-c", "import migrate; print(migrate.__version__)"]
        with self.popen(command, stdout=subprocess.PIPE, text=True) as process:
            found = process.communicate(timeout=COMMAND_S)[0].strip()
        if found != self.version:
            raise MigrationError(f"the programs in {self.tree} are of {found}, not of {self}")


def today() -> Release:
    return Release(migrate.__version__, TREE)


def earlier(version: str) -> Release:
    """Build an earlier release, unless it is in the cache.

    Raises :class:`NoHistoryError` in a tree without the history, and ``LabError`` if the build
    fails.
    """
    commit = COMMITS[version]
    git = ["git", "-C", str(TREE)]
    known = [*git, "cat-file", "-e", f"{commit}^{{commit}}"]
    if (
        not shutil.which("git")
        or subprocess.run(known, capture_output=True, check=False).returncode
    ):
        raise NoHistoryError(
            f"the commit of {version} ({commit[:7]}) is not in this tree's history"
        )

    def build(where: Path) -> None:
        archive = where / "archive.tar"
        run([*git, "archive", "-o", str(archive), commit])
        run(["tar", "-xf", str(archive)], cwd=where)
        archive.unlink()
        run(["patch", "-p1", "--fuzz=0", "-i", str(PATCH)], cwd=where)
        run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=where)

    key = fingerprint(commit, PATCH, sys.version, sys.executable)
    return Release(version, part(f"release-{version}", key, build))
