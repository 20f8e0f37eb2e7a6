"""The sender daemon: a control socket, and the migrations that it was asked for."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from migrate import control
from migrate.control import ControlConnection, Json
from migrate.daemon import notify, until_stopped
from migrate.errors import MigrationError
from migrate.policy import PolicyOptions, Strategy
from migrate.tasks import root_cause
from migrate.transport import parse_address
from sender.migration import MigrationOptions, OutgoingMigration
from xenbackend.contract import Hypervisor, XenError

log = logging.getLogger(__name__)

DEFAULT_PORT = 8013
PROGRESS_EVERY_S = 0.2
KEPT = 100
"""Ended migrations that ``list`` still shows."""


class SenderDaemon:
    def __init__(self, hypervisor: Hypervisor, socket_path: Path):
        self._hypervisor = hypervisor
        self._socket_path = socket_path
        self._migrations: dict[str, OutgoingMigration] = {}
        self._active: set[str] = set()
        self._nursery: trio.Nursery
        self._idle = trio.Event()

    async def run(self) -> None:
        await until_stopped(self._serve, self._drain)

    async def _serve(self) -> None:
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(control.serve, self._socket_path, self._handle)
            notify("READY=1\nSTATUS=waiting for migrations")
            log.info("sender ready at %s", self._socket_path)

    async def _drain(self) -> None:
        for migration in self._running():
            try:
                migration.cancel("the sender is being stopped")
            except MigrationError:
                log.warning(
                    "waiting for %s: %d pages are to be fetched",
                    migration.domain_name,
                    migration.progress.outstanding,
                )
        while self._active:
            self._idle = trio.Event()
            await self._idle.wait()

    def _running(self) -> list[OutgoingMigration]:
        return [self._migrations[migration_id] for migration_id in self._active]

    # ---- requests ----
    async def _handle(self, request: Json, connection: ControlConnection) -> None:
        match request["command"]:
            case "list":
                await connection.answer("result", migrations=[_line(m) for m in self._migrations.values()])
            case "migrate":
                await self._migrate(request, connection)
            case "cancel":
                self._find(request["migration"]).cancel("cancelled by the operator")
                await connection.answer("result")
            case "postcopy-now":
                self._find(request["migration"]).postcopy_now()
                await connection.answer("result")
            case other:
                raise MigrationError(f"unknown command {other!r}")

    def _find(self, name: str) -> OutgoingMigration:
        """By id (or its beginning), or by the domain's name."""
        found = [m for m in self._running() if m.id.startswith(name) or m.domain_name == name]
        if len(found) != 1:
            raise MigrationError(f"{'no' if not found else 'more than one'} migration {name!r} is under way")
        return found[0]

    async def _migrate(self, request: Json, connection: ControlConnection) -> None:
        domain, destination = str(request["domain"]), parse_address(str(request["destination"]), DEFAULT_PORT)
        options = MigrationOptions(
            Strategy(request.get("strategy", "hybrid")),
            PolicyOptions(**request.get("policy", {})),
            request.get("bandwidth"),
        )
        if any(m.domain_name == domain for m in self._running()):
            raise MigrationError(f"domain {domain} is being migrated already: see `xen-postcopy list`")
        migration = OutgoingMigration(self._hypervisor, domain, destination, options)
        ended = trio.Event()
        self._migrations[migration.id] = migration
        self._active.add(migration.id)
        # The migration is the daemon's, not the connection's: a client that goes away does not end it.
        self._nursery.start_soon(self._carry_out, migration, ended)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, migration, connection)
                while not ended.is_set():
                    await connection.answer("progress", **_line(migration))
                    with trio.move_on_after(PROGRESS_EVERY_S):
                        await ended.wait()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise root_cause(group) from None
        if migration.progress.phase != "completed":
            raise MigrationError(migration.progress.problem)
        await connection.answer("result", result=migration.result())

    async def _listen(self, migration: OutgoingMigration, connection: ControlConnection) -> None:
        """What the client says meanwhile."""
        while (request := await connection.request()) is not None:
            try:
                match request.get("command"):
                    case "cancel":
                        migration.cancel("interrupted by the user")
                    case "postcopy-now":
                        migration.postcopy_now()
            except MigrationError as error:
                await connection.answer("notice", message=str(error))

    async def _carry_out(self, migration: OutgoingMigration, ended: trio.Event) -> None:
        try:
            await migration.run()
        except (MigrationError, XenError) as error:
            migration.progress.problem = migration.progress.problem or str(error)
            if migration.progress.phase not in ("failed", "interrupted"):
                migration.progress.phase = "failed"
            log.warning("%s: %s: %s", migration.id, migration.domain_name, migration.progress.problem)
        except Exception as error:
            migration.progress.problem = f"internal error: {error!r}"
            log.exception("%s: %s: internal error", migration.id, migration.domain_name)
        finally:
            self._active.discard(migration.id)
            ended.set()
            self._idle.set()
            self._forget()

    def _forget(self) -> None:
        ended = [m.id for m in self._migrations.values() if m.progress.phase in ("completed", "failed")]
        for migration_id in ended[:-KEPT]:
            del self._migrations[migration_id]


def _line(migration: OutgoingMigration) -> dict[str, Any]:
    return {
        "id": migration.id,
        "direction": "outgoing",
        "domain": migration.domain_name,
        "peer": ":".join(map(str, migration.destination)),
        "strategy": migration.options.strategy.value,
        "handed_over": migration.session.handed_over,
        **asdict(migration.progress),
    }
