# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemons of this release resume the migrations of killed daemons of an earlier release.

``journals/RELEASE/END-KIND-STEP.json`` has the entries, one in each line, that a daemon of that
release had in its journal right after the entry of that step.  The release really wrote these
entries: each file was copied after an entry, while the tests of the release migrated guests
(``plain``), with ``--protect`` (``protected``), and under xl (``xl``).  ``LIVE`` stands for a value
of that one migration: its key, its domain, the boot of its host.

In each test daemons of this release begin a migration, and are killed.  Then the entries of the
earlier release replace theirs, with the values of the present migration.  The facts that the
earlier release did not note are missing.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from migrate.cli.world import World, start_receiver, start_sender, wait_for_steps
from migrate.service.journal import Journal
from receiver.migration import IncomingMigration
from sender.entry import read_entry
from sender.ownership import INHERITED, State
from tests.support.daemons import SLOW, begin, boot, copying, journal, kill, lines, phase, world
from tests.support.left import NoLanes
from tests.support.waiting import until
from tests.support.xl import Xl, check_arrived, check_stayed, xl
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.verify import verify

__all__ = ["world", "xl"]

JOURNALS = Path(__file__).with_name("journals")
RELEASES = ("0.1.0",)
LIVE = "LIVE"
ENDS = {"sender": "source", "receiver": "destination"}
ENDED = ("completed", "failed")
CUT = ("interrupted", "interrupted")
NOTED_LATER = {
    "handle",
    "rejoins",
    "proven",
    "ran",
    "recall",
    "max_pages",
    "applied",
    "unprotected",
    "decided",
    "raised",
    "reason",
    "recalled",
    "missing",
}
"""The facts that 0.1.0 did not note."""
SHOWN = {
    "making": "precopy", "made": "precopy", "suspended": "in doubt", "ready": "in doubt",
    "entrusted": "in doubt", "taken over": "interrupted", "finishing": "completing",
}  # fmt: skip
"""The phase of a receiver's migration before its successor has found the domain, by the step."""
Facts = dict[str, Any]
ANY_LIVE: Facts = {
    "boot": "boot", "domain": "guest", "domid": 9, "key": "07" * 32, "dials": ["127.0.0.1", 1],
    "successor": 10,
    "offer": {"name": "guest", "nr_pfns": 64, "max_pages": 64, "vcpus": 1, "platform": ""},
}  # fmt: skip


def filled(facts: Facts, live: Facts) -> Facts:
    """Return an entry of an earlier release with the values of the present migration."""
    return {
        name: filled(value, live[name])
        if isinstance(value, dict)
        else live[name]
        if value == LIVE
        else value
        for name, value in facts.items()
    }


def entries(release: str, name: str) -> list[Facts]:
    text = (JOURNALS / release / f"{name}.json").read_text()
    return [json.loads(line) for line in text.splitlines() if line]


@dataclass
class Left:
    """A migration of two killed daemons of this release."""

    world: World
    session: str = ""
    facts: dict[str, Facts] = field(default_factory=dict)
    """The last entry of each end."""

    def read(self) -> None:
        for end in ENDS:
            path = journal(self.world, end)
            self.session = path.stem
            self.facts[end] = json.loads(path.read_text().splitlines()[-1])

    def replace(self, release: str, sender: str, receiver: str) -> None:
        """Put the earlier release's files in the place of the journals."""
        for end, kind_and_step in (("sender", sender), ("receiver", receiver)):
            state = self.world.directory / f"{ENDS[end]}.sock.state" / end
            for path in state.glob("*.json"):
                path.unlink()
            if kind_and_step:
                old = entries(release, f"{end}-{kind_and_step}")
                text = "".join("\n" + json.dumps(filled(e, self.facts[end])) for e in old)
                (state / f"{self.session}.json").write_text(text)


def killed_in_precopy(world: World) -> Left:
    begin(world, "guest", strategy="hybrid")
    until(lambda: copying(world) and phase(world, "receiver") == "precopy", "no precopy")
    return killed(world)


def killed_in_postcopy(world: World, **options: Any) -> Left:
    begin(world, "guest", **options)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    until(lambda: "taken over" in journal(world, "receiver").read_text(), "it is not noted")
    return killed(world)


def killed(world: World) -> Left:
    for end in ENDS:  # neither end notices the death of the other
        world.processes[end].popen.send_signal(signal.SIGSTOP)
    for end in ENDS:
        kill(world, end)
    left = Left(world)
    left.read()
    return left


def killed_at_the_end(world: World) -> Left:
    """Return a migration all of whose pages have arrived.  The sender has not destroyed the source
    yet, because the source's host is stopped.
    """
    begin(world, "guest", bandwidth=4 * SLOW)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    until(lambda: "taken over" in journal(world, "receiver").read_text(), "it is not noted")
    left = Left(world)
    left.read()
    source = world.processes["source"].popen
    source.send_signal(signal.SIGSTOP)
    try:
        until(lambda: "completing" in journal(world, "sender").read_text(), "it does not complete")
        until(lambda: phase(world, "receiver") == "completed", "the receiver does not complete")
        for end in ENDS:
            kill(world, end)
    finally:
        source.send_signal(signal.SIGCONT)
    return left


def start(world: World, end: str) -> None:
    if end == "sender":
        start_sender(world)
    else:
        start_receiver(world, world.port)


def check(world: World, spec: GuestSpec, where: str) -> None:
    """Wait for the end at both ends, then verify the guest, which runs at one of them."""

    def settled() -> bool:
        return all(phase(world, end) in ("", *ENDED) for end in ENDS)

    until(settled, f"it does not end: {[lines(world, end) for end in ENDS]}")
    hosts = {"source": world.source, "destination": world.destination}
    found = [(name, info.state) for name, host in hosts.items() for info in host.domains()]
    assert found == [(where, DomainState.RUNNING)]
    with hosts[where].open(spec.name) as guest:
        wait_for_steps(guest, 20)
        guest.suspend()
        assert verify(guest, spec).problems == []


@pytest.mark.parametrize("path", sorted(JOURNALS.rglob("*.json")), ids=lambda path: path.stem)
def test_each_entry_is_understood(path: Path, tmp_path: Path) -> None:
    nothing, is_sender = cast(Any, NoLanes()), path.stem.startswith("sender")
    for old in entries(path.parent.name, path.stem):
        assert not NOTED_LATER & set(old)
        facts, step = filled(old, ANY_LIVE), old["step"]
        if is_sender:
            _entry, state = read_entry(facts, has_checkpoint=False)
            # The destination may be ready: 0.1.0 did not note the step before the suspension.
            assert state is (State.SUSPENDED if step == "begun" else INHERITED[step])
        else:
            migration = IncomingMigration.of_predecessor(
                nothing, "session", nothing, Journal(tmp_path), facts
            )
            assert migration.phase == SHOWN[step]


@pytest.mark.sweep
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize(
    ("kill_both", "steps", "alone", "where"),
    [
        (killed_in_precopy, ("begun", "making"), ("failed", "failed"), "source"),
        (killed_in_precopy, ("begun", "made"), ("failed", "failed"), "source"),
        (killed_in_precopy, ("begun", "suspended"), ("failed", "in doubt"), "source"),
        (killed_in_precopy, ("begun", "ready"), ("failed", "in doubt"), "source"),
        (killed_in_precopy, ("given-up", "ready"), ("failed", "in doubt"), "source"),
        (killed_in_postcopy, ("handed-over", "suspended"), CUT, "destination"),
        (killed_in_postcopy, ("handed-over", "ready"), CUT, "destination"),
        (killed_in_postcopy, ("handed-over", "taken-over"), CUT, "destination"),
        (killed_at_the_end, ("handed-over", "taken-over"), (CUT[0], "completed"), "destination"),
        (killed_at_the_end, ("handed-over", "finishing"), (CUT[0], "completed"), "destination"),
        (killed_at_the_end, ("completing", "finishing"), ("completed", "completed"), "destination"),
        (killed_at_the_end, ("completing", ""), ("completed", ""), "destination"),
    ],
)  # fmt: skip
def test_a_migration_is_taken_up(
    world: World, release: str, first: str, kill_both: Callable[[World], Left],
    steps: tuple[str, str], alone: tuple[str, str], where: str,
) -> None:  # fmt: skip
    """``alone``: the phase at each end while the other end has no daemon."""
    spec = boot(world)
    sender, receiver = (step and f"plain-{step}" for step in steps)
    kill_both(world).replace(release, sender, receiver)
    start(world, first)
    shown = alone[list(ENDS).index(first)]
    until(lambda: phase(world, first) == shown, f"{lines(world, first)}, not {shown}")
    start(world, next(end for end in ENDS if end != first))
    check(world, spec, where)


@pytest.mark.parametrize("release", RELEASES)
def test_a_protected_migration_is_taken_up(world: World, release: str) -> None:
    spec = boot(world)
    left = killed_in_postcopy(world, checkpoint_every_s=0.02)
    left.replace(release, "protected-handed-over", "protected-taken-over")
    start_receiver(world, world.port)
    start_sender(world)
    check(world, spec, "destination")


@pytest.mark.parametrize("release", RELEASES)
def test_a_guest_on_its_way_back_to_a_checkpoint_is_taken_up(world: World, release: str) -> None:
    """An operator has decided that the guest continues at the source, and the sender had made the
    domain for that.
    """
    spec = boot(world)
    begin(world, "guest", checkpoint_every_s=0.02)
    until(lambda: lines(world, "sender")[-1]["checkpoints"] > 1, "no checkpoint is kept")
    left = killed(world)
    world.destination.open("guest").destroy()
    with world.source.open("guest") as leaving:
        made = world.source.create_incoming(leaving.config(), instead_of=leaving)
    left.facts["sender"]["successor"] = made.domid
    made.close()
    left.replace(release, "protected-going-back", "protected-taken-over")
    start_sender(world)
    until(lambda: phase(world, "sender") == "failed", f"{lines(world, 'sender')}")
    assert "last checkpoint" in lines(world, "sender")[-1]["problem"]
    start_receiver(world, world.port)
    check(world, spec, "source")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("goes", [True, False])
def test_a_migration_that_xl_decides_is_taken_up(xl: Xl, release: str, goes: bool) -> None:
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = "postcopy"
    assert xl.run() == ((0, 0), (0, 0))
    xl.wait_for("deciding", "deciding")
    port = xl.world.ask("sender", command="status")["port"]
    killed(xl.world).replace(release, "xl-deciding", "xl-entrusted")
    start_receiver(xl.world, xl.world.port)
    until(lambda: xl.line("receiver")["phase"] == "in doubt", f"{xl.line('receiver')}")
    start_sender(xl.world, port)
    xl.wait_for("deciding", "deciding")
    (xl.go if goes else xl.stay)()
    if goes:
        xl.wait_for("completed", "completed")
        check_arrived(xl)
    else:
        xl.wait_for("failed", "failed")
        check_stayed(xl)
