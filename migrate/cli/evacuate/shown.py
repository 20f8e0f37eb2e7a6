# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shown of an evacuation.  Sans-IO: guests and the width of a terminal go in, and text
comes out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from migrate.cli.evacuate.planner import Guest, Planner, Step
from migrate.cli.figures import (
    Field,
    Layout,
    brief_name,
    brief_rate,
    done_percent,
    eta,
    fit,
    how_it_is,
    in_full,
    problem,
    with_reasons,
)
from migrate.units import counted, human_bytes, human_seconds, human_us, parse_address
from migrate.xl import WITH_HELPER

PROGRESS = Layout(
    ("GUEST", "MEMORY", "TO", "STRATEGY", "PHASE", "DONE", "RATE", "ETA", "ELAPSED"),
    ("MEMORY", "ELAPSED", "TO", "STRATEGY", "RATE", "DONE"),
    "MEMORY DONE RATE ETA ELAPSED",
)
RESULTS = Layout(
    ("GUEST", "MEMORY", "TO", "STRATEGY", "RESULT", "TOOK", "DOWNTIME"),
    ("MEMORY", "STRATEGY", "TO", "TOOK"),
    "MEMORY TOOK DOWNTIME",
)
PLAN = Layout(
    ("GUEST", "MEMORY", "TO", "STRATEGY", "TOTAL", "DOWNTIME", "FROZEN"),
    ("MEMORY", "TOTAL", "DOWNTIME"),
    "MEMORY TOTAL DOWNTIME FROZEN",
)
NARROW = 100
"""A narrower table has names that are cut off."""
ORDER = (
    Step.MOVES, Step.BEGINS, Step.MEASURED, Step.FAILED, Step.ARRIVES, Step.WAITS, Step.PLANNED,
    Step.ENDED, Step.GONE,
)  # fmt: skip
"""The order of the rows: what does not fit a terminal is the end."""
LEFT = {
    Step.MOVES: "under way", Step.BEGINS: "not begun", Step.MEASURED: "not begun",
    Step.WAITS: "not begun", Step.ARRIVES: "not ready",
}  # fmt: skip
"""The result of guests that are not done when the command ends."""


def head(planner: Planner) -> str:
    """Return how far the evacuation is."""
    return in_full(_head(planner))


def _head(planner: Planner) -> list[Field]:
    gone, failed = len(planner.of(Step.GONE, Step.ENDED)), len(planner.of(Step.FAILED))
    moving, total = planner.of(Step.MOVES), len(planner.guests)
    waiting = total - gone - failed - len(moving) - len(planner.of(Step.PLANNED))
    fields = [Field(0, [f"{gone} of {counted(total, 'guest')} gone", f"{gone} of {total} gone"])]
    counts = ((1, failed, "failed"), (2, len(moving), "under way"), (4, waiting, "to go"))
    fields += [Field(rank, [f"{count} {what}"]) for rank, count, what in counts if count]
    if moving:
        rate = sum(guest.line.get("bytes_per_s") or 0 for guest in moving)
        fields.append(Field(3, [brief_rate(rate)]))
    return fields


def progress(planner: Planner, width: int, lines: int) -> list[str]:
    """Return the rows for a terminal."""
    guests = sorted(planner.guests, key=lambda guest: ORDER.index(guest.step))
    reasons = [_reason(guest) for guest in guests]
    text = with_reasons([_progress(guest, width) for guest in guests], reasons, width, PROGRESS)
    rows = [fit(_head(planner), width), *text.split("\n")]
    if len(rows) > lines:
        rows[lines - 1 :] = [f"... and {len(rows) - lines + 1} more"]
    return rows


def _progress(guest: Guest, width: int | None) -> dict[str, str]:
    line = guest.line if guest.step is Step.MOVES else {}
    percent = 100 if guest.step is Step.GONE else done_percent(line)
    elapsed_s, rate = guest.line.get("elapsed_s"), line.get("bytes_per_s")
    return {
        **_named(guest, width),
        "PHASE": phase(guest),
        "DONE": "-" if percent is None else f"{percent}%",
        "RATE": "-" if rate is None else brief_rate(rate),
        "ETA": eta(line) if "eta_s" in line else "-",
        "ELAPSED": "-" if elapsed_s is None else human_seconds(elapsed_s),
    }


def _named(guest: Guest, width: int | None) -> dict[str, str]:
    return {
        "GUEST": guest.name if width is None or width >= NARROW else brief_name(guest.name),
        "MEMORY": human_bytes(guest.memory_bytes) if guest.memory_bytes else "-",
        "TO": guest.destination or "-",
        "STRATEGY": guest.strategy or "-",
    }


def phase(guest: Guest) -> str:
    """Return where the guest is on its way, in a word or two."""
    if guest.step is Step.MOVES or (guest.step is Step.FAILED and guest.line):
        return how_it_is(guest.line)
    return str(guest.step.value)


def _reason(guest: Guest) -> str:
    return guest.problem or (problem(guest.line) if guest.step is Step.MOVES else "")


def obstacles(planner: Planner) -> Iterator[str]:
    """Yield what is known before anything moves about guests that cannot go, with the command for
    those that only their toolstack can move.
    """
    hosts = [parse_address(name, 0)[0] for name in planner.destinations]
    for guest in planner.of(Step.FAILED):
        yield f"{guest.name} cannot go: {guest.problem}"
        if guest.devices:
            where = hosts[0] if len(hosts) == 1 else "HOST"
            yield f"    {WITH_HELPER} xl migrate {shlex.quote(guest.name)} {where}"


# ---- the end ----
def summary(planner: Planner, width: int | None) -> str:
    """Return what has become of each guest."""
    rows = [_result(guest, width) for guest in planner.guests]
    return with_reasons(rows, [_reason(guest) for guest in planner.guests], width, RESULTS)


def result(guest: Guest) -> str:
    """Return what has become of a guest when the command ends."""
    return LEFT.get(guest.step) or phase(guest)


def _result(guest: Guest, width: int | None) -> dict[str, str]:
    took_s, downtime_s = guest.line.get("elapsed_s"), guest.line.get("downtime_s")
    return {
        **_named(guest, width),
        "RESULT": result(guest),
        "TOOK": "-" if took_s is None else human_seconds(took_s),
        "DOWNTIME": human_us(downtime_s * 1e6) if downtime_s else "-",
    }


def plan(planner: Planner, width: int | None) -> str:
    """Return what an evacuation would do."""
    rows = [_planned(guest, width) for guest in planner.guests]
    reasons = [_why(guest) for guest in planner.guests]
    return with_reasons(rows, reasons, width, PLAN)


def _why(guest: Guest) -> str:
    return LEFT[guest.step] if guest.step is Step.MOVES else _reason(guest)


def _planned(guest: Guest, width: int | None) -> dict[str, str]:
    expected = guest.estimate.get("strategies", {}).get(guest.strategy)
    if guest.step is not Step.PLANNED or expected is None:
        return {**_named(guest, width), "TOTAL": "-", "DOWNTIME": "-", "FROZEN": "-"}
    return {
        **_named(guest, width),
        "TOTAL": human_seconds(float(expected["total_s"])),
        "DOWNTIME": human_us(expected["downtime_ms"] * 1000),
        "FROZEN": human_us(expected["freeze_ms"] * 1000),
    }


def facts(planner: Planner, is_trial: bool) -> dict[str, Any]:
    """Return the same as JSON."""
    return {
        "dry_run": is_trial,
        "destinations": list(planner.destinations),
        "newcomers": planner.newcomers,
        "guests": [_facts(guest) for guest in planner.guests],
    }


def _facts(guest: Guest) -> dict[str, Any]:
    expected = guest.estimate.get("strategies", {}).get(guest.strategy)
    return {
        "domain": guest.name,
        "domid": guest.domid,
        "memory_bytes": guest.memory_bytes or None,
        "needed_bytes": guest.needed_bytes or None,
        "destination": guest.destination or None,
        "strategy": guest.strategy or None,
        "result": result(guest),
        "problem": _reason(guest),
        "id": guest.migration or None,
        "elapsed_s": guest.line.get("elapsed_s"),
        "downtime_s": guest.line.get("downtime_s"),
        "expected": expected,
    }


def changes(before: dict[int, str], guests: Sequence[Guest]) -> Iterator[str]:
    """Yield a line for each guest that has begun or ended its way since the last call.  ``before``
    is what the last call has left, and is changed.
    """
    for guest in guests:
        word = "" if guest.step in (Step.WAITS, Step.MEASURED, Step.BEGINS) else guest.step.value
        if before.get(guest.domid, "") == word:
            continue
        before[guest.domid] = word
        if word:
            yield f"{guest.name}: {_news(guest)}"


def _news(guest: Guest) -> str:
    match guest.step:
        case Step.MOVES:
            return f"to {guest.destination}, {guest.strategy}"
        case Step.GONE:
            elapsed_s = guest.line.get("elapsed_s")
            return "gone" if elapsed_s is None else f"gone after {human_seconds(elapsed_s)}"
        case Step.PLANNED:
            return f"to {guest.destination}, {guest.strategy}: {guest.estimate['reason']}"
        case _:
            return f"{phase(guest)}: {_reason(guest)}"
