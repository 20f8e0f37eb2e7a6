# SPDX-License-Identifier: GPL-2.0-or-later
"""The receiver daemon: a listener for lanes, a control socket, and the incoming migrations.

The sender of `xen-postcopy migrate` dials the listener.  For a request of xl's helper the receiver
dials the sender.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from migrate.control import server as control
from migrate.control.client import Json
from migrate.control.server import ControlConnection, decision_of
from migrate.errors import MigrationError, OccupiedError, UnknownSessionError
from migrate.lanes.accept import AwaitedLanes, Reception, listen_tcp
from migrate.lanes.dial import DialledLanes
from migrate.lanes.ends import RECEIVER
from migrate.lanes.pairs import rejoining
from migrate.logs import Complaint
from migrate.outcomes import outcome
from migrate.protocol.messages import Hello, Lane
from migrate.protocol.session import is_session_id
from migrate.service.config import Config
from migrate.service.history import Ended, History, still_kept
from migrate.service.host import look_at_host, refusal
from migrate.service.journal import Journal, Kept
from migrate.service.lifecycle import STOPPING, notify, serve_connections, until_stopped
from migrate.service.progress import keep_measuring, state_in_words
from migrate.tasks import first, isolated
from receiver.migration import IncomingMigration
from receiver.progress import IncomingProgress
from receiver.toolstack import XlToolstack
from xenbackend.contract import Hypervisor, ToolstackPorts

log = logging.getLogger(__name__)

MAX_MIGRATIONS = 1000
MAX_WITHOUT_OFFER = 256
"""The most migrations without an offer.  Each has a thread, for a minute at most."""
PROGRESS_EVERY_S = 0.2
NO_PROGRESS_TIMEOUT_S = 60.0
"""How long a client that waits for all of a guest's memory waits while no page arrives."""
NO_DOMAIN = -1
"""The number of a domain that has not been made."""


class ReceiverDaemon:
    def __init__(self, hypervisor: Hypervisor, socket_path: Path, config: Config, journal: Journal):
        self._hypervisor = hypervisor
        self._socket_path = socket_path
        self._address = config.receiver.listen
        self._terms = config.terms
        self._journal = journal
        self.history = History(journal.history())
        self.started = trio.Event()
        self._migrations: dict[str, IncomingMigration] = {}
        """The migrations by session, until they have ended and their sender is informed."""
        self._awaited: dict[str, AwaitedLanes] = {}
        """The lanes that a peer is to dial, by session."""
        look = functools.partial(look_at_host, hypervisor, config, RECEIVER)
        judge = functools.partial(refusal, hypervisor)
        self.reception = Reception(self._find_awaited, look, self._terms, judge)
        self._nursery: trio.Nursery
        self._port = 0
        self._stopping = False
        self._waiting = Complaint(log.warning)

    async def run(self) -> None:
        await until_stopped(self._serve, self._drain)

    async def _serve(self) -> None:
        """Serve until cancelled.  Nothing of a predecessor is touched before all that another
        daemon may have is this daemon's: the port, the journal and the control socket.
        """
        listeners, self._port = await listen_tcp(*self._address)
        self._journal.own()
        listening = control.listening(self._socket_path, needed=self._is_needed)
        async with trio.open_nursery() as self._nursery, listening as control_socket:
            self.history.load()
            for session, facts in self._journal.entries().items():
                try:
                    self._resume_migration(session, facts)
                except Exception as error:
                    self._awaited.pop(session, None)
                    offer = facts.get("offer")
                    name = offer.get("name") if isinstance(offer, dict) else ""
                    self._journal.leave(session, error, name, facts.get("domid"))
            await self._nursery.start(control.serve, control_socket, self._handle)
            serve = functools.partial(serve_connections, from_strangers=True)
            await self._nursery.start(serve, "a connection", self.reception.receive, listeners)
            self.started.set()
            notify(f"READY=1\nSTATUS=listening at {self._address[0]}:{self._port}")
            log.info(
                "receiver listening at %s:%d, control socket %s",
                self._address[0],
                self._port,
                self._socket_path,
            )
            await trio.sleep_forever()

    def _resume_migration(self, session: str, facts: dict[str, Any]) -> None:
        """Resume a migration that a predecessor has left."""
        lanes_again = rejoining(session, facts, self._awaited, self._terms)
        migration = IncomingMigration.of_predecessor(
            self._hypervisor, session, lanes_again, self._journal, facts
        )
        if any(_are_of_one_domain(migration, newer) for newer in self._migrations.values()):
            raise OccupiedError(f"{migration.domain_name} is incoming already")
        self._journal.write(session, {**facts, **lanes_again.facts()}, needed=False)
        self._start(migration)

    async def _drain(self) -> bool:
        if not self._stopping:
            self._stopping = True
            for migration in self._migrations.values():
                migration.requests.cancel("the receiver is being stopped")
        needed = self._needed()
        if needed:
            for migration in needed:
                migration.measurement.count()
            waiting = ", ".join(
                f"{m.domain_name} ({m.measurement.outstanding_in_words})" for m in needed
            )
            notify(f"STATUS=stopping, but guests that run here still need their pager: {waiting}")
            self._waiting.log(
                "waiting for guests that run here: %s", waiting, about=[m.id for m in needed]
            )
        unfinished = self._unfinished()
        if unfinished and not needed:
            undone = ", ".join(
                state_in_words(m.domain_name, m.phase, m.progress.problem) for m in unfinished
            )
            notify(f"STATUS=stopping, but incoming domains must be destroyed before: {undone}")
        return bool(unfinished)

    def snapshots(self) -> Iterator[Json]:
        """See :class:`migrate.metrics.serve.Daemon`."""
        return map(_shown, [m for m in self._migrations.values() if m.id not in self.history])

    def guests_in_need(self) -> list[str]:
        return [migration.domain_name for migration in self._needed()]

    def _needed(self) -> list[IncomingMigration]:
        """Return the migrations whose guests depend on this daemon."""
        return [m for m in self._migrations.values() if m.needed]

    def _unfinished(self) -> list[IncomingMigration]:
        """Return the migrations for which this daemon has something to do.  One that is being taken
        back has a domain with memory until it is destroyed.
        """
        return [m for m in self._migrations.values() if m.needed or not m.ended.is_set()]

    def _is_needed(self) -> bool:
        return bool(self._needed())

    async def _handle(self, request: Json, connection: ControlConnection) -> None:
        match request["command"]:
            case "list":
                kept = await still_kept(self._journal)
                every = bool(request.get("all"))
                listed = self.history.listed(self._migrations, _line, of_predecessors=every)
                # Without the history, `list` is answered also when no thread can be started.
                answer = connection.answer_at_length if every else connection.answer
                await answer("result", migrations=listed, kept=list(map(kept_line, kept)))
            case "show":
                shown = self.history.shown(await self._look_up(request), _shown)
                await connection.answer("result", **shown)
            case "record":
                recorded = await self.history.recorded(await self._look_up(request), _shown)
                await connection.answer_at_length("result", **recorded)
            case "status":
                guests = [m.domain_name or "a guest" for m in self._unfinished()]
                await connection.answer("result", port=self._port, guests=guests)
            case "restore":
                await self._restore(request, connection)
            case "await-memory":
                await self._await_memory(int(request["domid"]), connection)
            case "reconnect":
                (await self._find(request)).requests.reconnect()
                await connection.answer("result")
            case "check-decision":
                migration = await self._find(request)
                await migration.requests.check_decision(**decision_of(request))
                await connection.answer("result")
            case "decide":
                migration = await self._find(request)
                await migration.requests.decide(**decision_of(request))
                await connection.answer("result")
            case "cancel":
                (await self._find(request)).requests.ask_to_cancel()
                await connection.answer("result")
            case "postcopy-now" | "set" | "pause" | "resume":
                name = (await self._look_up(request)).domain_name
                raise MigrationError(f"{name} is incoming: ask the sender at its source for that")
            case "migrate" | "save" | "estimate" as other:
                raise MigrationError(f"this is the receiver's socket; `{other}` needs the sender's")
            case other:
                raise MigrationError(f"unknown command {other!r}")

    async def _look_up(self, request: Json) -> IncomingMigration | Ended:
        kept = await still_kept(self._journal)
        return self.history.find(self._migrations, request["migration"], kept)

    async def _find(self, request: Json) -> IncomingMigration:
        kept = await still_kept(self._journal)
        return self.history.find_under_way(self._migrations, request, kept)

    def _find_awaited(self, greeting: Hello) -> AwaitedLanes:
        """Return the lanes to which a connection belongs.  A push lane without a token begins a
        migration.
        """
        if greeting.lane == Lane.PULL.value or greeting.token:
            self._journal.check_understood(greeting.session)
            if greeting.session not in self._awaited:
                raise UnknownSessionError(
                    f"a {greeting.lane} lane for a session that this receiver does not have"
                )
            return self._awaited[greeting.session]
        self._check(greeting.session)
        awaited = self._awaited[greeting.session] = AwaitedLanes()
        self._start(
            IncomingMigration.of_offer(
                self._hypervisor,
                greeting.session,
                awaited,
                self._journal,
                others=self._others(greeting.session),
            )
        )
        return awaited

    async def _restore(self, request: Json, connection: ControlConnection) -> None:
        """Carry out a request of xl's helper for the migration that xl's stream names."""
        session, (host, port) = str(request["session"]), request["address"]
        self._check(session)
        token = bytes.fromhex(request["token"])
        dialled = DialledLanes((str(host), int(port)), session, self._terms, token)
        toolstack = XlToolstack(
            int(request["domid"]), ToolstackPorts(**request["ports"]), connection
        )
        taken = [
            m for m in self._migrations.values() if m.domid == toolstack.domid and not m.has_ended
        ]
        if taken:
            raise MigrationError(
                f"domain {toolstack.domid} is being restored already: migration "
                f"{taken[0].id[:8]} of {taken[0].domain_name}"
            )
        migration = IncomingMigration.of_offer(
            self._hypervisor, session, dialled, self._journal, toolstack, self._others(session)
        )
        self._start(migration)
        await first(
            functools.partial(self._listen_to_helper, migration, connection),
            toolstack.last_answer.given.wait,
            migration.ended.wait,
        )
        if migration.ended.is_set():  # for example, because the domain was destroyed
            await toolstack.failed(migration.progress.problem)

    async def _await_memory(self, domid: int, connection: ControlConnection) -> None:
        """Wait until no page of a domain is missing, for xl's helper, which has to save the domain.

        Raises :class:`MigrationError` if the pages cannot be expected to arrive.
        """
        for entry in await still_kept(self._journal):
            if entry.domid in (domid, None):
                raise MigrationError(f"memory of the guest may have still to come: {entry.problem}")
        for migration in [
            m for m in self._migrations.values() if m.domid == domid and not m.has_ended
        ]:
            least = before = None
            patience_ends = trio.current_time() + NO_PROGRESS_TIMEOUT_S
            while not migration.has_ended and migration.domid == domid:
                missing = migration.missing
                if migration.is_lost:
                    raise MigrationError(migration.progress.problem)
                if missing is not None and (least is None or missing < least):
                    least, patience_ends = missing, trio.current_time() + NO_PROGRESS_TIMEOUT_S
                    before = missing if before is None else before
                if trio.current_time() > patience_ends:
                    if missing == 0:
                        break
                    raise MigrationError(_why_not_to_save(migration))
                arrived = 0 if before is None or missing is None else before - missing
                await connection.answer("progress", arrived=arrived, missing=before or 0)
                with trio.move_on_after(PROGRESS_EVERY_S):
                    await migration.ended.wait()
        await connection.answer("result")

    async def _listen_to_helper(
        self, migration: IncomingMigration, connection: ControlConnection
    ) -> None:
        """Leave the domain to xl when the helper sends a request or closes the connection.  Returns
        when the connection is closed.
        """
        while await connection.request() is not None:
            migration.requests.cancel("xl's own live migration takes over")
        migration.requests.cancel("xl has ended")

    def _check(self, session: str) -> None:
        if self._stopping:
            raise MigrationError(STOPPING)
        if not is_session_id(session):
            raise MigrationError("a session id is made of letters and digits")
        if session in self._migrations or session in self.history:
            raise MigrationError("a session id that is in use")
        self._journal.check_understood(session)  # otherwise the entry would be replaced
        if len(self._migrations) >= MAX_MIGRATIONS:
            raise MigrationError("too many migrations")
        waiting = [m for m in self._migrations.values() if not m.domain_name and not m.has_ended]
        if len(waiting) >= MAX_WITHOUT_OFFER:
            raise MigrationError("too many sessions that have not offered a guest yet")

    def _start(self, migration: IncomingMigration) -> None:
        self._migrations[migration.id] = migration
        self._nursery.start_soon(self._carry_out, migration)
        measured, ended = migration.measurement, migration.ended
        self._nursery.start_soon(keep_measuring, measured.count, ended)
        self._nursery.start_soon(keep_measuring, measured.sample, ended, measured.sampling_pause_s)

    def _others(self, session: str) -> Callable[[], list[IncomingMigration]]:
        return lambda: [other for other in self._migrations.values() if other.id != session]

    async def _carry_out(self, migration: IncomingMigration) -> None:
        about = f"the migration of {migration.domain_name or 'a guest'}"
        try:
            await isolated(about, migration.run)
            await isolated(f"the end of {about}", self._note, migration)
            amend = self.history.follow(migration)
            await isolated(f"the end of {about}", migration.linger, amend)
            await isolated(f"the end of {about}", amend)
        finally:
            awaited = self._awaited.pop(migration.id, None)
            if awaited is not None:
                awaited.close()
        if migration.has_ended:
            self._migrations.pop(migration.id, None)

    async def _note(self, migration: IncomingMigration) -> None:
        if migration.has_ended:
            migration.measurement.sample()
            await self.history.add(_shown(migration), migration.recorded)


def _why_not_to_save(migration: IncomingMigration) -> str:
    """State why the missing pages of a guest cannot be expected to arrive."""
    name, missing, again = migration.domain_name, migration.missing, "(xen-postcopy list)"
    if missing is None:
        problem = migration.progress.problem or migration.phase
        return (
            f"it is not known yet how many pages of {name} are missing ({problem}): try again when "
            f"the migration continues {again}"
        )
    return (
        f"{missing} pages of {name} have still to come, and none has come for "
        f"{NO_PROGRESS_TIMEOUT_S:g} s: try again when they have {again}"
    )


def _are_of_one_domain(one: IncomingMigration, other: IncomingMigration) -> bool:
    """Whether two migrations are of one domain.  The name stands for the domain for as long as the
    journal does not have the domain's number.
    """
    if NO_DOMAIN in (one.domid, other.domid):
        return one.domain_name == other.domain_name
    return one.domid == other.domid


def _shown(migration: IncomingMigration, ended_at: float | None = None) -> Json:
    """Return all that is known of a migration, for ``show``."""
    known = migration.requests.known_of_peer
    return {**_line(migration, ended_at), "details": migration.details(), "known": known}


def _line(migration: IncomingMigration, ended_at: float | None = None) -> Json:
    migration.measurement.count()
    return {
        "id": migration.id,
        "direction": "incoming",
        "domid": migration.domid,
        "peer": migration.lanes.peer,
        "unknown": migration.measurement.unknown,
        "phase": migration.phase,
        "outcome": outcome(migration.phase, migration.progress.problem),
        **asdict(migration.progress),
        "ended_at": ended_at,
    }


def kept_line(entry: Kept) -> Json:
    """Return an entry of the journal whose migration was not resumed, with the keys of
    :func:`_line`.
    """
    progress = IncomingProgress(entry.domain, problem=entry.problem)
    line = {
        "id": entry.session,
        "direction": "incoming",
        "domid": None,
        "ended_at": None,
        "peer": "",
        "phase": "",
        "outcome": "",
        **asdict(progress),
    }
    return {**line, "unknown": [key for key, value in line.items() if not value]}
