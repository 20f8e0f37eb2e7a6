# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shown of an evacuation.  Sans-IO: guests and the width of a terminal go in, and text
comes out.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from migrate.cli.evacuate.planner import Guest, Planner, Step
from migrate.cli.figures import (
    GAP,
    Field,
    Layout,
    brief_name,
    brief_rate,
    columns,
    done_percent,
    eta,
    fit,
    how_it_is,
    in_full,
    problem,
    with_reasons,
)
from migrate.cli.text import table
from migrate.units import (
    counted,
    human_bytes,
    human_seconds,
    human_us,
    parse_address,
    printable,
)
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
SPARE = (Step.GONE, Step.ENDED, Step.FAILED)
"""The guests whose rows are left out first where not all fit, in this order: the first line has
their number.
"""
LEFT = {
    Step.MOVES: "under way", Step.BEGINS: "not begun", Step.MEASURED: "not begun",
    Step.WAITS: "not begun", Step.ARRIVES: "not ready",
}  # fmt: skip
"""The result of guests that are not done when the command ends."""


def head(planner: Planner) -> str:
    """Return how far the evacuation is."""
    return in_full(_head(planner))


def _head(planner: Planner) -> list[Field]:
    gone, not_gone = len(planner.of(Step.GONE, Step.ENDED)), planner.of(Step.FAILED)
    cancelled = sum(phase(guest) == "cancelled" for guest in not_gone)
    moving, total = planner.of(Step.MOVES), len(planner.guests)
    waiting = total - gone - len(not_gone) - len(moving) - len(planner.of(Step.PLANNED))
    fields = [Field(0, [f"{gone} of {counted(total, 'guest')} gone", f"{gone} of {total} gone"])]
    counts = (
        (1, len(not_gone) - cancelled, "failed"), (2, cancelled, "cancelled"),
        (3, len(moving), "under way"), (5, waiting, "to go"),
    )  # fmt: skip
    fields += [Field(rank, [f"{count} {what}"]) for rank, count, what in counts if count]
    if moving:
        rate = sum(guest.line.get("bytes_per_s") or 0 for guest in moving)
        fields.append(Field(4, [brief_rate(rate)]))
    return fields


def in_order(planner: Planner) -> list[Guest]:
    """Return the guests in the order in which they go, which all tables have: the largest first.
    One that is known by its migration alone was under way before the others.
    """
    return sorted(planner.guests, key=lambda guest: -guest.needed_bytes or -math.inf)


def progress(planner: Planner, width: int, lines: int) -> list[str]:
    """Return the rows for a terminal."""
    guests = in_order(planner)
    rows = _rows(guests, width)
    if (excess := 1 + len(rows) - lines) > 0:
        done = [guest for step in SPARE for guest in guests if guest.step is step]
        spared = {id(guest) for guest in done[:excess]}
        rows = _rows([guest for guest in guests if id(guest) not in spared], width)
    rows.insert(0, fit(_head(planner), width))
    if len(rows) > lines:
        rows[lines - 1 :] = [f"... and {len(rows) - lines + 1} more"]
    return rows


def _rows(guests: Sequence[Guest], width: int) -> list[str]:
    reasons = [_reason(guest) for guest in guests]
    shown = [_progress(guest, width) for guest in guests]
    return with_reasons(shown, reasons, width, PROGRESS).split("\n")


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
    guests = in_order(planner)
    rows = [_result(guest, width) for guest in guests]
    return with_reasons(rows, [_reason(guest) for guest in guests], width, RESULTS)


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


@dataclass(frozen=True)
class Total:
    """What the guests that would go take together."""

    guests: int
    memory_bytes: int
    total_s: float

    @classmethod
    def of(cls, planner: Planner, at_once: int) -> Total:
        """Add the guests up.  ``at_once``: how many go at the times that were estimated for them.
        They share the link, so the time of each is its own unless a cap has divided the link.
        """
        planned = planner.of(Step.PLANNED)
        seconds = sum(_expected(guest)["total_s"] for guest in planned)
        at_once = max(min(at_once, len(planned)), 1)
        memory_bytes = sum(guest.memory_bytes for guest in planned)
        return cls(len(planned), memory_bytes, round(seconds / at_once, 3))


def plan(planner: Planner, width: int | None, at_once: int) -> str:
    """Return what an evacuation would do: a table, and below it the guests that would not go.
    ``at_once``: see :meth:`Total.of`.
    """
    guests, total = in_order(planner), Total.of(planner, at_once)
    rows = [_planned(guest, width) for guest in guests]
    if total.guests:
        rows.append(_sum(total, len(guests)))
    titles = columns(rows, width, PLAN)
    found = [
        table(titles, [[row[title] for title in titles] for row in rows], numbers=PLAN.numbers)
    ]
    for guest in guests:
        if why := LEFT[guest.step] if guest.step is Step.MOVES else _reason(guest):
            text = printable(f"{guest.name}: {why}").replace("\n", " ")
            found += textwrap.wrap(text, width or len(text), subsequent_indent=GAP * 2)
    return "\n".join(found)


def _sum(total: Total, known: int) -> dict[str, str]:
    of_all = "" if total.guests == known else f"{total.guests} of "
    return {
        **dict.fromkeys(PLAN.titles, ""),
        "GUEST": f"{of_all}{counted(known, 'guest')}",
        "MEMORY": human_bytes(total.memory_bytes),
        "TOTAL": human_seconds(float(total.total_s)),
    }


def _expected(guest: Guest) -> dict[str, Any]:
    """Return what the guest's strategy is expected to take; empty if that was not estimated."""
    expected: dict[str, Any] = guest.estimate.get("strategies", {}).get(guest.strategy, {})
    return expected


def _planned(guest: Guest, width: int | None) -> dict[str, str]:
    expected = _expected(guest)
    if guest.step is not Step.PLANNED:
        return {**_named(guest, width), "TOTAL": "-", "DOWNTIME": "-", "FROZEN": "-"}
    return {
        **_named(guest, width),
        "TOTAL": human_seconds(float(expected["total_s"])),
        "DOWNTIME": human_us(expected["downtime_ms"] * 1000),
        "FROZEN": human_us(expected["freeze_ms"] * 1000),
    }


def facts(planner: Planner, trial: int | None) -> dict[str, Any]:
    """Return the same as JSON.  ``trial``: ``None`` after an evacuation, and ``at_once`` of
    :meth:`Total.of` after a dry run.
    """
    return {
        "dry_run": trial is not None,
        "destinations": list(planner.destinations),
        "newcomers": planner.newcomers,
        "total": None if trial is None else asdict(Total.of(planner, trial)),
        "guests": [_facts(guest) for guest in in_order(planner)],
    }


def _facts(guest: Guest) -> dict[str, Any]:
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
        "expected": _expected(guest) or None,
    }


def changes(before: dict[int, str], guests: Sequence[Guest]) -> Iterator[str]:
    """Yield a line for each guest that has begun or ended its way since the last call, or whose
    copying is paused since then.  ``before`` is what the last call has left, and is changed.
    """
    for guest in guests:
        word = "" if guest.step in (Step.WAITS, Step.MEASURED, Step.BEGINS) else guest.step.value
        paused = f"{word}, paused"
        was, now = before.get(guest.domid, ""), paused if guest.is_paused else word
        if was == now:
            continue
        before[guest.domid] = now
        if guest.is_paused:
            yield f"{guest.name}: {phase(guest)}: {_reason(guest)}"
        elif word and was != paused:
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
