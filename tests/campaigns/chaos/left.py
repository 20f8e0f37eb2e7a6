# SPDX-License-Identifier: GPL-2.0-or-later
"""The faults of a daemon's state directory while the daemon is down."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import trio

from migrate.cli.world import verify_migrated
from migrate.errors import MigrationError
from migrate.protocol.session import new_id
from tests.campaigns.chaos.faults import lose
from tests.campaigns.chaos.trial import MIB, Fault, Trial, destroy, in_thread
from tests.campaigns.chaos.world import LostError
from tests.support.links import PIECE
from xenbackend.simulated.guest import GuestSpec

CHECKPOINT_S = 1.0
"""How long a checkpoint may take to arrive."""
SLOW_PIECE, SLOW_S = 8192, 0.002
OTHER_S = 20.0
"""How long the migration of another guest may take, which other faults of the trial may delay."""
OLDER = {
    "sender": ("begun", "suspending", "given up"),
    "receiver": ("making", "made"),
}
"""The steps of a migration that ended before this one began, and whose entry was not erased."""


# ---- a checkpoint ----
def flip(random: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(random: Random, path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def remove(_random: Random, path: Path) -> None:
    path.unlink()


async def damaged_checkpoint(trial: Trial) -> None:
    """The last checkpoint is damaged or gone; in half of the cases the destination is gone as
    well.
    """

    def damage() -> None:
        world, migrations = trial.world, trial.migrations()
        world.kill("sender")
        path = world.state("sender") / f"{trial.id}.checkpoint"
        if path.exists():
            how = trial.random.choice([flip, truncate, remove])
            how(trial.random, path)
            trial.faults.append(f"checkpoint: {how.__name__}")
            trial.checkpoint_damaged = True
            entry = path.with_suffix(".json")
            # Without an entry, the sender was killed just before it removed the checkpoint.
            if trial.random.random() < 0.5 and entry.exists():
                step = last(entry.read_text())["step"]
                lose(trial, migrations, lambda: step == "completing")
        world.start_anew("sender")

    path = trial.world.state("sender") / f"{trial.id}.checkpoint"
    # Some pages must still be missing when it arrives.
    trial.link.piece, trial.link.delay_s = SLOW_PIECE, SLOW_S
    with trio.move_on_after(CHECKPOINT_S):
        while not path.exists():
            await trio.sleep(0.01)
    async with trial.killing:
        await in_thread(damage)
    trial.link.piece, trial.link.delay_s = PIECE, 0.0


# ---- a journal ----
def last(entry: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(entry.splitlines()[-1])
    facts.pop("sum", None)
    return facts


def with_facts(entry: str, **facts: Any) -> str:
    return "\n" + json.dumps({**last(entry), **facts})


def of_another_release(_random: Random, entry: str) -> str:
    return with_facts(entry, step="warming")


def cut_off(random: Random, entry: str) -> str:
    """Return a part of an entry without a whole line."""
    return entry[: random.randrange(len(entry.splitlines()[1]))]


def of_wrong_types(random: Random, entry: str) -> str:
    name = random.choice(["step", "domid", "handle", "key", "dials", "rejoins", "proven", "xl"])
    return with_facts(entry, **{name: {"not": "that"}})


def with_unknown_keys(_random: Random, entry: str) -> str:
    return with_facts(entry, temperature=7, colours=["red"])


def overwritten(random: Random, entry: str) -> str:
    """Return the entries with one character of the last one changed."""
    at = random.randrange(entry.rindex("\n{"), len(entry))
    other = random.choice([c for c in '\0x7}"\\\n' if c != entry[at]])
    return entry[:at] + other + entry[at + 1 :]


def with_a_beginning(random: Random, entry: str) -> str:
    """Return the entries with the beginning of another one, which a full disk has cut off: half of
    the beginnings end within a number or a string.
    """
    last_one = entry[entry.rindex("\n{") :]
    within = [found.end() for found in re.finditer(r"[.\\]", last_one)]
    anywhere = random.randrange(1, len(last_one))
    return entry + last_one[: random.choice([anywhere, random.choice(within or [anywhere])])]


DAMAGES: list[Callable[[Random, str], str]] = [
    of_another_release,
    cut_off,
    overwritten,
    of_wrong_types,
    with_unknown_keys,
    with_a_beginning,
]
HARMLESS = with_unknown_keys, with_a_beginning


async def damaged_entry(trial: Trial) -> None:
    """A daemon keeps an entry that it cannot use, names the entry in its log and serves other
    guests.  Then the entry is restored.  A daemon ignores keys that are unknown to it, and an entry
    that was cut off.
    """
    which = trial.random.choice(["sender", "receiver"])
    async with trial.killing:
        await in_thread(_damaged_entry, trial, which)


def _damaged_entry(trial: Trial, which: str) -> None:
    world = trial.world
    world.kill(which)
    path = world.state(which) / f"{trial.id}.json"
    if not path.exists():
        world.start_anew(which)
        return
    good = path.read_text()
    how = trial.random.choice(DAMAGES)
    trial.faults.append(f"entry of the {which}: {how.__name__}")
    path.write_text(bad := how(trial.random, good))
    logged = (world.directory / f"{which}.log").stat().st_size
    world.start_anew(which)
    is_there = any(line["id"] == trial.id for line in trial.lines(which))
    if how in HARMLESS:
        if not is_there:
            raise LostError(f"{which}: it does not resume an entry {how.__name__}: {bad}")
        return
    if is_there:
        raise LostError(f"{which}: it acts on an entry {how.__name__}: {bad}")
    _migrate_another(trial)
    if not path.exists() or path.read_text() != bad:
        raise LostError(f"{which}: an entry {how.__name__} was not kept: {bad}")
    if path.name.encode() not in (world.directory / f"{which}.log").read_bytes()[logged:]:
        raise LostError(f"{which}: the log does not name an entry {how.__name__}")
    world.kill(which)
    path.write_text(good)
    world.start_anew(which)


def _migrate_another(trial: Trial) -> None:
    world, until = trial.world, time.monotonic() + OTHER_S
    while not world.hung_up:  # a daemon that is being stopped accepts no other guest
        spec = GuestSpec(f"other{new_id()[:8]}", 4 * MIB, workload="random")
        world.source.create_guest(spec.to_bytes()).close()
        try:
            world.ask(
                "sender", command="migrate", domain=spec.name,
                destination=f"127.0.0.1:{world.port}", strategy="postcopy",
            )  # fmt: skip
        except MigrationError as error:
            destroy(world.source, spec.name)
            if time.monotonic() > until:
                raise LostError(f"another guest is not served: {error}") from error
            time.sleep(0.1)
            continue
        verification, _view = verify_migrated(world, spec)
        destroy(world.destination, spec.name)
        if verification.problems:
            raise LostError(f"another guest: {'; '.join(verification.problems)}")
        return


async def older_entry(trial: Trial) -> None:
    """A daemon finds an older entry of the same domain, from a migration that has ended."""
    which = trial.random.choice(["sender", "receiver"])

    def leave() -> None:
        world = trial.world
        world.kill(which)
        path = world.state(which) / f"{trial.id}.json"
        step = ""
        if path.exists():
            step = trial.random.choice(OLDER[which])
            facts: dict[str, Any] = {
                "step": step,
                "key": "07" * 16,
                "dials": ["127.0.0.1", world.port],
            }
            if step == "making":
                facts["domid"] = -1
            older = path.with_name(f"{new_id()}.json")
            older.write_text(with_facts(path.read_text(), **facts))
            os.utime(older, (path.stat().st_mtime - 1,) * 2)
            trial.older_entries.add(which)
            trial.faults.append(f"an older entry at the {which}: {step}")
        world.start_anew(which)
        if step and not any(line["id"] == trial.id for line in trial.lines(which)):
            raise LostError(f"{which}: it takes up an entry {step} instead of a newer one")

    async with trial.killing:
        await in_thread(leave)


LEFT = [
    Fault("checkpoint damaged", damaged_checkpoint, protected=True),
    Fault("entry damaged", damaged_entry),
    Fault("entry damaged", damaged_entry),
    Fault("older entry", older_entry),
]
