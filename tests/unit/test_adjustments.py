# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operator may change while a migration runs, and what is noted of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
import trio
import trio.testing

from migrate import cli
from migrate.cli.options import STRATEGY_OPTIONS
from migrate.errors import MigrationError
from migrate.options import (
    CHANGEABLE,
    MigrationOptions,
    OnTimeout,
    PolicyOptions,
    Strategy,
    Until,
    changed,
    flag,
    shown,
)
from sender import adjustments
from sender.context import Context
from sender.entry import Entry, read_entry
from sender.ownership import DECIDED, ENDED, INHERITED, State
from sender.pause import Pause
from sender.toolstack import OwnToolstack
from tests.support.waiting import WAIT_S
from xenbackend.contract import DomainId

MIB = 2**20
HANDLE = bytes(16)


class Journal:
    """A journal in memory, which may be unwritable."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.is_full = False

    def write(self, _session: str, facts: dict[str, Any], *, needed: bool) -> None:
        if self.is_full and needed:
            raise MigrationError("cannot write the journal: it is full")
        self.facts = json.loads(json.dumps(facts))

    def erase(self, _session: str) -> None:
        self.facts = {}


class SlowDisk(Journal):
    """A journal whose first entry takes long, and fails."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_fail = threading.Event(), threading.Event()

    def write(self, session: str, facts: dict[str, Any], *, needed: bool) -> None:
        if self.is_asked.is_set():
            super().write(session, facts, needed=needed)
            return
        self.is_asked.set()
        assert self.may_fail.wait(WAIT_S)
        raise MigrationError("cannot write the journal: it is full")


def context_in(
    state: State, journal: Journal | None = None, **options: Any
) -> tuple[Context, Journal]:
    """Return a migration in a state, with these options, and its journal."""
    none: Any = None
    journal = journal or Journal()
    lanes: Any = SimpleNamespace(facts=lambda: {"dials": None, "rejoins": 0, "proven": False})
    entry = Entry(DomainId(9, HANDLE, "guest"), MigrationOptions(**options), False)
    session = "session"
    context = Context(session, none, lanes, cast(Any, journal), OwnToolstack(), entry, state)
    return context, journal


# ---- the declaration ----
def test_every_option_that_can_be_changed_is_an_option_of_migrate_and_of_set() -> None:
    of_migrate = {option.field: option.names[0] for option in STRATEGY_OPTIONS}
    command = cli.cli.get_command(click.Context(cli.cli), "set")
    assert command is not None
    of_set = {param.name for param in command.params if isinstance(param, click.Option)}
    for name in CHANGEABLE:
        assert of_migrate[name] == flag(name)
        assert name in of_set
    assert of_set == {*CHANGEABLE, "socket_path", "as_json"}


def test_an_option_that_cannot_be_changed_is_named_with_those_that_can() -> None:
    with pytest.raises(MigrationError, match=r"^strategy cannot be changed .* --bandwidth"):
        changed(MigrationOptions(), {"strategy": "precopy"})


def test_what_follows_a_time_limit_is_not_changed_without_one() -> None:
    limited = MigrationOptions(policy=PolicyOptions(timeout_s=5.0))
    assert changed(limited, {"on_timeout": "cancel"}).policy.on_timeout is OnTimeout.CANCEL
    for options, values in (
        (MigrationOptions(), {"on_timeout": "cancel"}),
        (limited, {"on_timeout": "cancel", "timeout_s": None}),
    ):
        with pytest.raises(MigrationError, match=r"^--on-timeout cancel: only with --timeout"):
            changed(options, values)
    # The limit may be removed from a migration that has an --on-timeout.
    unlimited = changed(changed(limited, {"on_timeout": "cancel"}), {"timeout_s": None})
    assert unlimited.policy.timeout_s is None


@pytest.mark.parametrize(
    ("strategy", "values", "what"),
    [
        (Strategy.PRECOPY, {"postcopy_bandwidth_bytes_per_s": MIB}, "--postcopy-bandwidth: not"),
        (Strategy.PRECOPY, {"postcopy_bandwidth_bytes_per_s": 0}, "--postcopy-bandwidth: not"),
        (Strategy.POSTCOPY, {"max_rounds": 3}, "--max-rounds: not with --strategy postcopy"),
        (Strategy.POSTCOPY, {"timeout_s": 3.0}, "--timeout: not with --strategy postcopy"),
        (Strategy.POSTCOPY, {"downtime_target_ms": 3.0}, "--downtime-target: not with"),
    ],
)
def test_what_has_no_effect_with_a_strategy_is_refused(
    strategy: Strategy, values: dict[str, Any], what: str
) -> None:
    with pytest.raises(MigrationError, match=what):
        changed(MigrationOptions(strategy), values)
    assert changed(MigrationOptions(), values)


def test_a_changed_value_is_held_to_the_limits_of_a_new_migration() -> None:
    for values, what in {
        ("max_rounds", 0): "--max-rounds 0",
        ("timeout_s", 0): "--timeout 0",
        ("timeout_s", 1e9): "at most a week",
        ("postcopy_bandwidth_bytes_per_s", 1): "--postcopy-bandwidth 1: at least one page",
        ("postcopy_bandwidth_bytes_per_s", False): "--postcopy-bandwidth False",
        ("bandwidth_bytes_per_s", 0): "--bandwidth 0",
    }.items():  # fmt: skip
        with pytest.raises(MigrationError, match=what):
            changed(MigrationOptions(), dict([values]))


def test_precopy_alone_cannot_end_in_postcopy() -> None:
    precopy = MigrationOptions(Strategy.PRECOPY)
    with pytest.raises(MigrationError, match="cannot end in postcopy"):
        changed(precopy, {"timeout_s": 5.0})
    made = changed(precopy, {"timeout_s": 5.0, "on_timeout": "suspend"})
    assert made.policy == PolicyOptions(timeout_s=5.0, on_timeout=OnTimeout.SUSPEND)


def test_the_cap_of_postcopy_is_that_of_precopy_unless_it_has_its_own() -> None:
    capped = MigrationOptions(bandwidth_bytes_per_s=MIB)
    assert capped.cap_of_postcopy == MIB
    other = changed(capped, {"postcopy_bandwidth_bytes_per_s": 2 * MIB})
    assert other.cap_of_postcopy == 2 * MIB
    assert changed(capped, {"postcopy_bandwidth_bytes_per_s": 0}).cap_of_postcopy is None


def test_the_options_are_shown_for_as_long_as_they_have_an_effect() -> None:
    everything = shown(MigrationOptions(), precopy=True)
    assert list(everything) == [*CHANGEABLE] and everything["on_timeout"] == "postcopy"
    assert json.loads(json.dumps(everything)) == everything
    later = shown(MigrationOptions(), precopy=False)
    assert {CHANGEABLE[name] for name in later} == {Until.END}


# ---- set ----
async def test_a_change_reaches_the_policy_the_cap_and_the_journal() -> None:
    context, journal = context_in(State.COPYING)
    await adjustments.change(
        context, {"downtime_target_ms": 5.0, "bandwidth_bytes_per_s": MIB, "max_rounds": 9}
    )
    assert context.policy.options == PolicyOptions(9, downtime_target_ms=5.0)
    assert context.cap.spend(2 * MIB, 0.0) == pytest.approx(2.0, abs=0.1)
    assert journal.facts["bandwidth"] == MIB
    assert adjustments.options_shown(context)["downtime_target_ms"] == 5.0


async def test_in_postcopy_the_cap_is_that_of_postcopy() -> None:
    context, journal = context_in(State.HANDED_OVER, bandwidth_bytes_per_s=MIB)
    await adjustments.change(context, {"bandwidth_bytes_per_s": 2 * MIB})
    assert context.cap.spend(4 * MIB, 0.0) == pytest.approx(2.0, abs=0.1)
    await adjustments.change(context, {"postcopy_bandwidth_bytes_per_s": 0})
    assert context.cap.wait_s(0.0) == 0
    assert journal.facts["postcopy_bandwidth"] == 0
    with pytest.raises(MigrationError, match="--postcopy-bandwidth is its cap now"):
        await adjustments.change(context, {"bandwidth_bytes_per_s": None})


@pytest.mark.parametrize("over", ["the rounds", "precopy"])
async def test_what_comes_too_late_is_refused(over: str) -> None:
    context, journal = context_in(State.COPYING if over == "the rounds" else State.HANDED_OVER)
    context.rounds_are_over = over == "the rounds"
    with pytest.raises(MigrationError, match=r"too late for --timeout: guest is past its precopy"):
        await adjustments.change(context, {"timeout_s": 5.0, "bandwidth_bytes_per_s": MIB})
    assert context.options.bandwidth_bytes_per_s is None and journal.facts == {}


async def test_a_change_that_the_journal_cannot_have_is_undone() -> None:
    context, journal = context_in(State.COPYING)
    journal.is_full = True
    with pytest.raises(MigrationError, match="it is full"):
        await adjustments.change(context, {"bandwidth_bytes_per_s": MIB, "max_rounds": 9})
    assert context.options == MigrationOptions() and context.policy.options == PolicyOptions()
    assert context.cap.spend(MIB, 0.0) == 0
    with pytest.raises(MigrationError, match="it is full"):
        await adjustments.pause(context)
    assert not context.pause.is_on
    journal.is_full = False
    await adjustments.pause(context)
    journal.is_full = True
    await adjustments.resume(context)
    assert not context.pause.is_on


async def at_once(
    disk: SlowDisk, refused: Callable[[], Awaitable[None]], other: Callable[[], Awaitable[None]]
) -> None:
    """Have one client ask for ``other`` before the journal has refused the change of another."""

    async def fails() -> None:
        with pytest.raises(MigrationError, match="it is full"):
            await refused()

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            await trio.to_thread.run_sync(disk.is_asked.wait)
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked()
            disk.may_fail.set()


async def test_a_change_that_is_undone_leaves_what_another_client_changes_meanwhile() -> None:
    disk = SlowDisk()
    context, _journal = context_in(State.COPYING, disk)
    cap, rounds = (
        functools.partial(adjustments.change, context, values)
        for values in ({"bandwidth_bytes_per_s": MIB}, {"max_rounds": 9})
    )
    await at_once(disk, cap, rounds)
    assert context.options == MigrationOptions(policy=PolicyOptions(max_rounds=9))
    assert disk.facts["bandwidth"] is None


async def test_a_pause_that_is_undone_cannot_be_ended_meanwhile() -> None:
    """Its time would count twice."""
    disk = SlowDisk()
    context, _journal = context_in(State.COPYING, disk)

    async def resume() -> None:
        with pytest.raises(MigrationError, match="the copying of guest is not paused"):
            await adjustments.resume(context)

    await at_once(disk, functools.partial(adjustments.pause, context), resume)
    assert not context.pause.is_on


# ---- pause ----
MAY_PAUSE = (State.OFFERING, State.COPYING, State.HANDED_OVER)


@pytest.mark.parametrize("state", State)
async def test_copying_is_paused_where_memory_is_copied_and_refused_elsewhere(state: State) -> None:
    context, journal = context_in(state)
    if state not in MAY_PAUSE:
        reason = {
            **dict.fromkeys((State.SUSPENDING, State.SUSPENDED, State.UNDECIDED), "in its switch"),
            **dict.fromkeys(ENDED, "has ended"),
            **dict.fromkeys((State.COMPLETING, *DECIDED), "no more memory of guest is sent"),
            State.ALL_SENT: "all pages of guest have been sent",
        }[state]
        with pytest.raises(MigrationError, match=reason):
            await adjustments.pause(context)
        assert not context.pause.is_on
        return
    await adjustments.pause(context)
    assert context.pause.is_on
    assert journal.facts.get("paused", state is State.OFFERING) is True
    with pytest.raises(MigrationError, match="is paused already: `xen-postcopy resume guest`"):
        await adjustments.pause(context)
    await adjustments.resume(context)
    with pytest.raises(MigrationError, match="the copying of guest is not paused"):
        await adjustments.resume(context)
    assert journal.facts.get("paused", False) is False


async def test_between_the_last_round_and_the_switchover_nothing_is_paused() -> None:
    context, _journal = context_in(State.COPYING)
    context.rounds_are_over = True
    with pytest.raises(MigrationError, match="cannot be paused in its switchover"):
        await adjustments.pause(context)


async def test_a_pause_is_waited_for_and_its_time_is_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pause = Pause()
    await pause.wait()
    pause.begin(10.0)
    assert pause.seconds(12.0) == 2.0
    with trio.move_on_after(5) as waiting:
        await pause.wait()
    assert waiting.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pause.wait)
        pause.end(13.0)
    pause.begin(20.0)
    pause.end(21.0)
    assert pause.seconds(50.0) == 4.0


# ---- the journal ----
def test_a_successor_has_the_caps_and_the_pause() -> None:
    context, journal = context_in(
        State.HANDED_OVER, bandwidth_bytes_per_s=MIB, postcopy_bandwidth_bytes_per_s=2 * MIB
    )
    context.pause.begin(0.0)
    context.ownership.note(needed=True)
    entry, state = read_entry(journal.facts, has_checkpoint=False)
    assert state is State.HANDED_OVER and entry.pause.is_on
    assert entry.options == dataclasses.replace(context.options)


def test_an_entry_of_a_release_that_had_neither_is_taken_up() -> None:
    context, journal = context_in(State.HANDED_OVER, bandwidth_bytes_per_s=MIB)
    context.ownership.note(needed=True)
    for fact in ("paused", "postcopy_bandwidth"):
        del journal.facts[fact]
    assert journal.facts["step"] in INHERITED
    entry, _state = read_entry(journal.facts, has_checkpoint=False)
    assert not entry.pause.is_on and entry.options.cap_of_postcopy == MIB
