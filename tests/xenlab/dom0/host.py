# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0 with our helper and daemons, in which tests use xl.  Migrations are from dom0 to itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.control.client import ControlClient, Json
from migrate.errors import MigrationError
from migrate.options import LEAST_BANDWIDTH, NO_CAP
from tests.xenlab.dom0.daemons import daemons, write_helper
from tests.xenlab.dom0.guests import Guest, guest, xl
from tests.xenlab.dom0.lab import remnants
from tests.xenlab.dom0.waiting import WAIT_S, until
from xenbackend.libxenctrl.hypervisor import XenHypervisor

FEW_PAGES = 6000
"""More than a migration at :data:`SLOW` sends between two looks of a test."""
PAGING = pytest.mark.hypervisors("populate-evicted", "paging")
PATCHED = pytest.mark.hypervisors("populate-evicted")
CUTTER = """#!{python}
# xl migrate-receive behind a wire cutter, which passes both directions on until the words come by.
import os, subprocess, sys, threading
direction, words = sys.argv[1], sys.argv[2].encode()
child = subprocess.Popen(["xl", "migrate-receive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def carry(source, to, cuts):
    seen = b""
    while data := os.read(source, 65536):
        seen = (seen + data)[-65536 - len(words):]
        if cuts and words in seen:
            break
        os.write(to, data)
    os.close(to)
def heard():
    carry(0, child.stdin.fileno(), direction == "to")
threading.Thread(target=heard, daemon=True).start()
carry(child.stdout.fileno(), 1, direction == "from")
os._exit(child.wait())
"""


@dataclass
class Host:
    """dom0 with our helper, and the daemons' control sockets in ``directory``."""

    directory: Path
    xen: XenHypervisor

    @property
    def helper(self) -> Path:
        return write_helper(self.directory)

    def migrate(self, name: str, *, receive: str = "xl migrate-receive", **environment: str) -> str:
        """The output of ``xl migrate``.  Raises ``RuntimeError`` with the output if the command
        fails.
        """
        return self._run(
            "xl", "migrate", "-s", "", name, receive,
            **{
                "LIBXL_SAVE_HELPER": str(self.helper), "XEN_POSTCOPY": "require",
                "XEN_POSTCOPY_SENDER": str(self.directory / "sender"), **environment,
            },
        )  # fmt: skip

    def save(self, name: str, to: Path, *, with_helper: bool = True) -> None:
        """Run ``xl save``.  Raises ``RuntimeError`` with the output if the command fails."""
        self._run(
            "xl",
            "save",
            name,
            str(to),
            **({"LIBXL_SAVE_HELPER": str(self.helper)} if with_helper else {}),
        )

    def _run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            check=False,
            text=True,
            timeout=WAIT_S,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "XEN_POSTCOPY_RECEIVER": str(self.directory / "receiver"),
                **environment,
            },
        )
        print(done.stdout)
        if done.returncode:
            raise RuntimeError(done.stdout)
        return done.stdout

    @contextmanager
    def lacking_pages(self, name: str, *, extra: str = "") -> Iterator[Guest]:
        """Yield a guest that runs after a postcopy migration, and whose pages have not all
        arrived.  ``extra``: lines of its configuration.
        """
        with guest(name, extra=extra) as made:
            made.wait_for_heartbeats(2)
            self.migrate_but_few_pages(name)
            yield made

    def migrate_but_few_pages(self, name: str) -> None:
        """Migrate by postcopy, and copy next to nothing as soon as few pages are missing.  The
        guest has most of its memory then, so the guest does what a test asks for, however slow the
        machine is.  Copying cannot be paused so early, because xl may not have decided yet.
        """

        def guest_moved() -> bool:
            if migrating.done():
                migrating.result()  # raises its error
            lines = self.lines("sender")[-1:]
            return any(line["phase"] in ("deciding", "postcopy") for line in lines)

        def few_are_left() -> bool:
            return guest_moved() and self._unsent() < FEW_PAGES

        def few_are_missing() -> bool:
            return bool(self.lines("receiver")[-1]["outstanding"] < FEW_PAGES)

        with ThreadPoolExecutor(1) as pool:
            migrating = pool.submit(self.migrate, name, XEN_POSTCOPY_STRATEGY="postcopy")
            until(guest_moved, "the guest does not run at the destination")
            until(few_are_left, "pages are not sent")
            self._set_bandwidth(LEAST_BANDWIDTH)
            migrating.result()
        self.wait_for("postcopy")
        until(few_are_missing, "pages do not arrive")

    def _unsent(self) -> int:
        """Return the pages that the sender has not sent yet.  More may be missing, because a slow
        destination has not loaded what was sent.
        """
        details = self.details("sender")
        sent: int = details["push"]["pages"] + sum(details["answered"].values())
        missing: int = details["switchover"]["missing_pages"]
        return missing - sent

    def cutter(self, direction: str, words: str) -> str:
        program = self.directory / "cutter"
        program.write_text(CUTTER.format(python=sys.executable))
        program.chmod(0o755)
        return f"exec {program} {direction} '{words}'"

    def lines(self, daemon: str) -> list[Json]:
        with ControlClient(self.directory / daemon) as client:
            lines: list[Json] = client.call(command="list")["migrations"]
        return lines

    def wait_for_precopy(self) -> None:
        """Wait until the last migration has copied some pages, and the guest still runs."""

        def copies() -> bool:
            lines = self.lines("sender")[-1:]
            return any(line["phase"] == "precopy" and line["pages_done"] for line in lines)

        until(copies, "precopy is not reached")

    def details(self, daemon: str) -> Json:
        """Return what a daemon has measured of its last migration."""
        last = self.lines(daemon)[-1]["id"]
        with ControlClient(self.directory / daemon) as client:
            details: Json = client.call(command="show", migration=last)["details"]
        return details

    def wait_for(self, phase: str) -> None:
        """Wait until the last migration is in this phase at both ends."""

        def reached() -> bool:
            return all(
                self.lines(daemon)[-1]["phase"] == phase for daemon in ("sender", "receiver")
            )

        until(reached, f"{phase} is not reached")

    def resume(self) -> None:
        """Copy the pages that :meth:`migrate_but_few_pages` has left."""
        self._set_bandwidth(NO_CAP)

    def _set_bandwidth(self, bytes_per_s: int) -> None:
        last = self.lines("sender")[-1]["id"]
        values = {"postcopy_bandwidth_bytes_per_s": bytes_per_s}
        with ControlClient(self.directory / "sender") as client:
            client.call(command="set", migration=last, values=values)

    def complete(self) -> None:
        """Copy the pages that are missing, and wait until the last migration is completed at both
        ends.  Requests of the guest or of a program may have completed it already.
        """
        try:
            self.resume()
        except MigrationError:
            if self.lines("sender")[-1]["phase"] != "completed":
                raise
        self.wait_for("completed")

    def check_clean(self, name: str) -> None:
        """Check that there is one domain of this name, and that nothing is left of another."""
        domid = int(xl("domid", name))

        def alone() -> bool:
            return [info.domid for info in self.xen.domains()] == [domid] and not remnants(self.xen)

        until(alone, "something is left of another domain")
        with self.xen.open(domid) as domain:
            assert not domain.preflight().problems or not self.xen.host.facts().paging


SLOW = '[migration]\nbandwidth = "8M"\npostcopy_bandwidth = "2M"\n'
"""The configuration for migrations that are so slow that a test can act in each phase."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Yield a host without daemons, and without guests of other tests."""
    with closing(XenHypervisor()) as xen:
        for info in xen.domains():
            xen.host.destroy(info.domid)
        yield Host(tmp_path_factory.mktemp("host"), xen)


@pytest.fixture(scope="module")
def running(host: Host) -> Iterator[Host]:
    with daemons(host.directory):
        yield host


@pytest.fixture
def slow(host: Host, tmp_path: Path) -> Iterator[Host]:
    with daemons(tmp_path, SLOW):
        yield Host(tmp_path, host.xen)


def arrived(name: str) -> Guest:
    """Return the guest, with its console under the name that it had when it was opened."""
    return Guest(f"{name}--incoming", int(xl("domid", name)))


def check_heartbeat(guest: Guest) -> None:
    beats = guest.wait_for_heartbeats(3)
    assert [beat.errors for beat in beats] == [0] * len(beats)


def check_clock(guest: Guest) -> None:
    """Check that the clock has never gone back, and that every sleeper wakes, and none early."""
    use = guest.wait_for_sleepers()
    print(use)
    assert use.reads > 0
    assert (use.backwards, use.early) == (0, 0)


def check_clock_over_migrations(host: Host, name: str, *strategies: str) -> None:
    """Migrate a guest with each strategy, and check its clock and its memory after each."""
    for strategy in strategies:
        host.migrate(name, XEN_POSTCOPY_STRATEGY=strategy)
        now = arrived(name)
        check_clock(now)
        host.wait_for("completed")
        check_heartbeat(now)
        host.check_clean(name)
