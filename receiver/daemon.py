"""The receiver daemon: a listener for lanes, a control socket, and the migrations that come in."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import trio

from migrate import control
from migrate.control import ControlConnection, Json
from migrate.daemon import notify, until_stopped
from migrate.errors import MigrationError
from migrate.messages import Lane
from migrate.session import hello, negotiate
from migrate.transport import LaneConnection
from receiver.migration import IncomingMigration
from xenbackend.contract import Hypervisor, XenError

log = logging.getLogger(__name__)

MAX_MIGRATIONS = 1000
KEPT = 100
"""Ended migrations that ``list`` still shows."""
ENDED = ("completed", "failed", "refused")


class ReceiverDaemon:
    def __init__(self, hypervisor: Hypervisor, socket_path: Path, host: str, port: int):
        self._hypervisor = hypervisor
        self._socket_path = socket_path
        self._address = (host, port)
        self._migrations: dict[str, IncomingMigration] = {}
        self._port = port

    async def run(self) -> None:
        await until_stopped(self._serve, self._drain)

    async def _serve(self) -> None:
        host, port = self._address
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            raise MigrationError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
        self._port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(control.serve, self._socket_path, self._handle)
            await nursery.start(trio.serve_listeners, self._serve_lane, listeners)
            notify(f"READY=1\nSTATUS=listening at {host}:{self._port}")
            log.info("receiver listening at %s:%d, control socket %s", host, self._port, self._socket_path)

    async def _drain(self) -> None:
        for migration in self._migrations.values():
            migration.cancel()
        while needed := [m for m in self._migrations.values() if m.needed]:
            for migration in needed:
                log.warning(
                    "waiting for %s: it runs here, and %d of its pages are missing still",
                    migration.progress.domain,
                    migration.progress.outstanding,
                )
            await trio.sleep(5)

    async def _handle(self, request: Json, connection: ControlConnection) -> None:
        match request["command"]:
            case "list":
                await connection.answer("result", migrations=[_line(m) for m in self._migrations.values()])
            case "status":
                await connection.answer("result", port=self._port)
            case other:
                raise MigrationError(f"unknown command {other!r}")

    async def _serve_lane(self, stream: trio.SocketStream) -> None:
        lane = LaneConnection.from_stream(stream)
        try:
            greeting = await lane.receive_hello()
            await lane.send(hello(Lane(greeting.lane), greeting.session))
            negotiate(greeting)
            if greeting.lane == Lane.PULL.value:
                await self._attach(greeting.session, greeting.token, lane).ended.wait()
                return
            if greeting.session in self._migrations or not greeting.session:
                raise MigrationError("a session id that is in use")
            if len(self._migrations) >= MAX_MIGRATIONS:
                raise MigrationError("too many migrations")
        except (MigrationError, XenError) as error:
            log.warning("connection refused: %s", error)
            lane.close()
            return
        migration = IncomingMigration(self._hypervisor, greeting.session, lane)
        self._migrations[migration.id] = migration
        await migration.run()
        self._forget()

    def _attach(self, session: str, token: bytes, lane: LaneConnection) -> IncomingMigration:
        migration = self._migrations.get(session)
        if migration is None:
            raise MigrationError("a pull lane for a session that is not here")
        migration.attach_pull_lane(lane, token)
        return migration

    def _forget(self) -> None:
        ended = [m.id for m in self._migrations.values() if m.progress.phase in ENDED]
        for migration_id in ended[:-KEPT]:
            del self._migrations[migration_id]


def _line(migration: IncomingMigration) -> Json:
    return {"id": migration.id, "direction": "incoming", **asdict(migration.progress)}
