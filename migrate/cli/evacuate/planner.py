# SPDX-License-Identifier: GPL-2.0-or-later
"""What an evacuation does next.  Sans-IO: the answers of the sender and the time go in, and what is
to be asked of it comes out.

A guest is measured just before its migration begins, so that the strategy is that of its present
load.  Whether it has a place is decided before anything moves, by the memory that it needs and that
the destinations have.

Nothing about an evacuation is kept anywhere.  A guest that is being migrated when an evacuation
begins, by an earlier one or by an operator, is followed; a guest that has gone is not here any
more.  So an evacuation that was interrupted is continued by the same command, and two at once do
each other's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from migrate.cli.evacuate.placement import Wanted, place
from migrate.options import LEAST_BANDWIDTH
from migrate.outcomes import ENDED, outcome
from migrate.units import human_bytes

ATTEMPTS = 2
"""How often the beginning of a guest's migration is tried: another program may use the guest for a
moment.
"""
AGAIN_S = 1.0
"""The pause between two attempts."""
ASK_EVERY_S = 2.0
"""How often a destination is asked that cannot be reached."""
PATIENCE_S = 30.0
"""How long a destination is waited for that cannot be reached."""
MOST_ABSENCES = 5
"""How often a destination may go away before a migration to it has begun."""
OF_GUEST = (
    "name", "domid", "uuid", "target", "memory_bytes", "needed_bytes", "devices", "problem",
)  # fmt: skip
OF_LINK = ("bytes_per_s", "page_us", "round_trip_us")
Json = dict[str, Any]


class Step(Enum):
    """Where a guest is on its way."""

    WAITS = "waiting"
    ARRIVES = "not ready"
    """Why it cannot be migrated passes by itself: its memory is still arriving at this host, or it
    is being measured for somebody else.
    """
    MEASURED = "measuring"
    BEGINS = "beginning"
    MOVES = "moving"
    PLANNED = "planned"
    """It has been measured, and nothing follows (``--dry-run``)."""
    GONE = "gone"
    ENDED = "ended"
    """It has left this host in another way."""
    FAILED = "failed"


OVER = (Step.PLANNED, Step.GONE, Step.ENDED, Step.FAILED)


@dataclass
class Guest:
    """A guest, and what is known of its way."""

    name: str
    domid: int
    uuid: str = ""
    target: str = ""
    """What names it in a request."""
    memory_bytes: int = 0
    needed_bytes: int = 0
    devices: Sequence[str] = ()
    """Those that only a toolstack can move."""
    problem: str = ""
    is_quiet: bool = False
    """It arrives at this host, and nothing of it is copied at the moment."""
    step: Step = Step.WAITS
    destination: str = ""
    strategy: str = ""
    estimate: Json = field(default_factory=dict)
    migration: str = ""
    """The identifier of its migration."""
    line: Json = field(default_factory=dict)
    """What ``list`` shows of the migration."""
    share: int | None = None
    """The cap on its bandwidth, if this command has set one."""
    refused: dict[str, str] = field(default_factory=dict)
    """The destinations that do not take it in, with the reasons."""
    attempts: int = 0
    not_before: float = 0.0

    @property
    def is_paused(self) -> bool:
        """Whether its copying is paused, or may be: it waits for an operator, without a limit."""
        return (self.step is Step.ARRIVES and self.is_quiet) or (
            self.step is Step.MOVES and bool(self.line.get("paused"))
        )

    @property
    def copies(self) -> bool:
        """Whether its migration uses the link, or is about to."""
        if self.step is not Step.MOVES:
            return self.step is Step.BEGINS
        return self.line.get("phase") != "interrupted" and not self.line.get("paused")

    def follow(self, line: Json, destination: str = "") -> None:
        """Take a migration that moves the guest, to ``destination`` if this command has begun
        it.
        """
        self.step, self.line, self.problem = Step.MOVES, line, ""
        self.migration, self.strategy = line["id"], line.get("strategy") or ""
        self.destination = destination or line["peer"]

    @property
    def key(self) -> tuple[int, str]:
        """The number and the UUID, because another domain may have the number later, and the same
        guest another number.
        """
        return self.domid, self.uuid

    def end(self, step: Step, problem: str = "") -> None:
        self.step, self.problem = step, problem


@dataclass
class Destination:
    address: str
    free_bytes: int = 0
    spent_bytes: int = 0
    """What the guests need whose migrations have begun since it was asked."""
    link: Json | None = None
    """What was measured of the link."""
    problem: str = ""
    """Why it cannot be reached; empty if it can."""
    down_since: float = 0.0
    absences: int = 0
    """How often it has gone away since a migration to it has begun."""
    is_lost: bool = False
    """It is not waited for any more."""
    to_ask: bool = False
    is_asked: bool = False
    ask_at: float = 0.0

    @property
    def is_ready(self) -> bool:
        return not (self.to_ask or self.is_asked or self.problem)

    def doubt(self) -> None:
        """Have it asked before anything else begins, unless it is given up."""
        self.to_ask = not self.is_lost


# ---- what is to be done ----
@dataclass(frozen=True)
class Ask:
    """Ask a destination for its free memory."""

    destination: Destination


@dataclass(frozen=True)
class Measure:
    guest: Guest
    destination: Destination
    bandwidth: int | None


@dataclass(frozen=True)
class Begin:
    """Begin the migration of the guest, with its strategy and its share of the bandwidth."""

    guest: Guest


@dataclass(frozen=True)
class SetShare:
    """Set the guest's share of the bandwidth."""

    guest: Guest


Action = Ask | Measure | Begin | SetShare


class Planner:
    """``free_bytes``: what the destinations have answered.  ``named``: the numbers of the domains
    that are to go, or ``None`` for all guests.
    """

    def __init__(
        self,
        free_bytes: dict[str, int],
        guests: Sequence[Json],
        lines: Sequence[Json],
        *,
        named: set[int] | None,
        parallel: int,
        bandwidth: int | None = None,
        is_trial: bool = False,
    ):
        self.destinations = {name: Destination(name, free) for name, free in free_bytes.items()}
        self._parallel, self._bandwidth, self._is_trial = parallel, bandwidth, is_trial
        self.is_of_all = named is None
        """No guests were named: all of this host are to go."""
        self.stopped = False
        self.newcomers: list[str] = []
        """The guests that have come to this host meanwhile.  If guests were named: only those of
        them that are here as another domain, after a reboot for example.
        """
        self._to_place = True
        self._past = {line["id"] for line in lines}
        """The migrations that there were at the beginning."""
        self.guests = [
            Guest(*(one[key] for key in OF_GUEST))
            for one in guests
            if named is None or one["domid"] in named
        ]
        self._at_first = {_key(one) for one in guests}
        self.seen(guests, lines)
        if named is None:  # a toolstack may have destroyed the domain of a guest that is under way
            known = {guest.domid for guest in self.guests}
            for domid, line in _under_way(lines).items():
                if domid not in known:
                    self.follow(line)
        self._place()

    def follow(self, line: Json) -> None:
        """Take a guest of which there is only a migration, under way or completed."""
        domid = line.get("domid")  # the history may lack the number, the UUID and the strategy
        guest = Guest(line["domain"], -1 if domid is None else domid, line.get("uuid") or "")
        guest.follow(line)
        self.guests.append(guest)
        self._moves(guest, line)

    # ---- what has happened ----
    def seen(self, guests: Sequence[Json] | None, lines: Sequence[Json]) -> None:
        """Take what the sender has answered about its guests, if it was asked, and afterwards about
        its migrations.
        """
        by_id = {line["id"]: line for line in lines}
        moved = _under_way(lines) | {
            line.get("domid"): line
            for line in lines
            if line["phase"] == "completed" and line["id"] not in self._past
        }
        here = None if guests is None else {_key(one): one for one in guests}
        for guest in self.guests:
            if guest.step is Step.MOVES:
                self._moves(guest, by_id.get(guest.migration))
            elif guest.step in (Step.WAITS, Step.ARRIVES, Step.FAILED):
                line = moved.get(guest.domid)
                if line is not None and line["id"] != guest.migration:
                    guest.follow(line)
                    self._moves(guest, guest.line)
                elif here is not None and guest.step is not Step.FAILED:
                    _waits(guest, here.get(guest.key))
        if here is not None:
            self._note_newcomers(here)

    def _note_newcomers(self, here: dict[tuple[int, str], Json]) -> None:
        ours = {guest.uuid for guest in self.guests}
        self.newcomers = [
            one["name"]
            for key, one in here.items()
            if key not in self._at_first and (self.is_of_all or one["uuid"] in ours)
        ]

    def _moves(self, guest: Guest, line: Json | None) -> None:
        if line is None:
            guest.end(Step.FAILED, "the sender does not know its migration any more")
            return
        guest.line = line
        guest.destination = guest.destination or line["peer"]
        if line["phase"] not in ENDED:
            return
        if outcome(line["phase"], line["problem"]) == "completed":
            guest.end(Step.GONE)
            return
        guest.end(Step.FAILED, line["problem"])
        if guest.destination in self.destinations:
            self.destinations[guest.destination].doubt()

    def answered(self, destination: Destination, free_bytes: int) -> None:
        """Take the free memory of a destination."""
        destination.is_asked, destination.problem = False, ""
        destination.free_bytes, destination.spent_bytes = free_bytes, 0
        self._to_place = True

    def silent(self, destination: Destination, problem: str, now: float) -> None:
        """Take why a destination has not answered."""
        if not destination.problem:
            destination.down_since = now
            destination.absences += 1
        destination.is_asked, destination.problem = False, problem
        destination.ask_at = now + ASK_EVERY_S
        for guest in self.guests:
            if guest.destination == destination.address:
                guest.attempts = 0  # the guest was not the reason
        if destination.absences > MOST_ABSENCES:
            destination.problem = f"it has gone away {destination.absences} times: {problem}"
            destination.is_lost = self._to_place = True
        elif now - destination.down_since > PATIENCE_S:
            destination.is_lost = self._to_place = True
        destination.doubt()

    def measured(self, guest: Guest, estimate: Json) -> None:
        """Take the estimate of a guest."""
        measured, destination = estimate["measured"], self.destinations[guest.destination]
        if destination.link is None:
            destination.link = {key: measured[key] for key in OF_LINK}
        guest.estimate = estimate
        if estimate["recommended"] is None:
            problems = (one["problem"] for one in estimate["strategies"].values())
            guest.refused[guest.destination] = next(
                filter(None, problems), "no strategy is possible"
            )
            guest.step, self._to_place = Step.WAITS, True
            return
        guest.strategy = estimate["recommended"]
        if self._is_trial:
            guest.step = Step.PLANNED
        else:
            guest.step = Step.WAITS if self.stopped else Step.BEGINS

    def begun(self, guest: Guest, line: Json) -> None:
        """Take the first progress of a migration that was requested."""
        guest.follow(line, guest.destination)
        destination = self.destinations[guest.destination]
        destination.spent_bytes += guest.needed_bytes
        destination.absences = 0

    def not_begun(self, guest: Guest, problem: str, now: float) -> None:
        """Take why a guest could not be measured, or its migration not be requested."""
        guest.attempts += 1
        self._to_place = True
        self.destinations[guest.destination].doubt()
        if guest.attempts >= ATTEMPTS:
            guest.end(Step.FAILED, problem)
        else:
            guest.step, guest.problem, guest.not_before = Step.WAITS, problem, now + AGAIN_S

    def stop(self) -> None:
        """Begin no further migration."""
        self.stopped = True
        for guest in self.of(Step.BEGINS):
            guest.step = Step.WAITS

    # ---- what is to be done ----
    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be done or to be followed."""
        steps = {guest.step for guest in self.guests}
        left = {Step.MOVES} if self.stopped else set(Step).difference(OVER)
        if self._is_trial:
            left -= {Step.MOVES, Step.ARRIVES}
        return not steps & left

    def of(self, *steps: Step) -> list[Guest]:
        return [guest for guest in self.guests if guest.step in steps]

    def next(self, now: float) -> Iterator[Action]:
        """Yield what is to be done now, in this order."""
        for destination in self.destinations.values():
            if destination.to_ask and not destination.is_asked and now >= destination.ask_at:
                destination.to_ask, destination.is_asked = False, True
                yield Ask(destination)
        if not self.stopped:
            self._place()
        yield from self._shares()
        yield from map(Begin, self.of(Step.BEGINS))
        if not self.stopped:
            yield from self._measures(now)

    def _place(self) -> None:
        """Give each guest that waits a destination; those for which there is none have failed."""
        if not self._to_place:
            return
        self._to_place = False
        waiting = self.of(Step.WAITS, Step.ARRIVES)
        places = place(
            [Wanted(one.domid, one.needed_bytes, frozenset(one.refused)) for one in waiting],
            self._rooms(),
        )
        for guest in waiting:
            guest.destination = places.get(guest.domid, "")
            if not guest.destination:
                guest.end(Step.FAILED, self._why_nowhere(guest))

    def _rooms(self) -> dict[str, int]:
        rooms = {
            name: one.free_bytes - one.spent_bytes
            for name, one in self.destinations.items()
            if not one.is_lost
        }
        for guest in self.of(Step.MEASURED, Step.BEGINS, Step.PLANNED):
            if guest.destination in rooms:
                rooms[guest.destination] -= guest.needed_bytes
        return rooms

    def _why_nowhere(self, guest: Guest) -> str:
        rooms = self._rooms()
        for other in self.of(Step.WAITS, Step.ARRIVES):
            if other.destination in rooms:
                rooms[other.destination] -= other.needed_bytes
        reasons = []
        for name, destination in self.destinations.items():
            if name in guest.refused:
                reasons.append(f"{name}: {guest.refused[name]}")
            elif destination.is_lost:
                reasons.append(f"{name}: {destination.problem}")
            else:
                reasons.append(f"{name} has {human_bytes(max(rooms[name], 0))} left for it")
        return f"no place for its {human_bytes(guest.needed_bytes)}: {'; '.join(reasons)}"

    def _shares(self) -> Iterator[Action]:
        """Divide the bandwidth among the migrations that use the link.  A trial changes nothing."""
        if self._bandwidth is None or self._is_trial:
            return
        copying = [guest for guest in self.guests if guest.copies]
        for guest in copying:
            share = self._share(len(copying))
            if guest.share != share:
                guest.share = share
                if guest.step is Step.MOVES:
                    yield SetShare(guest)

    def _share(self, count: int) -> int | None:
        if self._bandwidth is None:
            return None
        return max(self._bandwidth // count, LEAST_BANDWIDTH)

    def _measures(self, now: float) -> Iterator[Action]:
        """Have further guests measured, the largest first, up to the limit."""
        busy = len(self.of(Step.MEASURED))
        if not self._is_trial:
            busy += len([guest for guest in self.guests if guest.copies])
        room = self._parallel - busy
        for guest in sorted(self.of(Step.WAITS), key=lambda one: -one.needed_bytes):
            destination = self.destinations[guest.destination]
            if room <= 0 or guest.not_before > now or not destination.is_ready:
                continue
            # The first measurement is of the link as well, which is to be measured once.
            if destination.link is None and any(
                one.destination == guest.destination for one in self.of(Step.MEASURED)
            ):
                continue
            room -= 1
            guest.step, guest.problem = Step.MEASURED, ""
            unfinished = len([one for one in self.guests if one.step not in OVER])
            share = self._share(min(self._parallel, unfinished))
            yield Measure(guest, destination, share)


def _waits(guest: Guest, here: Json | None) -> None:
    """Take what is known of a guest that no migration moves.  A problem that is new may be that of
    a migration by somebody else that has just ended.
    """
    if here is None:
        guest.end(Step.ENDED, "it has ended, or another program has moved it")
    elif here["problem"] and not here["passes"] and here["problem"] == guest.problem:
        guest.end(Step.FAILED, here["problem"])
    else:
        guest.step = Step.ARRIVES if here["problem"] else Step.WAITS
        guest.problem, guest.is_quiet = here["problem"], here.get("is_quiet", False)


def _key(here: Json) -> tuple[int, str]:
    return here["domid"], here["uuid"]


def _under_way(lines: Sequence[Json]) -> dict[int | None, Json]:
    """Return the migrations under way that leave this host, by the domain."""
    return {
        line.get("domid"): line
        for line in lines
        if line["direction"] == "outgoing" and line["phase"] not in ("", *ENDED)
    }
