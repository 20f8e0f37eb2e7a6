# SPDX-License-Identifier: GPL-2.0-or-later
"""What people are shown of a migration, and how much of it fits.  Sans-IO: the answer of a daemon
and the width of a terminal go in, and text comes out.

A value that the daemon does not have is left out.  A daemon of an earlier release has fewer values,
and a receiver has others than a sender.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from migrate.cli.text import table
from migrate.outcomes import outcome
from migrate.units import (
    command,
    counted,
    display_width,
    human_bytes,
    human_seconds,
    human_us,
    printable,
)

MIB = 2**20
PAGE = 4096
MOST_OF_NAME = 16
"""The most characters of a guest's name where little fits."""
BAR = 20
Answer = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """A part of a line.  ``forms``: the same in words and in short, the longest form first.

    ``rank``: of several fields those with the lower ranks are shown.
    """

    rank: int
    forms: Sequence[str]
    drawn: bool = False
    """The figure is for a line that is drawn again and again, and not for one that stays."""


def fit(fields: Sequence[Field], width: int) -> str:
    """Return one line of at most ``width`` characters: the fields of the lowest ranks that fit in
    their shortest forms, and then longer forms for as long as these fit.
    """
    by_rank = sorted(fields, key=lambda one: one.rank)
    chosen: dict[int, str] = {}

    def line() -> str:
        return ", ".join(chosen[id(one)] for one in fields if id(one) in chosen)

    def use(field: Field, form: str) -> bool:
        """Use this form, unless the line becomes too long."""
        before = chosen.get(id(field))
        chosen[id(field)] = form
        if display_width(line()) <= width:
            return True
        del chosen[id(field)]
        if before is not None:
            chosen[id(field)] = before
        return False

    for field in by_rank:
        use(field, field.forms[-1])
    for field in by_rank:
        if id(field) in chosen:
            any(use(field, form) for form in field.forms)
    return line() or by_rank[0].forms[-1][:width]


def in_full(fields: Sequence[Field]) -> str:
    """Return a line that stays, with each field in its longest form."""
    return ", ".join(field.forms[0] for field in fields if not field.drawn)


# ---- the progress of one migration ----
def progress_fields(p: Answer) -> list[Field]:
    """Return the fields of the progress line, in their order."""
    title = _title(p)
    if p["problem"]:
        return [Field(0, [f"{title.forms[0]}: {p['problem']}"])]
    found = [title, *_amount(p)]
    found += _speed(p)
    found += _of_precopy(p) if p["phase"] == "precopy" else _after_handover(p)
    if p.get("elapsed_s") is not None:
        found.append(Field(10, [f"elapsed {human_seconds(p['elapsed_s'])}"]))
    return found


def _title(p: Answer) -> Field:
    name, phase = printable(str(p["domain"])), p["phase"]
    in_rounds = phase == "precopy" and p.get("round")
    of_round = f" {p['round']}" if in_rounds else ""
    return Field(
        0,
        [
            f"{name}: {phase}" + (f", round{of_round}" if in_rounds else ""),
            f"{name}: {phase}{of_round}",
            f"{brief_name(name)}: {phase}{of_round}",
        ],
    )


def brief_name(name: str) -> str:
    return name if len(name) <= MOST_OF_NAME else f"{name[: MOST_OF_NAME - 3]}..."


def _amount(p: Answer) -> list[Field]:
    total, done = p.get("pages_total"), p.get("pages_done")
    if not total or done is None:
        received = p.get("bytes_received")
        return [Field(1, [f"{received / MIB:.0f} MiB received"])] if received else []
    done = min(done, total)
    filled = "#" * round(BAR * done / total)
    total_mib = f"{total * PAGE / MIB:.0f}"
    done_mib = f"{done * PAGE / MIB:.0f}".rjust(len(total_mib))  # the fields behind it stay
    return [
        Field(11, [f"[{filled:-<{BAR}}]"], drawn=True),
        Field(9, [f"{done_percent(p)}%"]),
        Field(1, [f"{done_mib} of {total_mib} MiB", f"{done_mib}/{total_mib} MiB"]),
    ]


def done_percent(p: Answer) -> int | None:
    """Return how much of the round, or of the pages missing at the handover, is done; 100 only if
    all of it is.
    """
    total, done = p.get("pages_total"), p.get("pages_done")
    return min(done, total) * 100 // total if total and done is not None else None


def _speed(p: Answer) -> list[Field]:
    if p.get("paused"):
        return [Field(1, ["copying is paused", "paused"])]
    if p.get("quiet_s"):
        quiet = human_seconds(p["quiet_s"])
        return [Field(1, [f"no background copying for {quiet}", f"quiet for {quiet}"])]
    found = []
    if "bytes_per_s" in p:
        found.append(Field(2, [brief_rate(p["bytes_per_s"])]))
    if "eta_s" in p:
        found.append(Field(3, [f"ETA {eta(p)}"]))
    return found


def rate(bytes_per_s: float | None) -> str:
    return "- MiB/s" if bytes_per_s is None else f"{human_bytes(bytes_per_s)}/s"


def brief_rate(bytes_per_s: float | None) -> str:
    """Return the rate as one that changes is read: without decimals from 10 on."""
    text = rate(bytes_per_s)
    number, unit = text.split()
    return f"{float(number):.0f} {unit}" if len(number) > 3 else text


def eta(p: Answer) -> str:
    """Return when the migration is expected to be completed; ``-`` if that is not known, ``>`` with
    a time if it cannot be earlier, and ``paused`` while copying is paused.
    """
    if p.get("paused"):
        return "paused"
    least_s, expected_s = p.get("eta_least_s"), p["eta_s"]
    if expected_s is not None:
        return human_seconds(math.ceil(expected_s))
    return "-" if least_s is None else f">{human_seconds(math.ceil(least_s))}"


def _of_precopy(p: Answer) -> list[Field]:
    found = []
    if p.get("dirty_bytes_per_s") is not None:
        found.append(Field(4, [f"dirty {brief_rate(p['dirty_bytes_per_s'])}"]))
    if p.get("expected_freeze_ms") is not None:
        text = human_us(p["expected_freeze_ms"] * 1000)
        found.append(Field(5, [f"expected freeze {text}", f"freeze {text}"]))
    return found


def _after_handover(p: Answer) -> list[Field]:
    found = []
    # A receiver does not name the handover, and has no missing pages before it.
    if p.get("handed_over", p["phase"] != "switchover") and "outstanding" not in p.get(
        "unknown", ()
    ):
        pages = counted(p["outstanding"], "page")
        found.append(Field(6, [f"{pages} outstanding", f"{pages} left"]))
    if p.get("faults_per_s") is not None:
        found.append(Field(5, [f"{p['faults_per_s']:.0f} faults/s"]))
    if p.get("longest_wait_us"):
        text = human_us(p["longest_wait_us"])
        found.append(Field(4, [f"worst block {text}", f"worst {text}"]))
    if p.get("faults") and p.get("latency_us"):
        found.append(Field(8, [f"fault {human_us(p['latency_us'])}"]))
    if p.get("checkpoint_age_s") is not None:
        age = f"{p['checkpoint_age_s']:.1f} s ago"
        found.append(Field(3, [f"protected as of {age}", f"protected {age}"]))
    if p.get("unprotected"):
        found.append(Field(2, ["not protected any more", "not protected"]))
    return found


# ---- `list` ----
NUMBERS = "ELAPSED DONE RATE OUTSTANDING"
TITLES = (
    "ID", "DOMAIN", "DIRECTION", "PHASE", "STARTED", "ELAPSED", "DONE", "RATE", "OUTSTANDING",
)  # fmt: skip
"""The columns; the reason follows them."""
PROBLEM, GAP = "PROBLEM", "  "
LESS_NEEDED = ("STARTED", "ELAPSED", "OUTSTANDING", "RATE", "DONE")
"""The columns that are left out of a narrow terminal, the least needed first."""


class Layout(NamedTuple):
    """The columns of a table.  ``less_needed``: those that are left out of a narrow terminal, the
    least needed first.  ``numbers``: those that are aligned at the right.
    """

    titles: Sequence[str]
    less_needed: Sequence[str]
    numbers: str


LIST = Layout(TITLES, LESS_NEEDED, NUMBERS)


def how_it_is(line: Answer) -> str:
    """Return the phase; of a migration that was cancelled or rescued, that."""
    ended = line.get("outcome") or outcome(line["phase"], line["problem"])
    return ended or str(known(line, "phase"))


def known(line: Answer, key: str) -> Any:
    """Return a value for people: "-" if the daemon does not have the value, which is 0 in JSON."""
    return "-" if key in line.get("unknown", ()) else line[key]


def problem(line: dict[str, Any]) -> str:
    """Return why a migration has ended or waits, or why its guest is not protected any more."""
    if line["problem"]:
        return f"{line['problem']}{io_limit(line)}"
    if line.get("paused"):
        return f"its copying is paused: {command('resume', line['domain'])}"
    if line.get("quiet_s"):
        return (
            f"no page has arrived in the background for {human_seconds(line['quiet_s'])} (pages "
            "that vCPUs wait for do not count): copying is paused, its cap is low, or the sender "
            f"gets no CPU: {command('show', line['domain'])} at the source has the pause and "
            "the cap"
        )
    return line.get("unprotected", "") and f"not protected any more: {line['unprotected']}"


def io_limit(line: dict[str, Any]) -> str:
    """Return when the guest's I/O to missing pages fails, as text; empty if that cannot happen."""
    left_s = line.get("io_fails_in_s")
    if left_s is None:
        return ""
    if left_s:
        return f"; its I/O to missing pages fails in {left_s:.0f} s"
    return "; its I/O to missing pages has failed: look for I/O errors in the guest"


def time_of_day(at: float, now: float) -> str:
    """Return the local time, with the day if it is not today."""
    there, today = time.localtime(at), time.localtime(now)
    form = "%H:%M:%S" if there[:3] == today[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, there)


def cells(line: Answer, now: float) -> dict[str, str]:
    """Return the columns of ``list`` for one migration, without the reason."""
    percent = 100 if line["phase"] == "completed" else done_percent(line)
    started_at, elapsed_s = line.get("started_at"), line.get("elapsed_s")
    per_s = line.get("bytes_per_s")
    return {
        "ID": line["id"][:8],
        "DOMAIN": known(line, "domain"),
        "DIRECTION": known(line, "direction"),
        "PHASE": how_it_is(line),
        "STARTED": "-" if started_at is None else time_of_day(started_at, now),
        "ELAPSED": "-" if elapsed_s is None else human_seconds(elapsed_s),
        "DONE": "-" if percent is None else f"{percent}%",
        "RATE": "-" if per_s is None else rate(per_s),
        "OUTSTANDING": str(known(line, "outstanding")),
    }


def columns(rows: Sequence[dict[str, str]], width: int | None, layout: Layout = LIST) -> list[str]:
    """Return the columns that fit ``width``; ``None``: all."""
    titles = list(layout.titles)
    for column in layout.less_needed:
        if width is None or _width_of(rows, titles) <= width:
            break
        titles.remove(column)
    return titles


def _width_of(rows: Sequence[dict[str, str]], titles: Sequence[str]) -> int:
    widths = (max(map(display_width, (title, *(row[title] for row in rows)))) for title in titles)
    return sum(width + len(GAP) for width in widths) - len(GAP)


def table_of(lines: list[dict[str, Any]], width: int | None, now: float) -> str:
    """Return the table of ``list``.  ``width``: of the terminal; ``None``: no limit.  ``now``:
    seconds since 1970.
    """
    rows = [cells(line, now) for line in lines]
    return with_reasons(rows, [problem(line) for line in lines], width)


def with_reasons(
    rows: Sequence[dict[str, str]],
    reasons: Sequence[str],
    width: int | None,
    layout: Layout = LIST,
) -> str:
    """Return a table of rows, each with its reason.

    The reasons are the last column.  Where they do not fit, each is below its row.
    """
    titles = columns(rows, width, layout)
    longest = max(display_width(reason) for reason in (PROBLEM, *reasons))
    if width is None or _width_of(rows, titles) + len(GAP) + longest <= width:
        texts = [
            [*(row[title] for title in titles), reason]
            for row, reason in zip(rows, reasons, strict=True)
        ]
        return table((*titles, PROBLEM), texts, numbers=layout.numbers)
    texts = [[row[title] for title in titles] for row in rows]
    head, *body = table(titles, texts, numbers=layout.numbers).split("\n")
    found = [head]
    for row, reason in zip(body, reasons, strict=True):
        found += [
            row,
            *textwrap.wrap(
                printable(reason), width, initial_indent=GAP * 2, subsequent_indent=GAP * 2
            ),
        ]
    return "\n".join(found)
