# SPDX-License-Identifier: GPL-2.0-or-later
"""What is accepted of a daemon's answers to ``list`` and ``show``.  Sans-IO.

A history is a file, which may be damaged, or written by another release, and some figures come from
the other host.  What cannot be shown with the unit of its key is unknown.  What shows the answers
relies on what is checked here, and checks nothing again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from migrate.cli import shown
from migrate.outcomes import MOST_PHASES
from migrate.units import printable

Answer = dict[str, Any]
MOST = 2.0**63
"""The most that a figure can be."""
MOST_COUNT = 2**52
"""The most of what is added up."""
LATEST = 1e11
"""The last time, in seconds since 1970."""
MOST_ITEMS = 4096
"""The most items of a list or of a group."""
MOST_OF_TEXT, MOST_OF_NAME = 16 * 1024, 80
"""The most characters of a text, and of a word that is drawn."""
MICROSECONDS = (1e-3, 1e15)
"""The bounds of a latency on a logarithmic axis."""
TEXTS = ("id", "direction", "phase", "domain", "peer", "problem", "outcome")
NOT_IN_DETAILS = ("eta_s", "eta_least_s")
"""Keys that have a meaning beside the ``details``, and none in them."""
WHOLE = re.compile("0|[1-9][0-9]{0,18}")


def checked(key: str, value: Any) -> Any:
    """Return what is accepted of the value of a key; ``None`` if nothing is."""
    return CHECKS.get(key, _figure_of(key))(value)


def accepted(answer: Answer) -> Answer:
    """Return an answer in which what is not accepted has no value, and is unknown."""
    found = {key: checked(key, value) for key, value in answer.items()}
    wrong = [key for key, value in found.items() if value is None and answer[key] is not None]
    found |= {key: "" for key in wrong if key in TEXTS}
    return {**found, "unknown": [*(found.get("unknown") or ()), *wrong]}


# ---- values ----
def is_number(value: Any, least: float = 0, most: float = MOST) -> bool:
    """Whether this is a number between two others; NaN is none."""
    return type(value) in (int, float) and least <= value <= most


def count_of(value: Any) -> Any:
    return value if type(value) is int and 0 <= value <= MOST_COUNT else None


def time_of(value: Any) -> Any:
    return value if is_number(value, 0, LATEST) else None


def text_of(value: Any) -> Any:
    return printable(value[:MOST_OF_TEXT]) if isinstance(value, str) else None


def is_name(value: Any) -> bool:
    """Whether this is a word of ours, which can be drawn."""
    is_ours = isinstance(value, str) and value.isascii() and value.isprintable()
    return is_ours and 0 < len(value) <= MOST_OF_NAME


def is_whole(text: str) -> bool:
    """Whether this is a number as JSON has it for a key."""
    return WHOLE.fullmatch(text) is not None


def rows(value: Any, is_row: Callable[[Any], bool], most: int = MOST_ITEMS) -> Any:
    """Return a list of at most so many items, if all of them are accepted."""
    is_list = isinstance(value, list | tuple) and len(value) <= most
    return [*value] if is_list and all(map(is_row, value)) else None


def _texts(value: Any) -> Any:
    return rows(value, lambda one: isinstance(one, str))


# ---- what show has ----
def _figure_of(key: str) -> Callable[[Any], Any]:
    return lambda value: figure(key, value)


def figure(key: str, value: Any) -> Any:
    """Return the value of a key if it can be shown with the unit of the key."""
    has_unit = shown.named(key)[1] is not str
    match value:
        case dict():
            return _group(key, value) if key in GROUPS or not has_unit else None
        case _ if key in GROUPS:
            return None
        case bool():
            return None if has_unit else value
        case int() | float():
            return value if is_number(value, 0 if has_unit else -MOST) else None
        case str():
            return None if has_unit else text_of(value)
        case list():
            return None if has_unit else _texts(value)
        case _:
            return None


def _group(key: str, values: Answer) -> Any:
    """Return the accepted values of a group."""
    if len(values) > MOST_ITEMS:
        return None
    if key in GROUPS:
        return GROUPS[key](values)
    found = {name: figure(name, value) for name, value in values.items()}
    is_option = key == "options"
    return {
        name: value
        for name, value in found.items()
        if is_number(value) or (is_option and isinstance(value, bool | str))
    }


def _waits(values: Answer) -> Answer:
    return {vcpu: s for vcpu, s in values.items() if is_whole(vcpu) and is_number(s)}


def _latency(values: Answer) -> Answer:
    histogram = values.get("histogram")
    found = {
        name: value for name, value in values.items() if name != "histogram" and is_number(value)
    }
    if isinstance(histogram, dict) and len(histogram) <= MOST_ITEMS:
        found["histogram"] = {
            power: count
            for power, count in histogram.items()
            if is_whole(power)
            and 1 <= int(power) <= MICROSECONDS[1]
            and count_of(count) is not None
        }
    return found


def _expected(values: Answer) -> Any:
    """Return what the policy has compared last, if that is complete."""
    found = {name: value for name, value in values.items() if is_number(value)}
    return found if {"bytes_per_s", "fault_us", "round_trip_us"} <= found.keys() else None


GROUPS: dict[str, Callable[[Answer], Any]] = {
    "vcpu_block_s": _waits, "fault_latency_us": _latency, "expected": _expected,
}  # fmt: skip
"""Groups whose values are needed for more than to be shown."""


def _details(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    found = {
        key: figure(key, one)
        for key, one in value.items()
        if key not in NOT_IN_DETAILS and key not in CHECKS
    }
    return {key: one for key, one in found.items() if one is not None}


def _phases(value: Any) -> Any:
    return rows(value, _is_phase, MOST_PHASES)


def _is_phase(value: Any) -> bool:
    return isinstance(value, dict) and is_name(value.get("phase")) and is_time(value.get("at"))


def is_time(value: Any) -> bool:
    return time_of(value) is not None


CHECKS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(TEXTS, text_of),
    "unknown": _texts, "phases": _phases, "started_at": time_of, "ended_at": time_of,
    "pages_done": count_of, "pages_total": count_of, "details": _details,
}  # fmt: skip
"""What is accepted of a key that has a meaning of its own."""
