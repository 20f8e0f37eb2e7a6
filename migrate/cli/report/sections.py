# SPDX-License-Identifier: GPL-2.0-or-later
"""The sections of a report: what is known of one migration, as pictures, tables and sentences.

Names and units of figures are those of ``show`` (``migrate/cli/shown.py``).
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as ET

from migrate import __version__
from migrate.cli import shown
from migrate.cli.figures import how_it_is, rate
from migrate.cli.report import plots, svg
from migrate.cli.report.accepted import accepted
from migrate.cli.report.html import document, element, figure, table, tiles, unknown
from migrate.cli.report.plots import MIB, PAGE, Line, Panel, both
from migrate.cli.report.series import MOST_VCPUS, End, Mark, Recorded, Series
from migrate.cli.report.strategies import measured_of, strategies
from migrate.units import counted, human_bytes, human_seconds, human_us

WHERE = {True: "source", False: "destination"}
DIRTY_RATE = "dirty rate"
Rows = list[tuple[str, ...]]
Buckets = Sequence[tuple[float, float, int]]


def report_of(answers: Sequence[dict[str, Any]], *, guests_own: Buckets = ()) -> str:
    """Return the report of one migration as HTML.  ``answers``: those of its ends to ``record``.
    ``guests_own``: the latency of faults as a simulated guest has measured it.

    Raises as :func:`accepted`.
    """
    return report_of_accepted([accepted(answer) for answer in answers], guests_own=guests_own)


def report_of_accepted(found: Sequence[dict[str, Any]], *, guests_own: Buckets = ()) -> str:
    """Return the same for answers that :func:`accepted` has returned."""
    recorded = Recorded(found)
    name = str(recorded.first.answer["domain"] or "a guest")
    return document(
        f"Migration of {name}",
        *_head(name, recorded),
        *_timeline(recorded),
        *_downtime(recorded),
        *_faults(recorded, guests_own),
        *_waits(recorded),
        *_memory(recorded),
        *_strategies(recorded),
        *_figures(recorded),
        element("footer", f"Made by xen-postcopy {__version__}."),
    )


def _other(recorded: Recorded) -> str:
    """Name the host that has what is missing here."""
    missing = WHERE[recorded.source is None]
    return f"make a report at the {missing} as well"


# ---- the head ----
def _head(name: str, recorded: Recorded) -> list[ET.Element]:
    answer = recorded.first.answer
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(recorded.start))
    known = " and ".join(f"the {WHERE[end.is_source]}" for end in recorded.ends)
    peer = f", to {answer['peer']}" if recorded.source else f", from {answer['peer']}"
    about = (
        f"{started}{peer if answer['peer'] else ''}; migration {answer['id']}; as known at {known}"
    )
    found = [element("h1", f"Migration of {name}"), element("p", about, class_="lead")]
    if answer["problem"]:
        found.append(element("p", str(answer["problem"]), class_="unknown"))
    values = [
        ("outcome", how_it_is(answer)),
        ("strategy", _shown(recorded, str, "strategy")),
        ("memory", _shown(recorded, human_bytes, "memory_bytes")),
        ("elapsed", _shown(recorded, lambda s: human_seconds(float(s)), "elapsed_s")),
        ("downtime", _positive(recorded, lambda s: human_us(s * 1e6), "downtime_s")),
        ("faults", _shown(recorded, str, "fault_latency_us", "count")),
        ("worst block", _shown(recorded, human_us, "fault_latency_us", "max")),
        ("average rate", _positive(recorded, rate, "throughput_bytes_per_s")),
    ]
    if not all(end.record.get("is_whole", True) for end in recorded.ends):
        note = "A daemon was restarted during this migration: what it had recorded before is lost."
        found.append(element("p", note, class_="unknown"))
    return [*found, tiles(values)]


def _shown(recorded: Recorded, unit: Any, *keys: str) -> str:
    value = recorded.figure(*keys)
    return "unknown" if value is None or value == "" else unit(value)


def _positive(recorded: Recorded, unit: Any, *keys: str) -> str:
    """Return a value that is 0 until there is one."""
    return _shown(recorded, unit, *keys) if recorded.figure(*keys) else "unknown"


# ---- the timeline ----
def _timeline(recorded: Recorded) -> list[ET.Element]:
    found = [element("h2", "Timeline")]
    panels = _panels(recorded)
    if not recorded.first.answer.get("phases") or not panels:
        found.append(unknown("the daemons do not have the record of this migration any more."))
    else:
        draw = functools.partial(plots.timeline, recorded, panels)
        text = _about_timeline(recorded, panels)
        found.append(figure(both(draw, text), _caption(recorded, panels)))
    rows: Rows = [
        (phase.name, f"{phase.begins:.3f} s", human_us((phase.ends - phase.begins) * 1e6))
        for phase in recorded.phases
    ]
    if rows:
        found.append(table(("phase", "begins", "takes"), rows, numbers=2))
    asked: Rows = [(f"{mark.at:.3f} s", _asked(mark)) for mark in recorded.marks]
    if asked:
        found.append(table(("at", "what an operator asked for"), asked))
    return found


def _caption(recorded: Recorded, panels: Sequence[Panel]) -> str:
    """Explain what is drawn."""
    sentences = [
        "The strip at the top has the phases: precopy is blue, the switchover red, postcopy "
        "orange, and the others are grey."
    ]
    if any(line.name == DIRTY_RATE for panel in panels for line in panel.lines):
        sentences.append("The dirty rate is that of each round of precopy.")
    if recorded.marks:
        sentences.append("A violet line is a request of an operator.")
    if recorded.pauses:
        sentences.append("Copying was paused where the background is grey.")
    return " ".join(sentences)


def _asked(mark: Mark) -> str:
    options = ", ".join(shown.option(*one) for one in mark.values.items())
    return f"{mark.asked}: {options}" if options else mark.asked


def _panels(recorded: Recorded) -> list[Panel]:
    source, destination = recorded.source, recorded.destination
    sent = recorded.rate(source, "bytes_sent") or recorded.rate(destination, "bytes_received")
    outstanding = recorded.values(destination, "outstanding") or recorded.values(
        source, "outstanding"
    )
    faults = recorded.rate(destination, "faults") or recorded.rate(source, "faults")
    rates = [
        _line(sent, "transfer rate", svg.BLUE, MIB),
        _line(recorded.values(source, "dirty_bytes_per_s"), DIRTY_RATE, svg.ORANGE, MIB, "--"),
    ]
    pages = [
        _line(
            recorded.values(source, "left_of_round"),
            "left of the round of precopy",
            svg.BLUE,
            MIB / PAGE,
        ),
        _line(outstanding, "outstanding after the handover", svg.RED, MIB / PAGE),
    ]
    panels = [
        Panel("Rates", "MiB/s", [one for one in rates if one]),
        Panel("Memory that has still to come", "MiB", [one for one in pages if one]),
    ]
    if faults is not None and faults.most:
        line = _line(faults, "fault rate", svg.RED, 1)
        panels.append(Panel("Fault rate", "faults/s", [line] if line else []))
    return [panel for panel in panels if panel.lines]


def _line(
    series: Series | None, name: str, colour: str, unit: float, style: str = "-"
) -> Line | None:
    if series is None:
        return None
    return Line(Series(series.edges, series.values / unit), name, colour, style)


def _about_timeline(recorded: Recorded, panels: Sequence[Panel]) -> str:
    phases = ", ".join(
        f"{one.name} for {human_us((one.ends - one.begins) * 1e6)}" for one in recorded.phases
    )
    most = ", ".join(
        f"{line.name} at most {line.series.most:.0f} {panel.unit}"
        for panel in panels
        for line in panel.lines
    )
    return f"Timeline of {human_seconds(recorded.seconds)}: {phases}. {most}."


# ---- the downtime ----
def _downtime(recorded: Recorded) -> list[ET.Element]:
    found = [element("h2", "Downtime")]
    of_ends = [
        (f"at the {WHERE[end.is_source]}", [(one["step"], one["s"]) for one in steps])
        for end in recorded.ends
        if (steps := end.record.get("steps"))
    ]
    if not of_ends:
        found.append(unknown("the record does not have the steps of the switchover."))
        return found
    downtime_s = recorded.figure("downtime_s")
    if downtime_s:
        about = (
            f"The downtime was {human_us(downtime_s * 1e6)}: from the request to suspend the guest "
            "to the report that it runs at the destination."
        )
        found.append(element("p", about))
    text = "; ".join(
        f"{title}: " + ", ".join(f"{step} {human_us(s * 1e6)}" for step, s in steps)
        for title, steps in of_ends
    )
    caption = (
        "Each step begins where the one above it ends. The two ends work at the same time, each by "
        "its own clock; the destination begins when it receives that the guest is suspended."
    )
    found.append(figure(both(functools.partial(plots.steps, of_ends), text), caption))
    return found


# ---- faults ----
def _faults(recorded: Recorded, guests_own: Buckets) -> list[ET.Element]:
    found = [element("h2", "Latency of faults, as the vCPU saw it")]
    latencies = recorded.latencies()
    if latencies is None:
        found.append(unknown(f"the destination has the latency of faults: {_other(recorded)}."))
        return found
    if not latencies:
        found.append(element("p", "No vCPU has waited for a page."))
        return found
    names = (("p50", "median"), ("p99", "99% below"), ("max", "longest"))
    marks = [
        (name, float(value))
        for key, name in names
        if (value := recorded.figure("fault_latency_us", key)) is not None
    ]
    count = sum(number for _low, _high, number in latencies)
    text = f"{counted(count, 'fault')}: " + ", ".join(
        f"{name} {human_us(us)}" for name, us in marks
    )
    caption = (
        f"{text}. Measured from the request of a vCPU in the paging ring to the answer; the axis "
        "of time is logarithmic."
    )
    draw = functools.partial(plots.histogram, latencies, marks, guests_own=_rebinned(guests_own))
    found.append(figure(both(draw, text), caption))
    return found


def _rebinned(buckets: Buckets) -> list[tuple[float, float, int]]:
    """Return a histogram with the buckets of a record: four for each power of two."""
    found: Counter[int] = Counter()
    for low, high, count in buckets:
        found[math.floor(4 * math.log2(max((low + high) / 2, 1.0)))] += count
    if not found:
        return []
    return [
        (2 ** (bucket / 4), 2 ** ((bucket + 1) / 4), found[bucket])
        for bucket in range(min(found), max(found) + 1)
    ]


def _waits(recorded: Recorded) -> list[ET.Element]:
    found = [element("h2", "Block time of each vCPU")]
    totals = recorded.figure("vcpu_block_s")
    blocked = recorded.blocked()
    if totals is None:
        found.append(unknown(f"the destination has it: {_other(recorded)}."))
        return found
    if not totals:
        found.append(element("p", "No vCPU has waited for a page."))
        return found
    if blocked:
        of_all = ", ".join(f"vCPU {vcpu} {human_us(s * 1e6)}" for vcpu, s in totals.items())
        text = f"The time for which each vCPU waited for pages: {of_all}"
        caption = "The share of time for which a vCPU waited for pages that were missing."
        if len(totals) > MOST_VCPUS:
            caption += f" These {MOST_VCPUS} of {len(totals)} vCPUs have waited longest."
        draw = functools.partial(plots.waits, blocked, recorded.seconds)
        found.append(figure(both(draw, text), caption))
    else:
        found.append(unknown(f"the times at which vCPUs waited: {_other(recorded)}."))
    rows: Rows = [(f"vCPU {vcpu}", human_us(s * 1e6)) for vcpu, s in totals.items()]
    found.append(table(("vCPU", "block time"), rows, numbers=1))
    return found


# ---- memory ----
def _memory(recorded: Recorded) -> list[ET.Element]:
    found = [element("h2", "How the guest's memory came")]
    origins = recorded.origins
    if origins is None:
        found.append(
            unknown(f"the destination has it after the end of a migration: {_other(recorded)}.")
        )
        return found
    counts = origins["pages"]
    all_pages = sum(counts.values()) - counts["nothing"]
    rows: Rows = [
        (name, str(counts[key]), human_bytes(counts[key] * PAGE),
         f"{100 * counts[key] / max(all_pages, 1):.2f}%" if key != "nothing" else "")
        for key, (name, _colour) in plots.ORIGINS.items()
        if counts[key]
    ]  # fmt: skip
    text = "Map of the guest's memory: " + ", ".join(f"{row[0]} {row[3] or row[2]}" for row in rows)
    per_cell = origins["pages_per_cell"]
    caption = "Each dot is a page, at its address in the guest."
    if per_cell > 1:
        caption = f"Each dot is one page of {per_cell}, at its address in the guest."
    found.append(figure(both(functools.partial(plots.memory_map, origins), text), caption))
    found.append(table(("how", "pages", "memory", "share"), rows, numbers=3))
    return found


# ---- other strategies ----
def _strategies(recorded: Recorded) -> list[ET.Element]:
    found = [element("h2", "What the strategies would have cost")]
    measured = measured_of(recorded)
    if measured is None:
        why = "only a source that has done a whole round of precopy has measured what it takes."
        return [*found, unknown(why)]
    about = (
        f"Expected by the model of `xen-postcopy estimate`, without a bandwidth cap: the guest "
        f"dirtied {rate(measured.dirty_bytes_per_s)} in the longest round, and the destination "
        f"took {rate(measured.bytes_per_s)} in."
    )
    rows: Rows = []
    if downtime_s := recorded.figure("downtime_s"):
        took = _shown(recorded, lambda s: human_seconds(float(s)), "elapsed_s")
        strategy = _shown(recorded, str, "strategy")
        rows.append((f"{strategy}, as it was", took, human_us(downtime_s * 1e6), ""))
    rows += [
        (
            one.strategy.value,
            human_seconds(float(one.total_s)),
            human_us(one.downtime_s * 1e6),
            human_us(one.freeze_s * 1e6),
        )
        for one in strategies(measured)
    ]
    titles = ("strategy", "total", "downtime", "longest freeze")
    return [*found, element("p", about), table(titles, rows, numbers=3)]


# ---- all figures ----
def _figures(recorded: Recorded) -> list[ET.Element]:
    found = [element("h2", "All figures")]
    for end in recorded.ends:
        found.append(_of_end(end))
    return found


def _of_end(end: End) -> ET.Element:
    answer = {key: value for key, value in end.answer.items() if key != "record"}
    rows: Rows = []
    for line in shown.lines(answer, time.time()):
        name, value = line[: shown.WIDTH].strip(), line[shown.WIDTH :].strip()
        rows.append((name, value))
    return table(
        ("figure", "value"), rows,
        caption=f"At the {WHERE[end.is_source]}, as `xen-postcopy show` has them",
    )  # fmt: skip
