# SPDX-License-Identifier: GPL-2.0-or-later
"""The sender daemon: a control socket, a listener for lanes, and the migrations under way.

For a request of the command line the sender dials the receiver.  For a request of xl's helper the
receiver dials: only xl's stream has the address of the other end, and the stream goes one way.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import time
from collections.abc import Iterator
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
from migrate.lanes.ends import RECEIVER_PORT, SENDER
from migrate.lanes.pairs import rejoining
from migrate.logs import Complaint
from migrate.options import MigrationOptions, Strategy, policy_of
from migrate.outcomes import outcome
from migrate.protocol.messages import Hello
from migrate.protocol.session import new_id, new_token
from migrate.service.config import Config, advertised
from migrate.service.history import Ended, History, still_kept
from migrate.service.host import look_at_host
from migrate.service.journal import Journal
from migrate.service.lifecycle import STOPPING, notify, serve_connections, until_stopped
from migrate.service.progress import keep_measuring, state_in_words
from migrate.tasks import is_bug, isolated, task_group
from migrate.units import parse_dialled
from sender import adjustments
from sender.estimates import Estimates
from sender.guests import guests_here, names_here, room_at, uuid_of
from sender.migration import OutgoingMigration
from sender.ownership import State
from sender.preflight import check_free
from sender.progress import kept_line
from sender.toolstack import XlToolstack
from xenbackend.contract import DomainId, Hypervisor
from xenbackend.errors import XenError
from xenbackend.find import find_domain
from xenbackend.keeper import end_keeper

log = logging.getLogger(__name__)

PROGRESS_EVERY_S, IDLE_EVERY_S = 0.2, 2.0
REQUESTS = (
    "cancel", "postcopy-now", "reconnect", "set", "pause", "resume", "check-decision", "decide",
)  # fmt: skip
"""What a client asks of one migration, and is answered when the request has been carried out."""
RECORDED = ("set", "pause", "resume")
"""Those that the record of the migration has."""


class SenderDaemon:
    def __init__(self, hypervisor: Hypervisor, socket_path: Path, config: Config, journal: Journal):
        self._hypervisor = hypervisor
        self._socket_path = socket_path
        self._config = config
        self._journal = journal
        self.history = History(journal.history())
        self.started = trio.Event()
        self._port = 0
        self._migrations: dict[str, OutgoingMigration] = {}
        """The migrations by session, until they have ended and their destination is informed."""
        self._active: set[str] = set()
        self._awaited: dict[str, AwaitedLanes] = {}
        """The lanes that a peer is to dial, by session."""
        self._estimates = Estimates(hypervisor, config.terms, journal)
        self._nursery: trio.Nursery
        self._stopping = False
        self._waiting = Complaint(log.warning)

    async def run(self) -> None:
        await until_stopped(self._serve, self._drain)

    def snapshots(self) -> Iterator[Json]:
        """See :class:`migrate.metrics.serve.Daemon`."""
        return map(_shown, [m for m in self._migrations.values() if m.id not in self.history])

    def guests_in_need(self) -> list[str]:
        """The names of the guests elsewhere whose missing pages are here."""
        return [m.domain_name for m in self._migrations.values() if m.keeps_pages]

    async def _serve(self) -> None:
        """Serve until cancelled.  Nothing of a predecessor is touched before all that another
        daemon may have is this daemon's: the port, the journal and the control socket.
        """
        listeners, self._port = await listen_tcp(*self._config.sender.listen)
        self._journal.own()
        listening = control.listening(self._socket_path)
        async with trio.open_nursery() as self._nursery, listening as control_socket:
            self.history.load()
            for session, facts in self._journal.entries().items():
                try:
                    self._resume_migration(session, facts)
                except Exception as error:
                    self._awaited.pop(session, None)
                    self._journal.leave(session, error, facts.get("domain"))
            await trio.to_thread.run_sync(self._estimates.end_predecessors)
            self._nursery.start_soon(isolated, "ending keepers", self._end_keepers)
            await self._nursery.start(control.serve, control_socket, self._handle)
            look = functools.partial(look_at_host, self._hypervisor, self._config, SENDER)
            reception = Reception(self._find_awaited, look, self._config.terms)
            serve = functools.partial(serve_connections, from_strangers=True)
            await self._nursery.start(serve, "a connection", reception.receive, listeners)
            self.started.set()
            notify("READY=1\nSTATUS=waiting for migrations")
            log.info(
                "sender ready at %s, listening at %s:%d",
                self._socket_path,
                self._config.sender.listen[0],
                self._port,
            )
            await trio.sleep_forever()

    def _resume_migration(self, session: str, facts: dict[str, Any]) -> None:
        """Resume a migration that a predecessor has left."""
        lanes_again = rejoining(session, facts, self._awaited, self._config.terms)
        migration = OutgoingMigration.of_predecessor(
            session, self._hypervisor, lanes_again, self._journal, facts
        )
        if migration.ownership.state is State.GIVEN_UP:  # its domain is free for another migration
            self._migrations[session] = migration
        else:
            self._admit(migration)
        self._journal.write(session, {**facts, **lanes_again.facts()}, needed=False)
        self._begin(migration)

    async def _end_keepers(self) -> None:
        """End the keepers of predecessors that no migration needs."""
        left = await trio.to_thread.run_sync(self._journal.keepers)
        for session, path in left.items():
            if session not in self._active and session not in self._journal.kept:
                await trio.to_thread.run_sync(end_keeper, path)

    async def _drain(self) -> bool:
        if not self._stopping:
            self._stopping = True
            for migration in self._running():
                with contextlib.suppress(MigrationError):  # it may be too late to cancel
                    migration.requests.cancel("because the sender is being stopped")
        needed = self._unfinished()
        if needed:
            waiting = _waited_for(needed)
            notify(f"STATUS=stopping, but waiting for {waiting}")
            about = [(m.id, m.keeps_pages) for m in needed]
            self._waiting.log("waiting for %s", waiting, about=about)
        return bool(needed)

    def _unfinished(self) -> list[OutgoingMigration]:
        """Return the migrations for which this daemon has something to do."""
        return [m for m in self._migrations.values() if m.id in self._active or m.holds_pages]

    def _running(self) -> list[OutgoingMigration]:
        return [self._migrations[migration_id] for migration_id in self._active]

    # ---- requests ----
    async def _handle(self, request: Json, connection: ControlConnection) -> None:
        match request["command"]:
            case "list":
                kept = await still_kept(self._journal)
                every = bool(request.get("all"))
                listed = self.history.listed(self._migrations, _line, of_predecessors=every)
                # Without the history, `list` is answered also when no thread can be started.
                answer = connection.answer_at_length if every else connection.answer
                await answer("result", migrations=listed, kept=[kept_line(entry) for entry in kept])
            case "show":
                shown = self.history.shown(await self._look_up(request), _shown)
                await connection.answer("result", **shown)
            case "record":
                recorded = await self.history.recorded(await self._look_up(request), _shown)
                await connection.answer_at_length("result", **recorded)
            case "status":
                guests = [m.domain_name for m in self._unfinished()]
                await connection.answer("result", port=self._port, guests=guests)
            case "migrate":
                await self._migrate(request, connection)
            case "estimate":
                domain, address, options = await self._requested(request)
                self._check_unused(domain)
                await self._estimates.answer(request, connection, domain, address, options)
            case "domains":
                named = await trio.to_thread.run_sync(names_here, self._hypervisor)
                await connection.answer("result", **named)
            case "guests":
                names = list(request.get("names", ()))
                look = functools.partial(guests_here, self._hypervisor, self._estimates, names)
                await connection.answer("result", **await trio.to_thread.run_sync(look))
            case "room":
                address = parse_dialled(str(request["destination"]), RECEIVER_PORT)
                await connection.answer("result", **await room_at(address, self._config.terms))
            case "save":
                await self._save(request, connection)
            case word if word in REQUESTS:
                migration = await self._find(request)
                await self._act(word, migration, request)
                if word in RECORDED:
                    migration.context.record.mark(time.time(), word, request.get("values"))
                await connection.answer("result")
            case "restore" | "await-memory" as other:
                raise MigrationError(f"this is the sender's socket; `{other}` needs the receiver's")
            case other:
                raise MigrationError(f"unknown command {other!r}")

    async def _act(self, word: str, migration: OutgoingMigration, request: Json) -> None:
        """Carry out one of :data:`REQUESTS`."""
        match word:
            case "cancel":
                migration.requests.ask_to_cancel()
            case "postcopy-now":
                migration.requests.postcopy_now()
            case "reconnect":
                migration.requests.reconnect()
            case "set":
                await adjustments.change(migration.context, dict(request["values"]))
            case "pause":
                await adjustments.pause(migration.context)
            case "resume":
                await adjustments.resume(migration.context)
            case "check-decision":
                await migration.requests.check_decision(**decision_of(request))
            case "decide":
                # A migration that has ended with an error may still keep pages.
                if await migration.requests.decide(**decision_of(request)):
                    self._nursery.start_soon(self._end, migration)

    async def _look_up(self, request: Json) -> OutgoingMigration | Ended:
        kept = await still_kept(self._journal)
        return self.history.find(self._migrations, request["migration"], kept)

    async def _find(self, request: Json) -> OutgoingMigration:
        kept = await still_kept(self._journal)
        return self.history.find_under_way(self._migrations, request, kept)

    async def _requested(self, request: Json) -> tuple[DomainId, tuple[str, int], MigrationOptions]:
        """Return the guest, the destination and the options in a request of the command line."""
        destination = parse_dialled(str(request["destination"]), RECEIVER_PORT)
        domains = await trio.to_thread.run_sync(self._hypervisor.domains)
        domain = find_domain(domains, str(request["domain"])).id
        options = MigrationOptions(
            Strategy(request.get("strategy", "hybrid")),
            policy_of(request.get("policy", {})),
            request.get("bandwidth"),
            request.get("checkpoint_every_s"),
            bool(request.get("take_log_dirty")),
            request.get("postcopy_bandwidth"),
        )
        return domain, destination, options

    async def _migrate(self, request: Json, connection: ControlConnection) -> None:
        """Carry out a request of the command line."""
        domain, destination, options = await self._requested(request)
        session = new_id()
        dialled = DialledLanes(destination, session, self._config.terms)
        migration = OutgoingMigration.of_request(
            session, self._hypervisor, domain, dialled, options, self._journal
        )
        ended = self._start(migration)
        async with task_group() as tasks:
            tasks.start_soon(self._listen, migration, connection)
            while not ended.is_set():
                await connection.answer("progress", **_line(migration))
                with trio.move_on_after(
                    IDLE_EVERY_S if migration.ownership.is_cut_off else PROGRESS_EVERY_S
                ):
                    await ended.wait()
            tasks.cancel_scope.cancel()
        if migration.ownership.state is not State.COMPLETED:
            raise MigrationError(migration.progress.problem)
        await connection.answer("result", result=migration.result())

    async def _save(self, request: Json, connection: ControlConnection) -> None:
        """Carry out a request of xl's helper.  xl's stream carries the sender's address to the
        receiver, and the receiver dials.
        """
        session, token = new_id(), new_token()
        awaited = AwaitedLanes(token, timeout_s=self._config.sender.peer_timeout_s)
        options = self._config.migration.options(request.get("strategy"))
        # In a thread, because the call may ask a name server.
        host, port = await trio.to_thread.run_sync(advertised, self._config.sender, self._port)
        try:
            self._estimates.check_unmeasured(int(request["domid"]))
            target, policy = await trio.to_thread.run_sync(self._look_at, int(request["domid"]))
            self._check_unused(target)  # before the toolstack takes a descriptor
            keeper, xl = self._journal.keeper(session), int(request.get("xl", 0))
            toolstack = XlToolstack(target.name, keeper, connection, xl)
            migration = OutgoingMigration.of_request(
                session,
                self._hypervisor,
                target,
                awaited,
                options,
                self._journal,
                toolstack=toolstack,
            )
            self._admit(migration)
        except OccupiedError as error:
            # Xen's own live migration must not touch the domain either.
            await connection.answer("refused", message=str(error))
            return
        try:
            await connection.answer(
                "offer",
                session=session,
                address=[host, port],
                token=token.hex(),
                cpu_policy=[base64.b64encode(part).decode() for part in policy],
            )
        except BaseException:
            toolstack.close()
            self._active.discard(session)
            del self._migrations[session]
            raise
        self._awaited[session] = awaited
        ended = self._begin(migration)
        async with task_group() as tasks:
            tasks.start_soon(self._listen_to_helper, migration, toolstack)
            while not (toolstack.last_answer.given.is_set() or ended.is_set()):
                # xl's line would lengthen the downtime: daemon, helper and libxl all work for it.
                if not migration.ownership.is_suspended:
                    await connection.answer("progress", **_line(migration))
                with trio.move_on_after(PROGRESS_EVERY_S):
                    await toolstack.last_answer.given.wait()
            tasks.cancel_scope.cancel()
        await toolstack.failed(migration.progress.problem)  # for example, of a domain that is gone

    def _look_at(self, domid: int) -> tuple[DomainId, tuple[bytes, bytes]]:
        """Return the domain's identity and its CPU policy.  Raises as :func:`check_free` does."""
        with self._hypervisor.open(domid) as domain:
            check_free(domain, MigrationOptions())
            return domain.info().id, domain.cpu_policy()

    async def _listen_to_helper(self, migration: OutgoingMigration, toolstack: XlToolstack) -> None:
        await toolstack.listen()
        if not toolstack.last_answer.begun:
            migration.requests.cancel("because xl, or its helper, has ended")

    def _find_awaited(self, greeting: Hello) -> AwaitedLanes:
        awaited = self._awaited.get(greeting.session)
        if awaited is None:
            self._journal.check_understood(greeting.session)
            raise UnknownSessionError(
                "this is a sender, which has no such session; receivers listen on port "
                f"{RECEIVER_PORT} by default"
            )
        return awaited

    def _start(self, migration: OutgoingMigration) -> trio.Event:
        """Start the migration as a task of the daemon, so that it does not end with the client."""
        self._admit(migration)
        return self._begin(migration)

    def _admit(self, migration: OutgoingMigration) -> None:
        """Admit the migration, and no other migration of its domain.  Raises as
        :meth:`_check_unused`.
        """
        self._check_unused(migration.domain)
        self._migrations[migration.id] = migration
        self._active.add(migration.id)

    def _check_unused(self, domain: DomainId) -> None:
        """Raises :class:`OccupiedError` for a domain that is being migrated or measured, and
        :class:`MigrationError` if this daemon is being stopped.
        """
        if self._stopping:
            raise MigrationError(STOPPING)
        if any(m.domain.domid == domain.domid for m in self._running()):
            raise OccupiedError(
                f"domain {domain.name} is being migrated already: see `xen-postcopy list`"
            )
        self._estimates.check_unmeasured(domain.domid)

    def _begin(self, migration: OutgoingMigration) -> trio.Event:
        """Start the migration's task.  Returns the event that is set when the task has ended."""
        ended = trio.Event()
        self._nursery.start_soon(self._carry_out, migration, ended)
        context = migration.context
        self._nursery.start_soon(keep_measuring, context.measure, ended)
        samples = context.record.samples
        self._nursery.start_soon(keep_measuring, context.sample, ended, lambda: samples.pause_s)
        return ended

    async def _listen(self, migration: OutgoingMigration, connection: ControlConnection) -> None:
        """Carry out what the client sends during the migration."""
        while (request := await connection.request()) is not None:
            try:
                match request.get("command"):
                    case "cancel":
                        migration.requests.cancel("by Ctrl-C")
                    case "postcopy-now":
                        migration.requests.postcopy_now()
            except MigrationError as error:
                await connection.answer("notice", message=str(error))

    async def _carry_out(self, migration: OutgoingMigration, ended: trio.Event) -> None:
        await self._run(migration, ended)
        await self._end(migration)

    async def _run(self, migration: OutgoingMigration, ended: trio.Event) -> None:
        try:
            await migration.run()
        except (MigrationError, XenError) as error:
            migration.progress.problem = migration.progress.problem or str(error)
            problem = migration.progress.problem
            log.warning("%s: %s", migration.domain_name, problem, exc_info=is_bug(error))
        except Exception as error:
            migration.progress.problem = f"internal error: {error!r}"
            log.exception("%s: internal error", migration.domain_name)
        finally:
            self._active.discard(migration.id)
            ended.set()

    async def _end(self, migration: OutgoingMigration) -> None:
        """Note a migration that has ended, and send the destination the outcome, if it has not been
        sent.
        """
        about = f"the end of the migration of {migration.domain_name}"
        await isolated(about, self._note, migration)
        amend = self.history.follow(migration)
        await isolated(about, migration.linger)
        await isolated(about, amend)
        if migration.has_ended:
            self._migrations.pop(migration.id, None)
        if migration.has_ended or migration.context.entry.ended_there:
            # Otherwise an operator may decide, and the destination dials for the outcome.
            awaited = self._awaited.pop(migration.id, None)
            if awaited is not None:
                awaited.close()

    async def _note(self, migration: OutgoingMigration) -> None:
        if migration.has_ended:
            migration.context.sample()
            await self.history.add(_shown(migration), migration.recorded)


def _waited_for(needed: list[OutgoingMigration]) -> str:
    """Describe the migrations for which a stopping daemon waits."""
    elsewhere, others = list[str](), list[str]()
    for m in needed:
        detail = m.outstanding_in_words if m.keeps_pages else m.progress.problem
        named = elsewhere if m.keeps_pages else others
        named.append(state_in_words(m.domain_name, m.phase, detail))
    parts = {"guests elsewhere": elsewhere, "migrations that have not ended": others}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _shown(migration: OutgoingMigration, ended_at: float | None = None) -> Json:
    """Return all that is known of a migration, for ``show``."""
    known = migration.requests.known_of_peer
    options = adjustments.options_shown(migration.context)
    return {
        **_line(migration, ended_at),
        "options": options,
        "details": migration.result(),
        "known": known,
    }


def _line(migration: OutgoingMigration, ended_at: float | None = None) -> Json:
    migration.context.measure()
    progress = {"phase": migration.phase, **asdict(migration.progress)}
    checkpoint_at = progress.pop("checkpoint_at")
    if latency := migration.context.receiver_statistics.get("fault_latency_us"):
        # These count all faults; the last report of the receiver has only the faults before it.
        progress |= {"faults": latency["count"], "latency_us": round(latency["p50"])}
        progress |= {"longest_wait_us": round(latency["max"])}
    return {
        "id": migration.id,
        "direction": "outgoing",
        "domain": migration.domain_name,
        "domid": migration.domain.domid,
        "uuid": uuid_of(migration.domain.handle),
        "peer": migration.context.lanes.peer,
        "strategy": migration.context.options.strategy.value,
        "handed_over": migration.ownership.handed_over,
        "paused": migration.context.pause.is_on and not migration.has_ended,
        "checkpoint_age_s": round(time.monotonic() - checkpoint_at, 1) if checkpoint_at else None,
        "unknown": migration.unknown,
        "outcome": outcome(migration.phase, migration.progress.problem),
        **progress,
        "ended_at": ended_at,
    }
