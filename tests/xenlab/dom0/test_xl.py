# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified xl with our helper and daemons: run in dom0 by ``make xenlab``.  Migrations are from
dom0 to itself.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from migrate.control.client import ControlClient
from tests.support.keepers import keepers
from tests.xenlab.dom0.daemons import daemons
from tests.xenlab.dom0.guests import LINUX, STEPS_PER_S, STUB, Guest, Kind, guest, xl
from tests.xenlab.dom0.host import (
    PAGING,
    PATCHED,
    SLOW,
    Host,
    arrived,
    check_heartbeat,
    host,
    running,
    slow,
)
from tests.xenlab.dom0.lab import remnants
from tests.xenlab.dom0.waiting import WAIT_S, until
from xenbackend.pages import PAGE_SIZE, PageStatus, PfnArray

__all__ = ["host", "running", "slow"]

READY, GO, REPORT = (
    "domain received, ready to unpause",
    "domain is yours, you are cleared to unpause",
    "my copy unpause results",
)


@PAGING
def test_xl_migrates_by_postcopy_and_back(running: Host) -> None:
    migrate_there_and_back(running, "xl1", LINUX)


@pytest.mark.gate
@PAGING
def test_xl_migrates_a_guest_of_a_few_mib_by_postcopy_and_back(running: Host) -> None:
    migrate_there_and_back(running, "xl6", STUB)


def migrate_there_and_back(host: Host, name: str, kind: Kind) -> None:
    """Migrate a guest with both strategies: the heartbeat continues, and nothing is left of the
    source.
    """
    with guest(name, kind=kind) as made:
        made.wait_for_heartbeats(2)
        for strategy in ("hybrid", "postcopy"):
            domid = int(xl("domid", name))
            assert "Migration successful" in host.migrate(name, XEN_POSTCOPY_STRATEGY=strategy)
            now = arrived(name)
            assert now.domid != domid
            check_heartbeat(now)
            host.wait_for("completed")
            host.check_clean(name)
            check_heartbeat(now)


@PATCHED
@pytest.mark.parametrize(
    ("direction", "words", "stays"),
    [
        ("from", READY, True),
        ("to", GO, True),
        ("from", REPORT, False),
        ("to", "xen-postcopy-cut-nowhere", False),
    ],
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
            )  # the name of our record in the stream
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
        assert "using Xen's own live migration" in running.migrate(
            "xl4", receive=receive, XEN_POSTCOPY=""
        )
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
        said = running.migrate("xl5", XEN_POSTCOPY_STRATEGY="precopy")  # precopy needs no paging
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
        environment = {
            **os.environ,
            "LIBXL_SAVE_HELPER": str(host.helper),
            "XEN_POSTCOPY": "require",
        }
        for command in (["xl", "save", "xl1", str(saved)], ["xl", "restore", str(saved)]):
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=WAIT_S,
                env=environment,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        made.wait_for_heartbeats(2)


# ---- what is done to a guest while it is migrated ----
def tot_pages(host: Host, name: str) -> int:
    with host.xen.open(int(xl("domid", name))) as domain:
        return domain.reservation().tot_pages


def set_memory(host: Host, name: str, mib: int) -> None:
    """Set the guest's memory.  Then wait until the guest has followed, as far as it can spare
    memory and may have it.
    """
    before = tot_pages(host, name)
    xl("mem-set", name, str(mib))
    half_way = (before + (mib << 8)) / 2

    def followed() -> bool:
        now = tot_pages(host, name)
        return now > half_way if half_way > before else now < half_way

    until(followed, f"its memory does not become {mib} MiB")


def grown(guest: Guest) -> list[int]:
    return [int(pages) for pages in re.findall(r"grown to (\d+) pages", guest.console())]


@PAGING
def test_the_balloon_moves_in_each_phase(slow: Host) -> None:
    """The balloon grows while memory is copied, which Xen 4.17 does not record.  It shrinks and
    grows while pages are missing.
    """
    with guest("xl7", options=f"rate={STEPS_PER_S} pages=5000 grow=9000") as made:
        made.wait_for_heartbeats(2)
        set_memory(slow, "xl7", 80)
        made.wait_for_heartbeats(2)
        with ThreadPoolExecutor() as pool:
            migrating = pool.submit(slow.migrate, "xl7", XEN_POSTCOPY_STRATEGY="hybrid")
            slow.wait_for_precopy()
            set_memory(slow, "xl7", 100)
            until(lambda: bool(grown(made)), "the guest does not use what it got")
            assert slow.lines("sender")[-1]["phase"] == "precopy"
            assert "Migration successful" in migrating.result()
        now = arrived("xl7")
        check_heartbeat(now)
        slow.wait_for("completed")
        set_memory(slow, "xl7", 108)
        check_heartbeat(now)
        slow.migrate_but_few_pages("xl7")
        now = arrived("xl7")
        for mib in (96, 106):
            xl("mem-set", "xl7", str(mib))
            now.wait_for_heartbeats(2)
        check_heartbeat(now)
        slow.complete()
        check_heartbeat(now)
        slow.check_clean("xl7")


@PAGING
def test_a_sender_is_killed_when_xl_has_destroyed_the_source(host: Host, tmp_path: Path) -> None:
    """Its successor sends the pages that its keeper has.  Twice, so that a successor dies too."""
    with daemons(tmp_path, SLOW) as both:
        slow = Host(tmp_path, host.xen)
        with slow.lacking_pages("xl14"):
            (keeper,) = keepers()
            for _ in range(2):
                both.kill("sender")
                assert remnants(slow.xen)
                both.start("sender")
                assert keepers() == [keeper]
            until(lambda: both.phase("receiver") == "postcopy", "the successor is not connected")
            slow.complete()
            assert int(both.line("sender")["outstanding"]) == 0
            check_heartbeat(arrived("xl14"))
            until(lambda: not keepers(), "the keeper lives")
            slow.check_clean("xl14")


@PAGING
def test_a_guest_that_is_saved_while_pages_are_missing(slow: Host, tmp_path: Path) -> None:
    """xl waits until all pages have arrived.  The restored guest continues without an error."""
    image = tmp_path / "image"
    with slow.lacking_pages("xl8") as made, ThreadPoolExecutor() as pool:
        saving = pool.submit(slow.save, "xl8", image)
        until(image.exists, "xl does not begin")
        arrived("xl8").wait_for_heartbeats(2)
        assert not saving.done()
        slow.complete()
        saving.result()
        xl("restore", str(image))
        check_heartbeat(made)  # the console has its name again


@PATCHED
def test_the_pages_of_a_guest_that_is_saved_without_the_helper_are_kept(
    slow: Host, tmp_path: Path
) -> None:
    with slow.lacking_pages("xl9"):
        slow.save("xl9", tmp_path / "image", with_helper=False)
        lacks = "an image or a copy that was made of it then lacks them"
        for daemon, phase in (("sender", "interrupted"), ("receiver", "failed")):
            until(
                lambda: lacks in slow.lines(daemon)[-1]["problem"],
                "the problem is not shown",
            )
            assert slow.lines(daemon)[-1]["phase"] == phase
        assert remnants(slow.xen)
        with ControlClient(slow.directory / "sender") as client:
            client.call(command="decide", migration="xl9", here=False)
        until(lambda: not remnants(slow.xen), "something is held still")


@PATCHED
def test_a_core_of_a_guest_that_lacks_pages_has_them(slow: Host, tmp_path: Path) -> None:
    """Xen requests the pages that xl maps from the receiver."""
    with slow.lacking_pages("xl10"):
        xl("dump-core", "xl10", str(tmp_path / "core"))
        slow.complete()
        check_heartbeat(arrived("xl10"))
        pfns, pages = core_pages(tmp_path / "core")
        with slow.xen.open(int(xl("domid", "xl10"))) as domain:
            domain.pause()
            same = 0
            for at in range(0, len(pfns), 1024):
                with domain.map_pages(pfns[at : at + 1024]) as mapped:
                    there = np.zeros((len(mapped.status), PAGE_SIZE), dtype=np.uint8)
                    if mapped.data:
                        data = np.frombuffer(b"".join(mapped.data), dtype=np.uint8).reshape(
                            -1, PAGE_SIZE
                        )
                        there[mapped.status == PageStatus.DATA] = data
                same += int((there == pages[at : at + 1024]).all(axis=1).sum())
            domain.unpause()
        assert same > len(pfns) / 2, "what the guest has not written since differs from its memory"


def core_pages(path: Path) -> tuple[PfnArray, NDArray[np.uint8]]:
    """Read the output of ``xl dump-core``: sections ``.xen_pfn`` and ``.xen_pages`` of an ELF
    file.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    (table,) = struct.unpack_from("<Q", data.data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data.data, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQ", data.data, table + size * number) for number in range(count)
    ]
    texts = sections[names][4]

    def section(name: str) -> NDArray[np.uint8]:
        for at, _kind, _flags, _address, offset, length in sections:
            end = texts + at + len(name)
            if bytes(data[texts + at : end + 1]) == name.encode() + b"\0":
                return data[offset : offset + length]
        raise KeyError(name)

    return section(".xen_pfn").view(np.uint64), section(".xen_pages").reshape(-1, PAGE_SIZE)
