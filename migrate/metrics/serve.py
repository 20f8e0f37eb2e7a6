# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics of a daemon over HTTP, and in a file for node_exporter.

A scrape costs the event loop one look at each migration, between which others have their turn.  The
text is made in a thread, one text at a time.  A client that is slow holds one task, and after some
seconds nothing.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Protocol

import trio

from migrate.control.server import listen_unix
from migrate.errors import MigrationError
from migrate.logs import Complaint
from migrate.metrics.table import Json, Snapshot, Totals
from migrate.service.config import ConfigError, MetricsConfig
from migrate.service.files import create_anew
from migrate.service.history import History
from migrate.service.lifecycle import serve_connections
from migrate.tasks import in_abandoned_thread, isolated

log = logging.getLogger(__name__)

MOST_SCRAPES = 16
"""The most requests that are answered at a time.  Further connections are closed."""
REQUEST_S, ANSWER_S = 5.0, 10.0
"""How long a client may take to send its request, and to receive the answer."""
MOST_OF_A_REQUEST = 16 * 1024
AGAIN_S = 0.1
"""The pause between two looks at whether a guest's downtime has ended."""
PATIENCE_S = 1.0
"""How long a file waits for the end of guests' downtimes."""
MISSING = (
    "[metrics]: the Python module prometheus_client is not installed (Debian: "
    "python3-prometheus-client)"
)


class Daemon(Protocol):
    @property
    def history(self) -> History: ...

    @property
    def started(self) -> trio.Event:
        """The event that is set when the daemon serves.  Before, the files of this host may be
        those of another daemon that runs.
        """

    def snapshots(self) -> Iterable[Json]:
        """Return what ``show`` answers of each migration that is not in the history.  The choice is
        made at once, and each answer when it is taken.
        """


class Metrics:
    """The metrics of the daemon ``end``.  Raises :class:`ConfigError` if the client library is
    missing.
    """

    def __init__(self, end: str, config: MetricsConfig, daemon: Daemon):
        try:
            from migrate.metrics import exposition
        except ImportError:
            raise ConfigError(MISSING) from None
        self._exposition = exposition
        self._end, self._config, self._daemon = end, config, daemon
        self._totals = Totals(end)
        exposition.answer(b"GET / HTTP/1.0\r\n\r\n", Snapshot(self._totals))  # imports the rest
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._scrapes = 0
        self._unwritten = Complaint(log.warning)
        daemon.history.added = self._count

    def _count(self, shown: Json) -> None:
        try:
            self._totals.add_ended(shown)
        except Exception:
            log.exception("internal error in counting a migration that has ended")

    async def serve(
        self, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled.  Files are written when the daemon has started.  Raises
        :class:`ConfigError` at the start, if nothing can be served as the configuration has it.
        """
        async with AsyncExitStack() as stack, trio.open_nursery() as tasks:
            listeners = await self._listen(stack)
            if listeners:
                serve = functools.partial(serve_connections, from_strangers=True)
                tasks.start_soon(isolated, "metrics", serve, "a scrape", self._answer, listeners)
            if self._config.textfiles:
                path = Path(self._config.textfiles) / f"xen-postcopy-{self._end}.prom"
                if not path.parent.is_dir():
                    raise ConfigError(f"[metrics] textfiles: {path.parent} is not a directory")
                tasks.start_soon(isolated, f"the file {path}", self._keep_file, path)
            task_status.started(listeners)

    async def _listen(self, stack: AsyncExitStack) -> list[trio.SocketListener]:
        where = self._config.listen(self._end)
        key = f"[metrics] {self._end}_listen"
        if where is None:
            return []
        try:
            if isinstance(where, Path):
                sock = await stack.enter_async_context(listen_unix(where))
                log.info("metrics at %s", where)
                return [trio.SocketListener(sock)]
            host, port = where
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{key}: cannot listen at {host}:{port}: {reason}") from error
        except MigrationError as error:
            raise ConfigError(f"{key}: {error}") from error
        port = listeners[0].socket.getsockname()[1]
        log.info("metrics at http://%s:%d/metrics", host, port)
        return listeners

    async def _snapshot(self) -> Snapshot:
        # Both are of one instant: a migration is in the totals or under way.
        totals, under_way = self._totals.copy(), self._daemon.snapshots()
        snapshot = Snapshot(totals)
        for shown in under_way:
            snapshot.under_way.append(shown)
            await trio.lowlevel.checkpoint()
        return snapshot

    # ---- over HTTP ----
    async def _answer(self, stream: trio.SocketStream) -> None:
        if self._scrapes >= MOST_SCRAPES:
            return
        self._scrapes += 1
        try:
            answer = b""
            with suppress(trio.BrokenResourceError):
                with trio.move_on_after(REQUEST_S):
                    if request := await _request(stream):
                        snapshot = await self._snapshot()
                        answer = await trio.to_thread.run_sync(
                            self._exposition.answer, request, snapshot, limiter=self._one_at_a_time
                        )
                with trio.move_on_after(ANSWER_S):
                    await stream.send_all(answer)
        finally:
            self._scrapes -= 1

    # ---- in a file ----
    async def _keep_file(self, path: Path) -> None:
        """Write the file again and again.  Remove it at the end, because the figures of a daemon
        that does not run would look like those of one that does.
        """
        await self._daemon.started.wait()
        file = Textfile(path)
        try:
            while True:
                try:
                    snapshot = await self._snapshot_between_downtimes()
                    await in_abandoned_thread(self._write, file, snapshot)
                except Exception as error:
                    self._unwritten.log("cannot write the metrics into %s: %s", path, error)
                await trio.sleep(self._config.textfile_every_s)
        finally:
            limit = trio.CancelScope(deadline=trio.current_time() + ANSWER_S, shield=True)
            with limit, suppress(OSError):
                await in_abandoned_thread(file.remove)

    async def _snapshot_between_downtimes(self) -> Snapshot:
        """Return a snapshot of an instant at which no guest is suspended, or the last one if some
        guest is for :data:`PATIENCE_S`.
        """
        ends_at = trio.current_time() + PATIENCE_S
        while True:
            snapshot = await self._snapshot()
            is_quiet = all(shown["phase"] != "switchover" for shown in snapshot.under_way)
            if is_quiet or trio.current_time() >= ends_at:
                return snapshot
            await trio.sleep(AGAIN_S)

    def _write(self, file: Textfile, snapshot: Snapshot) -> None:
        """Write the file anew.  Raises ``OSError``."""
        file.write(self._exposition.as_text(snapshot))


class Textfile:
    """The file at ``path``, which one thread at a time writes.  A thread that was abandoned may
    still write, and makes no file once the file was removed.
    """

    def __init__(self, path: Path):
        self._path = path
        self._new = path.with_suffix(".new")  # node_exporter reads names that end with .prom
        self._naming = threading.Lock()
        """Held while a file gets its name or loses it."""
        self._is_removed = False

    def write(self, text: bytes) -> None:
        """Replace the file.  Raises ``OSError``."""
        with self._naming:
            if self._is_removed:
                return
            descriptor = create_anew(self._new)  # the folder may be another user's
        try:
            with open(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o644)  # node_exporter is another user
                file.write(text)
            with self._naming:
                if not self._is_removed:
                    self._new.rename(self._path)
        except BaseException:
            self._new.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Remove the file for good.  Raises ``OSError``."""
        with self._naming:
            self._is_removed = True
            for path in (self._path, self._new):
                path.unlink(missing_ok=True)


async def _request(stream: trio.SocketStream) -> bytes:
    """Return a request up to the end of its headers; empty if it is not one."""
    request = b""
    while b"\r\n\r\n" not in request:
        data = await stream.receive_some(4096)
        if not data or len(request) > MOST_OF_A_REQUEST:
            return b""
        request += data
    return request
