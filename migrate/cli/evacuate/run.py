# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries out what the planner of an evacuation wants: requests to the local sender.

Requests that take a while are made in threads, whose results the loop takes.  A thread whose result
is not wanted any more ends with the process, and what it has requested of the sender ends with its
connection.  Migrations are the sender's and do not end with this process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrate.cli.accepted import accepted
from migrate.cli.estimate import ask
from migrate.cli.evacuate.display import EvacuationDisplay
from migrate.cli.evacuate.planner import (
    Action,
    Ask,
    Begin,
    Destination,
    Guest,
    Measure,
    Planner,
    SetShare,
    Step,
)
from migrate.cli.text import announce_wait
from migrate.control.client import ANSWER_S, ControlClient, receiver_socket
from migrate.errors import (
    DaemonGoneError,
    MigrationError,
    SilentDaemonError,
    UnattendedMigrationError,
)
from migrate.units import command
from xenbackend.unix import STARTING_S

LOOK_EVERY_S = 0.25
"""How often the sender is asked for its migrations."""
GUESTS_EVERY_S = 2.0
"""How often it is asked for its guests."""
SILENCE_S = 60.0
"""How long the sender may leave requests unanswered: a host with many guests may be slow, and a
sender that is killed ends in the middle of an answer.
"""
RECEIVER_S = 1.0
"""How long the local receiver may take for its answer."""
NOT_ARRIVING_S = {"lost": 0.0, "held": 0.0, "in doubt": 300.0, "interrupted": 300.0}
"""The phases of incoming migrations in which no memory arrives, and for how long such a phase is
seen before its guest is not waited for any more: a link that was lost may come back.
"""
QUIET = (
    "no page arrives at this host in the background: copying is paused ({} at its source "
    "ends that), its cap is low, or the sender there gets no CPU"
)
Json = dict[str, Any]


class Arrivals:
    """The migrations that bring guests to this host, and since when this command has seen each of
    them in its phase.  The times at which the phases began are of a clock that may be set.
    """

    def __init__(self) -> None:
        self._since: dict[tuple[object, ...], float] = {}

    def not_arriving(self, incoming: Sequence[Json], now: float) -> dict[int, str]:
        """Return why guests do not arrive any more, by their domains.  ``incoming``: what the
        receiver lists; ``now``: time.monotonic().
        """
        found = {}
        for line in incoming:
            # A receiver of an earlier release has neither the domain nor the phases so far.
            domid, phase = line.get("domid"), line["phase"]
            if domid is None or phase not in NOT_ARRIVING_S:
                continue
            entered = domid, phase, *(one["at"] for one in line.get("phases", ())[-1:])
            if now - self._since.setdefault(entered, now) >= NOT_ARRIVING_S[phase]:
                found[domid] = (
                    f"the migration that brings it to this host is {phase}: see `xen-postcopy list`"
                )
        return found


def _raise(error: Exception) -> None:
    raise error


@dataclass(frozen=True)
class Sender:
    """The local sender, whose control socket is at ``path``."""

    path: Path
    _arrivals: Arrivals = field(default_factory=Arrivals, kw_only=True)
    _met: threading.Event = field(default_factory=threading.Event, kw_only=True)
    """Set when a request was accepted."""

    def call(self, **request: Any) -> Json:
        """Raises :class:`MigrationError`."""
        with ControlClient(
            self.path, wait_s=STARTING_S, answer_s=ANSWER_S, announce=self._announce
        ) as client:
            self._met.set()
            return client.call(**request)

    def _announce(self, path: str | os.PathLike[str]) -> None:
        """Announce a wait before the first request.  Later the terminal may have a table."""
        if not self._met.is_set():
            announce_wait(path)

    def guests(self, names: tuple[str, ...] = ()) -> Json:
        """Return the guests of this host.  The problem of one whose memory is to arrive does not
        pass if the receiver of this host shows that nothing arrives.  ``is_quiet``: nothing is
        copied to this host at the moment.
        """
        answer = self.call(command="guests", names=names)
        arriving = [one for one in answer["guests"] if one["passes"]]
        incoming = self._incoming() if arriving else []
        quiet = {line.get("domid") for line in incoming if line.get("quiet_s")}
        why = self._arrivals.not_arriving(incoming, time.monotonic())
        for one in arriving:
            if one["domid"] in why:
                one["passes"], one["problem"] = False, why[one["domid"]]
            elif one["domid"] in quiet:
                one["is_quiet"], one["problem"] = True, QUIET.format(command("resume", one["name"]))
        return answer

    def _incoming(self) -> list[Json]:
        """Return what the receiver lists whose control socket is beside the sender's; nothing if it
        does not answer.
        """
        path = self.path.with_name(Path(receiver_socket()).name)
        try:
            with ControlClient(path, answer_s=RECEIVER_S) as client:
                found: list[Json] = client.call(command="list")["migrations"]
                return found
        except MigrationError:
            return []

    def migrations(self, *, of_predecessors: bool = False) -> list[Json]:
        """Return the migrations that leave this host, the oldest first."""
        found: list[Json] = self.call(command="list", all=of_predecessors)["migrations"]
        return [accepted(line) for line in found]

    def room(self, destination: str) -> int:
        """Return the memory that guests can have at a destination.  Raises
        :class:`MigrationError`.
        """
        with ControlClient(self.path, wait_s=STARTING_S) as client:
            return int(client.call(command="room", destination=destination)["free_bytes"])

    def begin(self, **request: Any) -> Json:
        """Begin a migration, which continues without this process, and return its first
        progress.
        """
        with ControlClient(self.path, wait_s=STARTING_S, answer_s=ANSWER_S) as client:
            client.send(command="migrate", **request)
            answer = client.answer()
        if answer is None:
            raise MigrationError("the sender has ended before the migration began")
        return answer


@dataclass
class Evacuation:
    """One run.  ``request``: the options of each migration, as a request has them."""

    sender: Sender
    planner: Planner
    seconds: float
    request: Json
    display: EvacuationDisplay
    _results: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)
    _guests_at: float = 0.0
    _silent_since: float = 0.0
    """When the sender did not answer, if it has not answered since."""

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Do what the planner wants until it is over, or until ``is_stopped``.

        Raises :class:`UnattendedMigrationError` if the sender has ended and does not come back.
        """
        try:
            while not is_stopped():
                self.look()
                for action in self.planner.next(time.monotonic()):
                    if not (isinstance(action, Begin) and is_stopped()):
                        self._do(action)
                self.display.show(self.planner)
                if self.planner.is_over:
                    return
                self._take_results(LOOK_EVERY_S)
        finally:
            self.display.close()

    def look(self) -> None:
        """Have the planner see what the sender answers now."""
        try:
            here = None
            if time.monotonic() >= self._guests_at:
                here = self.sender.guests()["guests"]
                self._guests_at = time.monotonic() + GUESTS_EVERY_S
            lines = self.sender.migrations()
            listed = {line["id"] for line in lines}
            if any(guest.migration not in listed for guest in self.planner.of(Step.MOVES)):
                lines = self.sender.migrations(of_predecessors=True)
        except MigrationError as error:
            is_brief = isinstance(error, SilentDaemonError | DaemonGoneError)
            if is_brief and self._silent_s() <= SILENCE_S:  # one that is restarted is waited for
                return
            moving = ", ".join(guest.name for guest in self.planner.of(Step.MOVES))
            if not moving or isinstance(error, SilentDaemonError):
                raise
            raise UnattendedMigrationError(
                f"the sender does not answer ({error}), and these guests are under way: {moving}; "
                "start it again (systemctl start xen-postcopy-sender), which resumes their "
                "migrations"
            ) from error
        self._silent_since = 0.0
        self.planner.seen(here, lines)

    def _silent_s(self) -> float:
        """Return for how long the sender has left requests unanswered, this one included."""
        self._silent_since = self._silent_since or time.monotonic()
        return time.monotonic() - self._silent_since

    def _take_results(self, seconds: float) -> None:
        """Have the planner take the results of threads, for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                self._results.get(timeout=left)()
            except queue.Empty:
                return

    # ---- what the planner wants ----
    def _do(self, action: Action) -> None:
        match action:
            case Ask(destination):
                self._in_thread(self._ask, destination)
            case Measure(guest, destination, bandwidth):
                self._in_thread(self._measure, guest, destination, bandwidth)
            case Begin(guest):
                self._begin(guest)
            case SetShare(guest):
                self._set_share(guest)

    def _in_thread(self, call: Callable[..., Callable[[], None]], *arguments: Any) -> None:
        """Make a request in a thread.  ``call`` returns how the planner takes the result."""

        def work() -> None:
            try:
                taken = call(*arguments)
            except Exception as error:
                taken = functools.partial(_raise, error)
            self._results.put(taken)

        threading.Thread(target=work, daemon=True).start()

    def _ask(self, destination: Destination) -> Callable[[], None]:
        try:
            free_bytes = self.sender.room(destination.address)
        except MigrationError as error:
            problem = str(error)
            return lambda: self.planner.silent(destination, problem, time.monotonic())
        return lambda: self.planner.answered(destination, free_bytes)

    def _measure(
        self, guest: Guest, destination: Destination, bandwidth: int | None
    ) -> Callable[[], None]:
        try:
            found = ask(
                self.sender.path,
                domain=guest.target,
                destination=destination.address,
                seconds=self.seconds,
                link=destination.link,
                **{**self.request, "bandwidth": bandwidth},
            )
        except MigrationError as error:
            return functools.partial(self._not_begun, guest, str(error))
        return lambda: self.planner.measured(guest, found)

    def _begin(self, guest: Guest) -> None:
        # Who has log-dirty on now does so since the measurement, which has switched it off.
        own = {"strategy": guest.strategy, "bandwidth": guest.share, "take_log_dirty": False}
        try:
            line = self.sender.begin(
                domain=guest.target, destination=guest.destination, **{**self.request, **own}
            )
        except MigrationError as error:
            self._not_begun(guest, str(error))
        else:
            self.planner.begun(guest, line)

    def _not_begun(self, guest: Guest, problem: str) -> None:
        self._guests_at = 0.0  # it may have ended, or somebody else may have begun it
        self.planner.not_begun(guest, problem, time.monotonic())

    def _set_share(self, guest: Guest) -> None:
        try:
            self.sender.call(
                command="set",
                migration=guest.migration,
                values={"bandwidth_bytes_per_s": guest.share},
            )
        except MigrationError:  # it may just have ended; otherwise the share is set again
            guest.share = None

    # ---- the end ----
    def finish(self) -> None:
        """Ask what the migrations took, and which guests have come meanwhile, if the sender
        answers.
        """
        with contextlib.suppress(MigrationError):
            for guest in self.planner.of(Step.GONE):
                shown = accepted(self.sender.call(command="show", migration=guest.migration))
                guest.line = {**guest.line, "downtime_s": shown["details"].get("downtime_s")}
            self._guests_at = 0.0
            self.look()

    def cancel(self) -> None:
        """Take back the migrations that are before their handover."""
        for guest in self.planner.of(Step.MOVES):
            with contextlib.suppress(MigrationError):  # it may be past its handover
                self.sender.call(command="cancel", migration=guest.migration)
