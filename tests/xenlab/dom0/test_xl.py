# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified xl with our helper and daemons: run in dom0 by ``make xenlab``.  Migrations are from dom0 to itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.client import ControlClient, Json
from tests.labs import until
from tests.xenlab.dom0.daemons import daemons, write_helper
from tests.xenlab.dom0.guests import Guest, guest, xl
from tests.xenlab.dom0.lab import remnants
from xenbackend.libxenctrl.hypervisor import XenHypervisor

PAGING = pytest.mark.hypervisors("populate-evicted", "paging")
PATCHED = pytest.mark.hypervisors("populate-evicted")
CUTTER = """#!{python}
# xl migrate-receive, and a wire cutter: passes on what it says and hears until the words come by, and then nothing more.
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
READY, GO, REPORT = (
    "domain received, ready to unpause",
    "domain is yours, you are cleared to unpause",
    "my copy unpause results",
)


@dataclass
class Host:
    """dom0 with our helper, the daemons' control sockets in ``directory``."""

    directory: Path
    xen: XenHypervisor

    @property
    def helper(self) -> Path:
        return write_helper(self.directory)

    def migrate(self, name: str, *, receive: str = "xl migrate-receive", **environment: str) -> str:
        """What xl said, if it migrated the guest; raises ``RuntimeError`` with it where not."""
        done = subprocess.run(
            ["xl", "migrate", "-s", "", name, receive], check=False, text=True, timeout=240,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={
                **os.environ, "LIBXL_SAVE_HELPER": str(self.helper), "XEN_POSTCOPY": "require",
                "XEN_POSTCOPY_SENDER": str(self.directory / "sender"),
                "XEN_POSTCOPY_RECEIVER": str(self.directory / "receiver"), **environment,
            },
        )  # fmt: skip
        print(done.stdout)
        if done.returncode:
            raise RuntimeError(done.stdout)
        return done.stdout

    def cutter(self, direction: str, words: str) -> str:
        program = self.directory / "cutter"
        program.write_text(CUTTER.format(python=sys.executable))
        program.chmod(0o755)
        return f"exec {program} {direction} '{words}'"

    def lines(self, daemon: str) -> list[Json]:
        with ControlClient(self.directory / daemon) as client:
            lines: list[Json] = client.call(command="list")["migrations"]
        return lines

    def wait_for(self, phase: str) -> None:
        """Until the last migration is so at both ends."""

        def reached() -> bool:
            return all(self.lines(daemon)[-1]["phase"] == phase for daemon in ("sender", "receiver"))

        until(reached, f"{phase} is not reached", 120)

    def check_clean(self, name: str) -> None:
        """One domain of this name, and nothing that is left of another."""
        domid = int(xl("domid", name))

        def alone() -> bool:
            return [info.domid for info in self.xen.domains()] == [domid] and not remnants(self.xen)

        until(alone, "something is left of another domain", 60)
        with self.xen.open(domid) as domain:
            assert not domain.preflight().problems or not self.xen.facts().paging


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Without daemons, and without guests of other tests."""
    with closing(XenHypervisor()) as xen:
        for info in xen.domains():
            xen.destroy(info.domid)
        yield Host(tmp_path_factory.mktemp("host"), xen)


@pytest.fixture(scope="module")
def running(host: Host) -> Iterator[Host]:
    with daemons(host.directory):
        yield host


def arrived(name: str) -> Guest:
    """As its console was named when it was opened."""
    return Guest(f"{name}--incoming", int(xl("domid", name)))


def check_heartbeat(guest: Guest) -> None:
    beats = guest.wait_for_heartbeats(3)
    assert [beat.errors for beat in beats] == [0] * len(beats)


@pytest.mark.gate
@PAGING
def test_xl_migrates_by_postcopy_and_back(running: Host) -> None:
    """Both strategies, there and back: the heartbeat goes on, and nothing is left of the source."""
    with guest("xl1") as made:
        made.wait_for_heartbeats(2)
        for strategy in ("hybrid", "postcopy"):
            domid = int(xl("domid", "xl1"))
            assert "Migration successful" in running.migrate("xl1", XEN_POSTCOPY_STRATEGY=strategy)
            now = arrived("xl1")
            assert now.domid != domid
            check_heartbeat(now)
            running.wait_for("completed")
            running.check_clean("xl1")
            check_heartbeat(now)


@PATCHED
@pytest.mark.parametrize(
    ("direction", "words", "stays"),
    [("from", READY, True), ("to", GO, True), ("from", REPORT, False), ("to", "xen-postcopy-cut-nowhere", False)],
    ids=["ready", "go", "report", "nothing"],
)
def test_the_guest_runs_in_one_place_wherever_xl_s_handshake_is_cut(
    running: Host, direction: str, words: str, stays: bool
) -> None:
    with guest("xl2") as made:
        made.wait_for_heartbeats(2)
        receive = running.cutter(direction, words)
        if words in (READY, GO, REPORT):
            with pytest.raises(RuntimeError, match="failed"):
                running.migrate("xl2", receive=receive)
        else:
            running.migrate("xl2", receive=receive)
        running.wait_for("failed" if stays else "completed")
        if not stays:
            until(lambda: "xl2" in xl("list"), "it is not named again")
        running.check_clean("xl2")
        assert (int(xl("domid", "xl2")) == made.domid) == stays
        check_heartbeat(made if stays else arrived("xl2"))


@PATCHED
def test_a_receiver_that_dies_in_the_middle(running: Host) -> None:
    with guest("xl3") as made:
        made.wait_for_heartbeats(2)
        with pytest.raises(RuntimeError, match="failed to suspend at sender"):
            running.migrate(
                "xl3", receive=running.cutter("to", "0VPX")
            )  # the name of our record, as it is in the stream
        running.wait_for("failed")
        running.check_clean("xl3")
        assert int(xl("domid", "xl3")) == made.domid
        check_heartbeat(made)


@PATCHED
def test_where_the_other_host_has_no_helper_xl_s_own_migration_is_used(running: Host) -> None:
    with guest("xl4") as made:
        made.wait_for_heartbeats(2)
        receive = "env -u LIBXL_SAVE_HELPER xl migrate-receive"
        with pytest.raises(RuntimeError, match="XEN_POSTCOPY=require"):
            running.migrate("xl4", receive=receive)
        check_heartbeat(made)
        assert "using Xen's own live migration" in running.migrate("xl4", receive=receive, XEN_POSTCOPY="")
        check_heartbeat(arrived("xl4"))
        running.check_clean("xl4")


@pytest.mark.hypervisors("debian")
def test_a_host_that_cannot_page_leaves_it_to_the_stock_helper(running: Host) -> None:
    with guest("xl5") as made:
        made.wait_for_heartbeats(2)
        with pytest.raises(RuntimeError, match="built without memory paging"):
            running.migrate("xl5")
        check_heartbeat(made)
        said = running.migrate("xl5", XEN_POSTCOPY="")
        assert "built without memory paging" in said and "using Xen's own live migration" in said
        check_heartbeat(arrived("xl5"))
        said = running.migrate("xl5", XEN_POSTCOPY_STRATEGY="precopy")  # which needs no paging
        running.wait_for("completed")


@pytest.mark.hypervisors("debian")
def test_the_stock_helper_does_what_ours_leaves_to_it(host: Host, tmp_path: Path) -> None:
    nobody = {"XEN_POSTCOPY_SENDER": "/nowhere", "XEN_POSTCOPY_RECEIVER": "/nowhere"}
    with guest("xl1") as made:
        made.wait_for_heartbeats(2)
        with pytest.raises(RuntimeError, match="XEN_POSTCOPY=require"):
            host.migrate("xl1", **nobody)
        assert int(xl("domid", "xl1")) == made.domid
        made.wait_for_heartbeats(2)
        said = host.migrate("xl1", XEN_POSTCOPY="", **nobody)
        assert "no daemon at" in said and "using Xen's own live migration" in said
        assert "Migration successful" in said
        assert int(xl("domid", "xl1")) != made.domid
        check_heartbeat(arrived("xl1"))
        saved = tmp_path / "saved"
        environment = {**os.environ, "LIBXL_SAVE_HELPER": str(host.helper), "XEN_POSTCOPY": "require"}
        for command in (["xl", "save", "xl1", str(saved)], ["xl", "restore", str(saved)]):
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
            assert done.returncode == 0, done.stderr
        made.wait_for_heartbeats(2)
