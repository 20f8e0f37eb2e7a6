# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests of operators at random instants: second migrations, and commands.  Each acts, or its
answer has the reason.

docs/operating.md describes what each command does in each phase.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

import trio

from migrate.errors import MigrationError, UnknownMigrationError
from migrate.outcomes import ENDED
from tests.campaigns.chaos import adjusting
from tests.campaigns.chaos.trial import Fault, Line, Trial
from tests.campaigns.chaos.world import LostError

NO_REASON = re.compile(r"internal error|bad request|^.{0,9}$")
COMMANDS = (
    "show", "reconnect", "cancel", "postcopy-now", "decide here", "decide elsewhere",
    *adjusting.COMMANDS,
)  # fmt: skip
ACTS = "acts"
BEFORE, SWITCHOVER, AFTER, END = (
    "before the switchover",
    "switchover",
    "after the handover",
    "ended",
)
GROUPS = {
    "connecting": BEFORE,
    "preflight": BEFORE,
    "precopy": BEFORE,
    "switchover": SWITCHOVER,
    **dict.fromkeys(ENDED, END),
}
"""The groups of phases; all other phases are after the handover, as far as that end can find
out.
"""
ENDING = {
    "pause": "has ended",
    "resume": "has ended",
    "set": "has ended",
    "reconnect": "has ended|acts",
    "cancel": "has ended",
    "postcopy-now": "has ended",
    "decide": "has ended",
}
ASK_SENDER = dict.fromkeys(("postcopy-now", "pause", "resume", "set"), "ask the sender")
ANSWERS = {
    ("sender", BEFORE): {
        "reconnect": "nothing to reconnect",
        "cancel": ACTS,
        "decide": "guest belongs here",
        "postcopy-now": "acts|--strategy precopy|past its precopy|is paused",
        "pause": "acts|is paused already|in its switchover",
        "resume": "acts|is not paused",
        "set": "acts|too late for|not with --strategy (pre|post)copy",
    },
    ("sender", AFTER): {
        "reconnect": "acts|nothing to reconnect|reconnecting does not help",
        "cancel": "too late",
        "postcopy-now": "--strategy precopy|past its precopy",
        "pause": "acts|is paused already|in its switchover|nothing to pause",
        "resume": "acts|is not paused|nothing to resume",
        "set": "acts|too late for|nothing to change|not with --strategy (pre|post)copy",
        "decide": "are connected|reported that .* runs there|already",
    },
    ("sender", END): ENDING,
    ("receiver", BEFORE): {
        "reconnect": "nothing to reconnect",
        "cancel": "acts|taken up|resumed",
        "decide": "belongs to the source|taken up|resumed",
        **ASK_SENDER,
    },
    ("receiver", AFTER): {
        "reconnect": "nothing to reconnect|the source dials",
        "cancel": "too late|taken up|resumed",
        "decide": "nothing to decide|taken up|resumed",
        **ASK_SENDER,
    },
    ("receiver", END): {**ENDING, **ASK_SENDER},
}
"""The answers to a command, by the end and by the group of its phase.  In the switchover the answer
of either group may come.
"""


def check_reason(answer: str, asked: str) -> None:
    if NO_REASON.search(answer):
        raise LostError(f"{asked}: {answer!r} is no reason")


# ---- second migrations ----
def begin(trial: Trial, which: str, domain: str, port: int) -> str:
    """Request a migration.  Returns why it is refused, or nothing as soon as it is being carried
    out.
    """
    request = trial.migration(domain, port)
    if which == "onward":
        request["checkpoint_every_s"] = None
    try:
        with trial.world.control(which) as client:
            client.send(**request)
            for answer in client.answers():
                phase = answer.get("phase")
                if answer["event"] == "result" or phase not in ("connecting", "failed"):
                    return ""
    except MigrationError as error:
        return str(error)
    return ""


def under_way(lines: list[Line], *, but: tuple[str, ...] = ENDED) -> set[str]:
    return {line["id"] for line in lines if line["phase"] not in but}


def names(trial: Trial, which: str) -> list[str]:
    """Return the names by which the guest can be named."""
    host = trial.world.destination if which == "onward" else trial.world.source
    found = [
        [str(info.domid), str(uuid.UUID(bytes=info.handle))]
        for info in host.domains()
        if info.name == trial.spec.name
    ]
    return [trial.spec.name, *(found[0] if found else [])]


async def migrate_again(trial: Trial, which: str, at: str, *, but: tuple[str, ...]) -> None:
    """Request a second migration.  It is refused while the first migration, which ``at`` shows, is
    in progress, and carried out afterwards.
    """
    async with trial.killing:
        before = under_way(await trial.answered(trial.lines, at), but=but)
        domain = trial.random.choice(await trial.answered(names, trial, which))
        to = {"onward": ["homeward"], "sender": ["", "receiver", "second"]}[which]
        port = {"": trial.link.port, "receiver": trial.world.port, **trial.world.ports}[
            trial.random.choice(to)
        ]
        answer = await trial.answered(begin, trial, which, domain, port)
        after = under_way(await trial.answered(trial.lines, at), but=but)
    asked = f"{which}: migrate {domain} to port {port}"
    if answer:
        check_reason(answer, asked)
        return
    if before & after:
        raise LostError(
            f"{asked}: it is carried out while {before & after} is under way at the {at}"
        )
    trial.again.append(which)


async def start_beside(trial: Trial, *which: str) -> None:
    async with trial.killing:
        for name in which:
            await trial.answered(trial.world.start_beside, name)


async def second_migration(trial: Trial) -> None:
    """Migrate the guest a second time from the source, to the same receiver or to another one of
    its host.
    """
    await start_beside(trial, "second")
    await migrate_again(trial, "sender", "sender", but=ENDED)


async def onward_migration(trial: Trial) -> None:
    """Migrate the guest from the destination back to the source's host."""
    await start_beside(trial, "homeward", "onward")
    await migrate_again(trial, "onward", "receiver", but=(*ENDED, "completing"))


# ---- commands ----
def ask(trial: Trial, which: str, what: str, name: str) -> str:
    """Return :data:`ACTS`, or the answer."""
    word, _space, how = what.partition(" ")
    more: dict[str, Any] = {}
    if word == "decide":
        more["here"] = how == "here"
    elif word == "set":
        more["values"] = adjusting.SETTINGS[how]
    try:
        answer = trial.world.ask(which, command=word, migration=name, **more)
    except UnknownMigrationError:
        return "unknown"
    except MigrationError as error:
        return str(error)
    if word == "show" and not answer["known"]:
        raise LostError(f"{which} shows {name}, and not what it has of the other end: {answer}")
    return ACTS


async def may_decide(trial: Trial, which: str, what: str) -> bool:
    """Whether the answer must be a refusal, whatever happens meanwhile."""
    line = await trial.answered(trial.line, which)
    if line is None or trial.checkpoint_every_s is not None:
        return False
    if line["phase"] in ENDED or trial.nobody_may_notice:
        return True
    if which == "receiver":
        return line["phase"] in ("postcopy", "completing") and not line["problem"]
    if what != "decide here":
        return False
    try:
        shown = await trial.answered(
            lambda: trial.world.ask(which, command="show", migration=trial.id)
        )
    except UnknownMigrationError:
        return False
    return "has reported that" in shown["known"]


def expected(trial: Trial, which: str, what: str, before: Line | None, after: Line | None) -> str:
    """Return a pattern for the answer."""
    if before is None or after is None:
        return "."
    groups = {GROUPS.get(line["phase"], AFTER) for line in (before, after)}
    if what == "show" or len(groups) > 1 or groups == {SWITCHOVER} or trial.again:
        return "."
    (group,) = groups
    answers = ANSWERS[which, group][what.partition(" ")[0]]
    if group == END and which in trial.older_entries:
        return f"{answers}|kept and not resumed"  # a guest may wait for that entry
    return answers


async def command(trial: Trial) -> None:
    """Send some commands to either end."""
    for _ in range(trial.random.choice([1, 3, 10])):
        which, what = trial.random.choice(["sender", "receiver"]), trial.random.choice(COMMANDS)
        if what == "cancel" and trial.random.random() < 0.5:
            continue  # after that few commands act
        async with trial.killing:
            await one_command(trial, which, what)
        await trio.sleep(trial.random.uniform(0, 0.1))


async def one_command(trial: Trial, which: str, what: str) -> None:
    if what.startswith("decide") and not await may_decide(trial, which, what):
        return
    name = trial.random.choice([trial.spec.name, trial.id, trial.id[:8]])
    before = await trial.answered(trial.line, which)
    answer = await trial.answered(ask, trial, which, what, name)
    after = await trial.answered(trial.line, which)
    asked = f"{which}: {what} {name}, {[line and line['phase'] for line in (before, after)]}"
    trial.faults.append(f"{asked}: {answer}")
    if answer == "unknown" and None not in (before, after):
        raise LostError(f"{asked}: the daemon does not find what it lists")
    if answer not in (ACTS, "unknown"):
        check_reason(answer, asked)
    if answer != "unknown" and not re.search(expected(trial, which, what, before, after), answer):
        raise LostError(f"{asked}: {answer}")
    if answer == ACTS and what.startswith("decide"):
        raise LostError(f"{asked}: it acts")
    if answer == ACTS and what == "cancel" and not trial.again:
        trial.cancelled.add(trial.id)


OPERATORS: list[Fault] = [
    Fault("second migration", second_migration, "nobody"),
    Fault("second migration", second_migration, "nobody"),
    Fault("onward migration", onward_migration, "nobody"),
    Fault("onward migration", onward_migration, "nobody"),
    Fault("commands", command, "nobody"),
    Fault("commands", command, "nobody"),
    Fault("commands", command, "nobody"),
]
