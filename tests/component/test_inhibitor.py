# SPDX-License-Identifier: GPL-2.0-or-later
"""While guests need a daemon, the host has a lock against a shutdown, and not longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from migrate.service import inhibitor
from migrate.service.inhibitor import INHIBIT, inhibit_shutdown
from tests.support.waiting import until_async

HOLD = """#!/bin/sh
printf '%s\\n' "$@" > {directory}/lock
for command; do :; done
"$command"
rm {directory}/lock
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a systemd-inhibit whose lock is a file with its arguments."""
    monkeypatch.setattr(inhibitor, "LOOK_EVERY_S", 0.01)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write(tmp_path, HOLD.format(directory=tmp_path))
    return tmp_path


def write(directory: Path, script: str) -> None:
    path = directory / INHIBIT
    path.write_text(script)
    path.chmod(0o755)


async def test_a_lock_exists_while_guests_need_the_daemon(directory: Path) -> None:
    lock, guests = directory / "lock", list[str]()
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inhibit_shutdown, "sender", lambda: guests)
            for _ in range(2):  # and the next guest gets another one
                assert not lock.exists()
                guests.append("web1")
                await until_async(lambda: lock.exists() and "cat" in lock.read_text())
                arguments = lock.read_text().splitlines()
                assert "--what=shutdown:sleep" in arguments and "--mode=block" in arguments
                assert "--who=xen-postcopy sender" in arguments
                assert "(web1): see xen-postcopy list" in lock.read_text()
                guests.clear()
                await until_async(lambda: not lock.exists())
            guests.append("web1")
            await until_async(lock.exists)
            nursery.cancel_scope.cancel()
    assert not lock.exists()


async def test_a_host_that_grants_no_lock_is_reported_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(directory, "#!/bin/sh\nexit 1\n")
    guests = ["web1"]
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inhibit_shutdown, "sender", lambda: guests)
            await until_async(lambda: "is not refused" in caplog.text)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
    assert caplog.text.count("is not refused") == 1


async def test_a_host_without_systemd_has_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with trio.fail_after(50):
        await inhibit_shutdown("sender", lambda: ["web1"])
