# SPDX-License-Identifier: GPL-2.0-or-later
"""Have ``shutdown`` and ``systemctl reboot`` refuse while guests need a daemon of this host.

A lock of systemd-logind does that (systemd-inhibit(1)).  The lock is held by a child process, whose
standard input is a pipe of this process: the child, and with it the lock, ends with the daemon.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable

import trio

from migrate.logs import Complaint

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""How often the guests are counted."""
END_S = 10.0
"""How long the child process may take to end, before it is killed."""
AGAIN_S = 60.0
"""The pause after a host has refused the lock, or has ended it."""
MOST_NAMED = 5
"""The most guests that the reason of the lock names."""
INHIBIT = "systemd-inhibit"


async def inhibit_shutdown(end: str, guests: Callable[[], list[str]]) -> None:
    """Hold a lock for as long as ``guests`` returns names of guests that need the daemon ``end``.
    Runs until cancelled.  Returns at once on a host without systemd.

    Raises ``OSError`` if the child process cannot be started; the call can be repeated then.
    """
    if shutil.which(INHIBIT) is None:
        return
    refused = Complaint(log.warning)
    while True:
        while not (names := guests()):
            await trio.sleep(LOOK_EVERY_S)
        async with _locked(end, names) as lock:
            # The reason of the lock names the guests of this instant.  `list` shows the later ones.
            while guests() and lock.poll() is None:
                await trio.sleep(LOOK_EVERY_S)
            status = lock.poll()
        if status is not None:
            about = (
                "%s ends with status %d: a shutdown of this host is not refused while guests need "
                "it; trying again every %g s"
            )
            refused.log(about, INHIBIT, status, AGAIN_S)
            await trio.sleep(AGAIN_S)


@contextlib.asynccontextmanager
async def _locked(end: str, names: list[str]) -> AsyncIterator[trio.Process]:
    others = f" and {more} more" if (more := len(names) - MOST_NAMED) > 0 else ""
    named = ", ".join(names[:MOST_NAMED]) + others  # an argument has a limit (E2BIG)
    why = f"guests need pages that only this host has ({named}): see xen-postcopy list"
    command = [
        INHIBIT,
        "--what=shutdown:sleep",
        "--mode=block",
        f"--who=xen-postcopy {end}",
        f"--why={why}",
        "cat",
    ]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.move_on_after(END_S):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
