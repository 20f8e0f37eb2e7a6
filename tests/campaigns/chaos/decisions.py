# SPDX-License-Identifier: GPL-2.0-or-later
"""An operator decides where the guest runs, at either end and at any instant, rightly or not."""

from __future__ import annotations

import re

import trio

from migrate.errors import MigrationError, UnknownMigrationError
from migrate.outcomes import ENDED
from tests.campaigns.chaos.faults import switchover
from tests.campaigns.chaos.operators import GROUPS, check_reason
from tests.campaigns.chaos.trial import Decision, Fault, Line, Trial
from tests.campaigns.chaos.world import LostError

UNDECIDED = ("interrupted", "in doubt", "held")
"""The phases in which there is something to decide."""
REFUSALS = {
    "before the switchover": "belongs here|belongs to the source|taken up|resumed",
    "ended": "has ended",
}
"""For groups of phases: the reason why there is nothing to decide."""


async def decide(trial: Trial) -> None:
    """Make some decisions, most of them while the link is down."""
    if down := trial.random.random() < 0.8:
        await switchover(trial)
        await trio.sleep(trial.random.uniform(0, 0.1))
        trial.link.down()
    for _ in range(trial.random.choice([1, 2, 5])):
        await trio.sleep(trial.random.uniform(0, 0.2))
        async with trial.killing:
            if await trial.answered(has_ended, trial):
                break
            await one_decision(
                trial,
                Decision(
                    trial.random.choice(["sender", "receiver"]),
                    here=trial.random.random() < 0.5,
                    force=trial.random.random() < 0.3,
                ),
            )
    if down:
        trial.link.is_up = True


def has_ended(trial: Trial) -> bool:
    """Whether the migration has ended; half of the decisions are made nevertheless."""
    lines = [trial.line(which) for which in ("sender", "receiver")]
    ended = all(line is None or line["phase"] in ENDED for line in lines)
    return ended and trial.random.random() < 0.5


def ask(trial: Trial, decision: Decision) -> str:
    """Request a decision.  Returns the answer; empty if the daemon acts."""
    try:
        trial.world.ask(
            decision.at, command="decide", migration=trial.id, here=decision.here,
            force=decision.force,
        )  # fmt: skip
    except MigrationError as error:
        return str(error)
    return ""


def known(trial: Trial, which: str) -> str:
    try:
        return str(trial.world.ask(which, command="show", migration=trial.id)["known"])
    except UnknownMigrationError:
        return ""


async def one_decision(trial: Trial, decision: Decision) -> None:
    before = await trial.answered(trial.line, decision.at)
    reported = await trial.answered(known, trial, decision.at)
    trial.may_run_twice |= decision.here
    answer = await trial.answered(ask, trial, decision)
    after = await trial.answered(trial.line, decision.at)
    asked = f"{decision}, {[line and line['phase'] for line in (before, after)]}"
    trial.faults.append(f"{asked}: {answer or 'acts'}")
    if answer:
        check_reason(answer, asked)
        check_refusal(answer, asked, before, after)
        return
    trial.decisions.append(decision)
    if (
        before is None
        or after is None
        or not {before["phase"], after["phase"]} & {*UNDECIDED, *ENDED}
    ):
        raise LostError(f"{asked}: there was nothing to decide")
    if before["phase"] in ENDED:
        raise LostError(f"{asked}: the migration had ended")
    forced = decision.force or trial.checkpoint_every_s is not None
    if decision.at == "sender" and decision.here and "has reported that" in reported and not forced:
        raise LostError(f"{asked}: it acts without --force, but {reported}")


def check_refusal(answer: str, asked: str, before: Line | None, after: Line | None) -> None:
    if before is None or after is None:
        return
    groups = {GROUPS.get(line["phase"], "") for line in (before, after)}
    if len(groups) == 1 and not re.search(REFUSALS.get(groups.pop(), "."), answer):
        raise LostError(f"{asked}: {answer}")


DECISIONS = [Fault("decisions", decide, "guest")] * 3
