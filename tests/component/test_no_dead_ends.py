# SPDX-License-Identifier: GPL-2.0-or-later
"""In each state that ``list`` can show, a command acts, or its answer has what to do instead."""

from __future__ import annotations

import os
import pty
import subprocess
from typing import Any

import pytest

from migrate.cli.world import World, start_receiver, start_sender
from migrate.errors import MigrationError, UnknownMigrationError
from migrate.options import Strategy
from migrate.protocol import messages as m
from receiver.peer import Peer
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.daemons import (
    begin,
    boot,
    copying,
    kill,
    lines,
    note,
    phase,
    states,
    until_taken_up,
    world,
)
from tests.support.guests import continues_here_only
from tests.support.inprocess import Outcome, migrate
from tests.support.links import Link, cut_when, until_cut
from tests.support.protected import slow_guest as busy
from tests.support.waiting import until, until_async

__all__ = ["world"]
Patch = pytest.MonkeyPatch
AT_SENDER = ("postcopy-now", "pause", "resume")
COMMANDS = ("reconnect", "cancel", "decide here", "decide elsewhere", *AT_SENDER)


# ---- each command in each state ----
def ask(world: World, which: str, what: str, name: str = "guest", **more: Any) -> str:
    """Return ``acts``, or the answer."""
    word, _space, where = what.partition(" ")
    arguments = {"here": where == "here"} if where else {}
    try:
        world.ask(which, command=word, migration=name, **arguments, **more)
    except MigrationError as error:
        assert not isinstance(error, UnknownMigrationError)
        return str(error)
    return "acts"


def answers(world: World, which: str, expected: dict[str, str], **more: Any) -> None:
    """Check that each command either acts or is answered as expected."""
    assert world.ask(which, command="show", migration="guest")["known"]
    for what, answer in expected.items():
        found = ask(world, which, what, **more)
        assert answer in found, (which, phase(world, which), what, found)


def precopy(world: World) -> None:
    begin(world, "guest", strategy="precopy")
    until(lambda: copying(world) and phase(world, "receiver") == "precopy", "no precopy")


def postcopy(world: World) -> None:
    begin(world, "guest", bandwidth=MIB // 2)
    until(lambda: phase(world, "sender") == phase(world, "receiver") == "postcopy", "no postcopy")


def interrupted(world: World, lost: str) -> None:
    postcopy(world)
    kill(world, lost)
    until(
        lambda: phase(world, "receiver" if lost == "sender" else "sender") == "interrupted",
        "it is not noticed",
    )


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_in_precopy(world: World, which: str) -> None:
    boot(world)
    precopy(world)
    runs = "the guest belongs here" if which == "sender" else "the guest belongs to the source"
    switch = "--strategy precopy" if which == "sender" else "ask the sender at its source"
    answers(
        world,
        which,
        {
            "reconnect": "nothing to reconnect",
            "decide here": runs,
            "decide elsewhere": runs,
            "postcopy-now": switch,
            "cancel": "acts",
        },
    )
    until(
        lambda: phase(world, "sender") == phase(world, "receiver") == "failed",
        "it is not cancelled",
    )
    assert states(world, "guest") == {"source": ["running"], "destination": []}
    for end in ("sender", "receiver"):
        answers(
            world,
            end,
            {
                "cancel": "has ended (cancelled",
                "decide here": "has ended",
                "decide elsewhere": "has ended",
            },
        )


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_in_postcopy(world: World, which: str) -> None:
    boot(world)
    postcopy(world)
    nothing = (
        "both ends are connected"
        if which == "sender"
        else "guest runs here; `xl destroy guest` ends it"
    )
    switch = "past its precopy" if which == "sender" else "ask the sender at its source"
    answers(
        world,
        which,
        {
            "reconnect": "nothing to reconnect",
            "cancel": "too late to cancel",
            "decide here": nothing,
            "decide elsewhere": nothing,
            "postcopy-now": switch,
        },
    )


def test_interrupted_at_the_source(world: World) -> None:
    boot(world)
    interrupted(world, "receiver")
    answers(
        world,
        "sender",
        {
            "reconnect": "acts",
            "cancel": "`xen-postcopy decide guest here`",
            "decide here": "has reported that guest runs there",
            "postcopy-now": "past its precopy",
            "resume": "is not paused",
            "pause": "acts",
        },
    )
    world.destination.open("guest").destroy()
    answers(world, "sender", {"decide here": "acts"}, force=True)
    until(lambda: phase(world, "sender") == "failed", "it is not carried out")
    assert states(world, "guest") == {"source": ["running"], "destination": []}
    start_receiver(world, world.port)


@pytest.mark.parametrize("here", [False, True])
def test_a_sender_whose_journal_has_lost_the_handover_has_the_destination_hold_the_guest(
    world: World, here: bool
) -> None:
    """The successor resumes the guest, which runs at the destination as well."""
    boot(world)
    interrupted(world, "sender")
    note(world, "sender", "suspending")
    start_sender(world)
    until(lambda: phase(world, "receiver") == "held", "it is not held")
    both = {"source": ["running"], "destination": ["paused"]}
    until(lambda: states(world, "guest") == both, "it is not paused")
    (line,) = lines(world, "receiver")
    assert "the source had not handed it over, and runs it" in line["problem"]
    world.ask("receiver", command="decide", migration="guest", here=here, force=here)
    then = {"source": ["running"], "destination": ["running"] if here else []}
    until(lambda: states(world, "guest") == then, "it is not carried out")


@pytest.mark.parametrize("here", [False, True])
def test_a_successor_keeps_a_held_guest_paused_and_gives_the_same_reason(
    world: World, here: bool
) -> None:
    """Found by reading: the successor took the paused domain for a guest that it had to serve, and
    no decision was possible any more.
    """
    boot(world)
    interrupted(world, "sender")
    note(world, "sender", "suspending")
    start_sender(world)
    until(lambda: "is paused here" in problem(world), "it is not held")
    reason = problem(world)
    for _ in range(2):  # also for the successor of a successor
        kill(world, "receiver")
        start_receiver(world, world.port)
        until(lambda: problem(world) == reason, "it gives another reason")
        assert phase(world, "receiver") == "held"
        assert states(world, "guest") == {"source": ["running"], "destination": ["paused"]}
    world.ask("receiver", command="decide", migration="guest", here=here, force=here)
    then = {"source": ["running"], "destination": ["running"] if here else []}
    until(lambda: states(world, "guest") == then, "it is not carried out")
    if here:
        until(lambda: phase(world, "receiver") == "lost", "it is not lost")
        lost = problem(world)
        assert "the source has taken the guest back" in lost
        kill(world, "receiver")
        start_receiver(world, world.port)
        until(lambda: problem(world) == lost, "it gives another reason")


def problem(world: World) -> str:
    (line,) = lines(world, "receiver")
    return str(line["problem"])


def test_a_guest_without_a_checkpoint_is_not_protected_yet(world: World) -> None:
    boot(world)
    begin(world, "guest", bandwidth=MIB // 2, checkpoint_every_s=3600)
    until(lambda: phase(world, "sender") == phase(world, "receiver") == "postcopy", "no postcopy")
    kill(world, "receiver")
    until(lambda: phase(world, "sender") == "interrupted", "it is not noticed")
    answers(world, "sender", {"decide here": "has reported that guest runs there"})
    assert states(world, "guest") == {"source": ["suspended"], "destination": ["running"]}
    start_receiver(world, world.port)


@pytest.mark.parametrize("again", [True, False])
def test_a_successor_shows_what_the_destination_has_reported(world: World, again: bool) -> None:
    boot(world)
    interrupted(world, "receiver")
    if again:
        kill(world, "sender")
        start_sender(world)
        until_taken_up(world)
    answers(world, "sender", {"decide here": "has reported that guest runs there"})
    answers(world, "sender", {"decide elsewhere": "acts"})
    until(lambda: phase(world, "sender") == "failed", "it is not carried out")
    assert world.source.domains() == []


def test_lost_is_sent_to_a_destination_that_comes_back(world: World) -> None:
    """An operator has decided ``elsewhere`` at the source, which cannot be undone."""
    boot(world)
    interrupted(world, "receiver")
    answers(world, "sender", {"decide elsewhere": "acts"})
    until(lambda: phase(world, "sender") == "failed", "it is not carried out")
    until(lambda: "informed" in lines(world, "sender")[-1]["problem"], "nothing is owed")
    start_receiver(world, world.port)
    until(lambda: phase(world, "receiver") == "lost", "the destination is not informed")
    assert "nothing of the guest is needed there" in lines(world, "receiver")[-1]["problem"]
    until(lambda: "informed" not in lines(world, "sender")[-1]["problem"], "it is owed still")


def test_interrupted_at_the_destination(world: World) -> None:
    boot(world)
    interrupted(world, "sender")
    destroy = "`xl destroy guest` ends it"
    answers(
        world,
        "receiver",
        {
            "reconnect": "the source dials, and tries by itself",
            "cancel": destroy,
            "decide here": destroy,
            "decide elsewhere": destroy,
        },
    )


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_when_it_has_ended(world: World, which: str) -> None:
    boot(world)
    begin(world, "guest", bandwidth=256 * MIB)
    until(
        lambda: phase(world, "sender") == phase(world, "receiver") == "completed",
        "it does not complete",
    )
    expected = dict.fromkeys(COMMANDS, "has ended (completed)")
    if which == "receiver":
        expected |= dict.fromkeys(AT_SENDER, "ask the sender at its source")
    answers(world, which, expected)


async def test_in_doubt_at_the_destination(
    clean_hosts: World, name: str, monkeypatch: Patch
) -> None:
    """The receiver is ready, and cannot find out which end owns the guest."""
    links = cut_when(monkeypatch, Peer, m.Ready, before=True, down=True)

    async def meanwhile(outcome: Outcome, link: Link) -> None:
        await until_cut(links, link)
        await until_async(lambda: outcome.incoming.phase == "in doubt")
        incoming = outcome.incoming
        assert "may have handed the guest over" in incoming.requests.known_of_peer
        with pytest.raises(MigrationError, match=r"`xen-postcopy decide .* elsewhere`"):
            incoming.requests.ask_to_cancel()
        with pytest.raises(MigrationError, match="the source dials"):
            incoming.requests.reconnect()
        await until_async(lambda: outcome.migration.phase == "failed")
        outcome.migration.requests.reconnect()  # this informs the destination
        await incoming.requests.decide(here=False)
        await until_async(lambda: incoming.phase == "failed")

    await migrate(clean_hosts, busy(name), Strategy.HYBRID, meanwhile=meanwhile)
    await continues_here_only(clean_hosts, name)


# ---- the command line ----
def test_a_decision_without_a_terminal_needs_yes(world: World) -> None:
    boot(world)
    interrupted(world, "receiver")
    world.destination.open("guest").destroy()
    sockets = (
        "--socket",
        str(world.sender_socket),
        "--socket",
        str(world.directory / "nobody.sock"),
    )

    def decide(*more: str) -> Any:
        return zygote.run([*PROGRAM, "decide", "guest", "here", *more, *sockets], timeout=60)

    without = decide("--force")
    assert without.returncode == 1 and "--yes decides without a confirmation" in without.stderr
    assert (
        "known of the other end: the destination has reported that guest runs there"
        in without.stdout
    )
    for more in ([], ["--yes"]):  # a decision that would be refused needs no confirmation
        refused = decide(*more)
        assert refused.returncode == 1 and "--force" in refused.stderr
    assert phase(world, "sender") == "interrupted"
    assert decide("--yes", "--force").returncode == 0
    until(lambda: phase(world, "sender") == "failed", "it is not carried out")
    ended = decide("--yes")
    assert ended.returncode == 1 and "has ended" in ended.stderr


def test_cancel_reaches_either_end(world: World) -> None:
    """The daemon that has the migration answers."""
    boot(world)
    postcopy(world)
    for first, second in (("sender", "receiver"), ("receiver", "sender")):
        sockets = [str(world.directory / f"{which}.sock") for which in (first, second)]
        done = zygote.run(
            [*PROGRAM, "cancel", "guest", "--socket", sockets[0], "--socket", sockets[1]],
            timeout=60,
        )
        assert done.returncode == 1 and "too late to cancel" in done.stderr
    assert lines(world, "sender")[-1]["phase"] == "postcopy"
    at_both = zygote.run(
        [*PROGRAM, "decide", "guest", "here", "--socket", sockets[0], "--socket", sockets[1]],
        timeout=60,
    )
    assert at_both.returncode == 1 and "name one by --socket" in at_both.stderr


def test_a_migration_is_watched_until_it_ends(world: World) -> None:
    boot(world)
    interrupted(world, "receiver")
    with zygote.Popen(
        [*PROGRAM, "watch", "guest", "--socket", str(world.sender_socket)],
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stderr is not None
        line = watching.stderr.readline()
        assert "guest: interrupted: " in line and "?;" not in line
        reconnect = [*PROGRAM, "reconnect", "guest", "--socket", str(world.sender_socket)]
        reconnecting = zygote.run(reconnect, timeout=60)
        assert reconnecting.returncode == 0
        assert reconnecting.stderr == "guest: the daemon now tries to reach the other host\n"
        decided_at_a_terminal(world, "n", 130, "xen-postcopy: interrupted")
        decided_at_a_terminal(world, "y", 0, "decided that the guest does not run at this host")
        _out, err = watching.communicate(timeout=60)
    assert watching.returncode == 1 and "xen-postcopy: guest: failed" in err


def decided_at_a_terminal(world: World, answer: str, status: int, text: str) -> None:
    ours, terminal = pty.openpty()
    os.write(ours, answer.encode() + b"\n")
    command = [*PROGRAM, "decide", "guest", "elsewhere", "--socket", str(world.sender_socket)]
    with zygote.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as deciding:
        out, err = deciding.communicate(timeout=60)
    os.close(ours)
    os.close(terminal)
    assert deciding.returncode == status, err
    assert "Decide that guest runs elsewhere?" in out + err and text in err
