# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of ``show``: each figure once, with one name and its unit.  Sans-IO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from migrate.cli.figures import MIB, PAGE, Answer, done_percent, eta, how_it_is, rate, time_of_day
from migrate.outcomes import ENDED
from migrate.units import counted, human_bytes, human_seconds, human_us

NOT_YET = ("downtime_s",)
"""Keys whose value is 0 until there is one."""
WIDTH = 22
"""The columns of a name."""
ORDER = (
    "id", "domain", "direction", "peer", "domid", "uuid", "strategy", "options",
    "phase", "problem", "unprotected", "io_fails_in_s", "paused", "handed_over", "known", "phases",
    "started_at", "ended_at", "elapsed_s", "total_s", "eta_s", "quiet_s", "round",
    "bytes_per_s", "throughput_bytes_per_s", "dirty_bytes_per_s", "expected_freeze_ms",
    "memory_bytes", "bytes_sent", "lanes", "bytes_received", "outstanding", "waiting",
    "downtime_s", "precopy", "switchover", "expected", "push", "pull", "answered", "zero_pages",
    "dropped_pages", "populate_evicted", "rejoins",
    "faults_per_s", "fault_latency_us", "vcpu_block_s", "checkpoints", "checkpoint_age_s",
)  # fmt: skip
"""The order at either end.  Keys of another release follow."""
HIDDEN = ("unknown", "outcome", "event", "pages_done", "pages_total", "eta_least_s")
"""Keys whose values are shown with others."""
LATENCY_KEY = "fault_latency_us"
LATENCY = {"faults": "count", "latency_us": "p50", "longest_wait_us": "max"}
"""The keys of what an end has without the pager's counters, and what they are there."""


def _seconds(value: float) -> str:
    return human_seconds(float(value))


def _ms(value: float) -> str:
    return human_us(value * 1000)


def _pages(value: int) -> str:
    return f"{counted(value, 'page')} ({value * PAGE / MIB:.1f} MiB)" if value else "0 pages"


NAMES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "elapsed_s": ("elapsed", _seconds),
    "total_s": ("elapsed", _seconds),
    "bytes_per_s": ("rate", rate),
    "dirty_bytes_per_s": ("dirty rate", rate),
    "quiet_s": ("no background copying for", _seconds),
    "throughput_bytes_per_s": ("average rate", rate),
    "memory_bytes": ("memory", human_bytes),
    "bytes_sent": ("sent", human_bytes),
    "bytes_received": ("received", human_bytes),
    "downtime_s": ("downtime", lambda value: human_us(value * 1e6)),
    "outstanding": ("outstanding", _pages),
    "zero_pages": ("zero pages", _pages),
    "dropped_pages": ("dropped", _pages),
    "waiting": ("vCPUs wait for", lambda value: counted(value, "page")),
    "faults_per_s": ("fault rate", lambda value: f"{value:.1f} faults/s"),
    "checkpoint_age_s": ("last checkpoint", lambda value: f"{_seconds(value)} ago"),
    "io_fails_in_s": ("I/O fails in", _seconds),
    "populate_evicted": ("eviction", str),
    "known": ("known of the other end", str),
}
"""The names and the units of keys for which the rules of :func:`named` do not suffice."""
OF_A_GROUP = {"count": "faults", "p50": "median", "p99": "99% below", "max": "longest"}
"""The names of values within a group."""
SUFFIXES: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("_bytes_per_s", rate),
    ("_bytes", human_bytes),
    ("_us", human_us),
    ("_ms", _ms),
    ("_s", _seconds),
)
"""The unit of a value, by the end of its key."""


def lines(answer: Answer, now: float) -> Iterator[str]:
    """Yield the lines about one migration.  ``answer``: of ``show``; ``now``: seconds since
    1970.
    """
    for name, text in _figures(answer, now):
        if text:
            yield f"{name:{WIDTH}} {text}"


def _figures(answer: Answer, now: float) -> Iterator[tuple[str, str]]:
    details = answer["details"]
    rest = {key: value for key, value in answer.items() if key != "details"}
    # For a key that both have, the details are final at the end; before, the progress is newer.
    both = {**rest, **details} if answer["phase"] in ENDED else {**details, **rest}
    unknown = {LATENCY_KEY if key in LATENCY else key for key in answer.get("unknown", ())}
    both[LATENCY_KEY] = _latency(both)
    if type(both.get("checkpoints")) is int:  # the source has their number
        both["checkpoints"] = {"kept": both["checkpoints"]}
    has_elapsed = both.get("elapsed_s") is not None
    places = {key: place for place, key in enumerate(ORDER)}
    for key in sorted(both, key=lambda key: places.get(key, len(places))):
        if key in HIDDEN or key in LATENCY or (key == "total_s" and has_elapsed):
            continue
        if key in NOT_YET and not both[key] and key not in unknown:
            continue
        name, unit = named(key)
        if key in unknown:
            yield name, "-"
        elif key == "phase":
            yield name, how_it_is(answer)
            yield "done", _done(answer)
        elif key in ("started_at", "ended_at"):
            name = key.removesuffix("_at")
            yield name, "" if both[key] is None else time_of_day(both[key], now)
        elif key == "eta_s":
            yield "ETA", "" if answer["phase"] in ENDED else eta(answer)
        elif key == "phases":
            began = (f"{one['phase']} {time_of_day(one['at'], now)}" for one in both[key])
            yield name, ", ".join(began)
        elif isinstance(both[key], dict):
            yield name, _group(key, both[key])
        else:
            yield name, _value(both[key], unit)


def _latency(both: Answer) -> Answer | None:
    """Return the latency of faults in the form of the pager's counters; ``None`` if the end has
    no count of faults.
    """
    found: Answer | None = both.get(LATENCY_KEY)
    known = {of: both[key] for key, of in LATENCY.items() if both.get(key) is not None}
    if found is None:
        return {of: value for of, value in known.items() if value} if known else None
    # A vCPU may be waiting for longer than any wait has lasted that has ended.
    return {**found, "max": max(found.get("max", 0), known.get("max", 0))}


def named(key: str) -> tuple[str, Callable[[Any], str]]:
    """Return the name and the unit of a value."""
    if key in NAMES:
        return NAMES[key]
    for end, unit in SUFFIXES:
        if key.endswith(end):
            return key.removesuffix(end).replace("_", " "), unit
    return key.replace("_", " "), str


def _value(value: Any, unit: Callable[[Any], str]) -> str:
    """Return a value of JSON as people read it; empty if there is nothing to show."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return unit(value)
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)


def _done(answer: Answer) -> str:
    percent = done_percent(answer)
    if percent is None or answer["phase"] == "completed":
        return ""
    done, total = (answer[key] * PAGE / MIB for key in ("pages_done", "pages_total"))
    return f"{min(done, total):.0f} of {total:.0f} MiB ({percent}%)"


def option(key: str, value: Any) -> str:
    """Return an option of a migration with its value; that of a cap or a limit may be none."""
    name, unit = named(key)
    is_none = value is None or (value == 0 and key.endswith("_bytes_per_s"))
    return f"{name} {'none' if is_none else unit(value)}"


def _group(key: str, values: Answer) -> str:
    """Return the values that belong together."""
    if not any(values.values()):
        return "none"
    if key == "options":
        return ", ".join(option(*one) for one in values.items() if one[1] is not None)
    if key == "vcpu_block_s":
        return ", ".join(f"vCPU {vcpu} {human_us(s * 1e6)}" for vcpu, s in values.items())
    of_all = human_us if key.endswith("_us") else None
    parts = []
    for inner, value in values.items():
        name, unit = named(inner)
        name = OF_A_GROUP.get(inner, name)
        if isinstance(value, dict):
            continue
        if inner == "bytes_per_s":
            parts.append(rate(value))
        elif inner == "bytes":
            parts.append(human_bytes(value))
        elif unit is not str:
            parts.append(f"{name} {unit(value)}")
        elif of_all is not None and inner != "count":
            parts.append(f"{name} {of_all(value)}")
        else:
            parts.append(f"{value} {name.removesuffix('s') if value == 1 else name}")
    return ", ".join(parts)
