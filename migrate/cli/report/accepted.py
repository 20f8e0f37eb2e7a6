# SPDX-License-Identifier: GPL-2.0-or-later
"""What is accepted of a daemon's answer to ``record``.  Sans-IO.

Records and histories are files, which may be damaged, or written by another release, and some
figures come from the other host.  What is not as this release writes it is left out, so that the
report has it as unknown.  The other modules of this folder rely on what is checked here, and check
nothing again.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Callable
from typing import Any

from migrate.cli import shown
from migrate.errors import MigrationError
from migrate.service.progress import MOST_PHASES
from migrate.service.record import FORMAT, MOST_MARKS, MOST_STEPS
from migrate.units import printable, shortened
from receiver.origins import MOST_CELLS, Origin

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
NEEDED = ("id", "direction", "phase")
TEXTS = (*NEEDED, "domain", "peer", "problem", "outcome")
NOT_IN_DETAILS = ("eta_s", "eta_least_s")
"""Keys that have a meaning beside the ``details``, and none in them."""
WHOLE = re.compile("0|[1-9][0-9]{0,18}")


def accepted(answer: Answer) -> Answer:
    """Return what is accepted of an answer.  All keys that a report needs are there.

    Raises :class:`MigrationError` if the answer does not state which end of which migration it is
    about, or where the migration is.
    """
    found: Answer = {}
    for key, value in answer.items():
        if (checked := CHECKS.get(key, _figure_of(key))(value)) is not None:
            found[key] = checked
    for key in NEEDED:
        if not found.get(key) or (key == "direction" and found[key] not in DIRECTIONS):
            why = shortened(answer.get(key))
            raise MigrationError(f"the answer of a daemon is damaged: its key {key} has {why}")
    missing: Answer = {
        **dict.fromkeys(("domain", "peer", "problem"), ""), "unknown": [], "phases": [],
        "started_at": None, "ended_at": None, "details": {}, "record": None,
    }  # fmt: skip
    return found | {key: value for key, value in missing.items() if key not in found}


DIRECTIONS = ("outgoing", "incoming")


# ---- values ----
def _is_number(value: Any, least: float = 0, most: float = MOST) -> bool:
    """Whether this is a number between two others; NaN is none."""
    return type(value) in (int, float) and least <= value <= most


def _count(value: Any) -> Any:
    return value if type(value) is int and 0 <= value <= MOST_COUNT else None


def _time(value: Any) -> Any:
    return value if _is_number(value, 0, LATEST) else None


def _text(value: Any) -> Any:
    return printable(value[:MOST_OF_TEXT]) if isinstance(value, str) else None


def _is_name(value: Any) -> bool:
    """Whether this is a word of ours, which can be drawn."""
    is_ours = isinstance(value, str) and value.isascii() and value.isprintable()
    return is_ours and 0 < len(value) <= MOST_OF_NAME


def _is_whole(text: str) -> bool:
    """Whether this is a number as JSON has it for a key."""
    return WHOLE.fullmatch(text) is not None


def _rows(value: Any, is_row: Callable[[Any], bool], most: int = MOST_ITEMS) -> Any:
    """Return a list of at most so many items, if all of them are accepted."""
    is_list = isinstance(value, list | tuple) and len(value) <= most
    return [*value] if is_list and all(map(is_row, value)) else None


# ---- what show has ----
def _figure_of(key: str) -> Callable[[Any], Any]:
    return lambda value: _figure(key, value)


def _figure(key: str, value: Any) -> Any:
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
            return value if _is_number(value, 0 if has_unit else -MOST) else None
        case str():
            return None if has_unit else _text(value)
        case list():
            return None if has_unit else _rows(value, lambda one: isinstance(one, str))
        case _:
            return None


def _group(key: str, values: Answer) -> Any:
    """Return the accepted values of a group."""
    if len(values) > MOST_ITEMS:
        return None
    if key in GROUPS:
        return GROUPS[key](values)
    found = {name: _figure(name, value) for name, value in values.items()}
    is_option = key == "options"
    return {
        name: value
        for name, value in found.items()
        if _is_number(value) or (is_option and isinstance(value, bool | str))
    }


def _waits(values: Answer) -> Answer:
    return {vcpu: s for vcpu, s in values.items() if _is_whole(vcpu) and _is_number(s)}


def _latency(values: Answer) -> Answer:
    histogram = values.get("histogram")
    found = {
        name: value for name, value in values.items() if name != "histogram" and _is_number(value)
    }
    if isinstance(histogram, dict) and len(histogram) <= MOST_ITEMS:
        found["histogram"] = {
            power: count
            for power, count in histogram.items()
            if _is_whole(power) and 1 <= int(power) <= MICROSECONDS[1] and _count(count) is not None
        }
    return found


def _expected(values: Answer) -> Any:
    """Return what the policy has compared last, if that is complete."""
    found = {name: value for name, value in values.items() if _is_number(value)}
    return found if {"bytes_per_s", "fault_us", "round_trip_us"} <= found.keys() else None


GROUPS: dict[str, Callable[[Answer], Any]] = {
    "vcpu_block_s": _waits, "fault_latency_us": _latency, "expected": _expected,
}  # fmt: skip
"""Groups whose values are needed for more than to be shown."""


def _details(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    found = {
        key: _figure(key, one)
        for key, one in value.items()
        if key not in NOT_IN_DETAILS and key not in CHECKS
    }
    return {key: one for key, one in found.items() if one is not None}


def _phases(value: Any) -> Any:
    return _rows(value, _is_phase, MOST_PHASES)


def _is_phase(value: Any) -> bool:
    return isinstance(value, dict) and _is_name(value.get("phase")) and _is_time(value.get("at"))


def _unknown(value: Any) -> Any:
    return _rows(value, lambda one: isinstance(one, str))


# ---- what was recorded over time ----
def _record(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    return {
        "format": FORMAT,
        "is_whole": value.get("is_whole") is not False,
        "samples": _samples(value.get("samples")),
        "steps": _rows(value.get("steps"), _is_step, MOST_STEPS),
        "marks": _rows(value.get("marks"), _is_mark, MOST_MARKS),
        "origins": _origins(value.get("origins")),
        "latency_us": _rows(value.get("latency_us"), _is_bucket),
    }


def _samples(value: Any) -> Answer:
    """Return the columns that have a value for each time."""
    at = _rows(value.get("at"), _is_time) if isinstance(value, dict) else None
    if at is None:
        return {}

    def fits(values: Any, is_one: Callable[[Any], bool]) -> bool:
        return isinstance(values, list) and len(values) == len(at) and all(map(is_one, values))

    waits = value.get("vcpu_block_s")
    columns = {name: of for name, of in value.items() if fits(of, _is_sample)}
    of_vcpus = {
        vcpu: of
        for vcpu, of in (waits.items() if isinstance(waits, dict) else ())
        if _is_whole(vcpu) and at and fits(of, _is_number)
    }
    return {**columns, "at": at, "vcpu_block_s": of_vcpus}


def _is_time(value: Any) -> bool:
    return _time(value) is not None


def _is_sample(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_step(value: Any) -> bool:
    return isinstance(value, dict) and _is_name(value.get("step")) and _is_time(value.get("s"))


def _is_mark(value: Any) -> bool:
    """Whether this is what an operator asked for, with the options that were changed."""
    if not isinstance(value, dict) or not isinstance(value.get("values"), dict):
        return False
    options = value["values"].items()
    return (
        _is_name(value.get("asked"))
        and _is_time(value.get("at"))
        and all(
            _is_name(key) and (of is None or _figure(key, of) is not None) for key, of in options
        )
    )


def _is_bucket(value: Any) -> bool:
    """Whether this is the lower and the upper limit of a bucket, and the number of faults in it."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    low, high, count = value
    is_limit = all(_is_number(one, *MICROSECONDS) for one in (low, high))
    return is_limit and low < high and _count(count) is not None


def _origins(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    pages, per_cell, cells = value.get("pages"), value.get("pages_per_cell"), value.get("map")
    names = [origin.name.lower() for origin in Origin]
    if not isinstance(pages, dict) or list(pages) != names or not isinstance(cells, str):
        return None
    if any(_count(count) is None for count in pages.values()) or not _count(per_cell):
        return None
    try:
        data = base64.b64decode(cells, validate=True)
        decompressor = zlib.decompressobj()
        of_each = decompressor.decompress(data, MOST_CELLS)
    except (ValueError, zlib.error):
        return None
    is_whole = decompressor.eof and max(of_each, default=0) < len(names)
    return value if is_whole else None


CHECKS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(TEXTS, _text),
    "unknown": _unknown, "phases": _phases, "started_at": _time, "ended_at": _time,
    "pages_done": _count, "pages_total": _count, "details": _details, "record": _record,
}  # fmt: skip
"""What is accepted of a key that has a meaning of its own."""
