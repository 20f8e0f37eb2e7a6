# SPDX-License-Identifier: GPL-2.0-or-later
"""While guests need a daemon, the host has a lock against a shutdown, and not longer."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate import tasks
from migrate.service import inhibitor
from migrate.service.inhibitor import INHIBIT, inhibit_shutdown
from migrate.tasks import kept_up
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


async def test_a_lock_that_was_refused_is_taken_later(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inhibitor, "AGAIN_S", 0.01)
    write(directory, "#!/bin/sh\necho >> $(dirname $0)/refused\nexit 1\n")
    lock, refused = directory / "lock", directory / "refused"
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inhibit_shutdown, "sender", lambda: ["web1"])
            await until_async(lambda: refused.exists() and len(refused.read_text()) > 2)
            write(directory, HOLD.format(directory=directory))
            await until_async(lock.exists)
            nursery.cancel_scope.cancel()
    assert caplog.text.count("is not refused") == 1


async def test_a_host_without_a_free_process_gives_the_lock_later(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "KEPT_UP_S", 0.01)
    lock, failures = directory / "lock", list[str]()
    open_process = trio.lowlevel.open_process

    async def fail_first(*arguments: Any, **options: Any) -> trio.Process:
        if len(failures) < 3:
            failures.append("")
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return await open_process(*arguments, **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", fail_first)
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept_up, "the lock", inhibit_shutdown, "sender", lambda: ["web1"])
            await until_async(lock.exists)
            nursery.cancel_scope.cancel()
    assert len(failures) == 3 and caplog.text.count("the lock fails") == 1


async def test_a_lock_names_some_of_many_guests(directory: Path) -> None:
    """An argument of a process has at most 128 KiB."""
    lock, guests = directory / "lock", [f"web{n}-{'x' * 60}" for n in range(5000)]
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inhibit_shutdown, "sender", lambda: guests)
            await until_async(lambda: lock.exists() and "cat" in lock.read_text())
            nursery.cancel_scope.cancel()
            text = lock.read_text()
    assert f"{guests[0]}, " in text and f"{guests[4]} and 4995 more)" in text


async def test_a_host_without_systemd_has_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with trio.fail_after(50):
        await inhibit_shutdown("sender", lambda: ["web1"])
