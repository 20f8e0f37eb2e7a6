# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics in a file: when the file is written, and that none is left."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from migrate.metrics import serve
from migrate.service.config import MetricsConfig
from tests.support.metrics import Daemon, served, shown
from tests.support.waiting import WAIT_S

BOTH = ("sender", "receiver")


async def until_written(path: Path, what: bytes) -> bytes:
    with trio.fail_after(WAIT_S):
        while not (path.exists() and what in (text := path.read_bytes())):
            await trio.sleep(0.01)
    return text


@pytest.mark.parametrize("end", BOTH)
async def test_a_file_is_renewed_and_removed_at_the_end(tmp_path: Path, end: str) -> None:
    path, daemon = tmp_path / f"xen-postcopy-{end}.prom", Daemon(tmp_path)
    umask = os.umask(0o077)
    try:
        async with trio.open_nursery() as nursery:
            config = MetricsConfig(textfiles=str(tmp_path), textfile_every_s=0.01)
            await served(nursery, daemon, config, end)
            text = await until_written(path, b"xen_postcopy_outstanding_pages")
            assert path.stat().st_mode & 0o777 == 0o644
            list(text_string_to_metric_families(text.decode()))
            daemon.migrations = [shown(end)]
            await until_written(path, b'domain="web"')
            nursery.cancel_scope.cancel()
    finally:
        os.umask(umask)
    assert list(tmp_path.glob("xen-postcopy*")) == []


async def test_a_daemon_that_does_not_start_touches_no_file_of_the_one_that_runs(
    tmp_path: Path,
) -> None:
    path, daemon = tmp_path / "xen-postcopy-sender.prom", Daemon(tmp_path)
    path.write_bytes(b"of the daemon that runs")
    daemon.started = trio.Event()
    async with trio.open_nursery() as nursery:
        await served(nursery, daemon, MetricsConfig(textfiles=str(tmp_path), textfile_every_s=0.01))
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    assert path.read_bytes() == b"of the daemon that runs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["create", "rename"])
async def test_a_write_that_was_abandoned_makes_no_file_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A disk may take long for a write, and the end does not wait for that write."""
    begun, removed, written = threading.Event(), threading.Event(), threading.Event()
    write = serve.Textfile.write

    def wait(*_arguments: object) -> None:
        begun.set()
        assert removed.wait(WAIT_S)

    def write_slowly(file: serve.Textfile, text: bytes) -> None:
        if step == "create":
            wait()
        write(file, text)
        written.set()

    monkeypatch.setattr(serve.Textfile, "write", write_slowly)
    if step == "rename":
        monkeypatch.setattr(os, "fchmod", wait)
    async with trio.open_nursery() as nursery:
        await served(nursery, Daemon(tmp_path), MetricsConfig(textfiles=str(tmp_path)))
        assert await trio.to_thread.run_sync(begun.wait, WAIT_S)
        nursery.cancel_scope.cancel()
    removed.set()
    assert written.wait(WAIT_S)
    assert list(tmp_path.iterdir()) == []


async def test_a_file_is_not_written_through_what_lies_in_its_place(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """The folder may be that of another user, and the daemon is root."""
    other = tmp_path / "other"
    other.write_bytes(b"theirs")
    (tmp_path / "xen-postcopy-sender.new").symlink_to(other)
    await served(nursery, Daemon(tmp_path), MetricsConfig(textfiles=str(tmp_path)))
    await until_written(tmp_path / "xen-postcopy-sender.prom", b"xen_postcopy_")
    assert other.read_bytes() == b"theirs"


async def test_a_guest_that_is_suspended_for_long_delays_the_file_only(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "PATIENCE_S", 0.0)
    daemon = Daemon(tmp_path)
    daemon.migrations = [shown("sender", phase="switchover")]
    await served(nursery, daemon, MetricsConfig(textfiles=str(tmp_path)))
    await until_written(tmp_path / "xen-postcopy-sender.prom", b'domain="web"')


async def test_nothing_is_written_while_a_guest_is_suspended(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "AGAIN_S", 0.001)
    monkeypatch.setattr(serve, "PATIENCE_S", WAIT_S)
    daemon, looks = Daemon(tmp_path), list[int]()
    snapshots = daemon.snapshots

    def count() -> Iterator[dict[str, Any]]:
        looks.append(1)
        return snapshots()

    monkeypatch.setattr(daemon, "snapshots", count)
    daemon.migrations = [shown("sender", phase="switchover")]
    await served(nursery, daemon, MetricsConfig(textfiles=str(tmp_path)))
    with trio.fail_after(WAIT_S):
        while len(looks) < 5:
            await trio.sleep(0.001)
    assert list(tmp_path.iterdir()) == []
    daemon.migrations = [shown("sender")]
    await until_written(tmp_path / "xen-postcopy-sender.prom", b'domain="web"')


async def test_a_full_disk_is_logged_and_tried_again(
    nursery: trio.Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "fchmod", refuse)
        config = MetricsConfig(textfiles=str(tmp_path), textfile_every_s=0.01)
        await served(nursery, Daemon(tmp_path), config)
        with trio.fail_after(WAIT_S):
            while "cannot write the metrics into" not in caplog.text:
                await trio.sleep(0.01)
        assert list(tmp_path.iterdir()) == []
    await until_written(tmp_path / "xen-postcopy-sender.prom", b"xen_postcopy_")
