# SPDX-License-Identifier: GPL-2.0-or-later
"""Our Debian package in a dom0 that runs systemd, on this host and on others."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.xenlab.dom0.waiting import until

UNITS = ("xen-postcopy-sender.service", "xen-postcopy-receiver.service")
HELPER = "/usr/bin/xen-postcopy-xl-helper"
CONFIG = "/etc/xen-postcopy/config.toml"
COMMAND_TIMEOUT_S = 900


@dataclass(frozen=True)
class Host:
    """A host.  ``name``: its name for ssh; empty for this host."""

    name: str = ""

    def run(
        self, *command: str, ok: bool = True, given: str | None = None, **environment: str
    ) -> str:
        """Run a command and return its output.  ``given``: its standard input."""
        words = (
            ["env", *(f"{key}={value}" for key, value in environment.items()), *command]
            if environment
            else command
        )
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LAB"))
        }
        done = subprocess.run(
            ["ssh", self.name, shlex.join(words)] if self.name else words, check=False,
            input=given or "", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=COMMAND_TIMEOUT_S, env=clean,
        )  # fmt: skip
        assert done.returncode == 0 or not ok, f"{self.name} {shlex.join(words)}: {done.stdout}"
        return done.stdout

    def unit_property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def wait_until_active(self) -> None:
        def active() -> bool:
            return all(self.unit_property(unit, "ActiveState") == "active" for unit in UNITS)

        until(active, "the units do not start")

    def install(self) -> None:
        print(self.upgrade())
        self.wait_until_active()

    def upgrade(self) -> str:
        """Install the package, perhaps over itself, and return what dpkg has printed."""
        (package,) = Path("/mnt/tree/build").glob("xen-postcopy_*.deb")
        # Built with the newest libraries of Xen, which dom0 has from the same release of Xen.  The
        # disk is thrown away with the machine, so it need not be synced for each file.
        return self.run(
            "dpkg", "--install", "--force-depends-version", "--force-unsafe-io", str(package)
        )

    def write(self, path: str, text: str) -> None:
        self.run("tee", path, given=text)

    def purge(self) -> None:
        self.run("dpkg", "--purge", "xen-postcopy")
