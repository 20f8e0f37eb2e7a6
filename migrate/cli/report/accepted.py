# SPDX-License-Identifier: GPL-2.0-or-later
"""What is accepted of a daemon's answer to ``record``.  Sans-IO.

Records and histories are files, which may be damaged, or written by another release, and some
figures come from the other host.  What is not as this release writes it is left out, so that the
report has it as unknown.  The other modules of this folder rely on what is checked here, and check
nothing again.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from typing import Any

from migrate.cli.accepted import (
    MICROSECONDS,
    Answer,
    checked,
    count_of,
    figure,
    is_name,
    is_number,
    is_time,
    is_whole,
    rows,
)
from migrate.errors import MigrationError
from migrate.service.record import FORMAT, MOST_MARKS, MOST_STEPS
from migrate.units import shortened
from receiver.origins import MOST_CELLS, Origin

NEEDED = ("id", "direction", "phase")


def accepted(answer: Answer) -> Answer:
    """Return what is accepted of an answer.  All keys that a report needs are there.

    Raises :class:`MigrationError` if the answer does not state which end of which migration it is
    about, or where the migration is.
    """
    found: Answer = {}
    for key, value in answer.items():
        one = _record(value) if key == "record" else checked(key, value)
        if one is not None:
            found[key] = one
    for key in NEEDED:
        if not found.get(key) or (key == "direction" and found[key] not in DIRECTIONS):
            given = shortened(repr(answer[key])) if key in answer else "no value"
            raise MigrationError(f"the answer of a daemon is damaged: its key {key} has {given}")
    missing: Answer = {
        **dict.fromkeys(("domain", "peer", "problem"), ""), "unknown": [], "phases": [],
        "started_at": None, "ended_at": None, "details": {}, "record": None,
    }  # fmt: skip
    return found | {key: value for key, value in missing.items() if key not in found}


DIRECTIONS = ("outgoing", "incoming")


# ---- what was recorded over time ----
def _record(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    return {
        "format": FORMAT,
        "is_whole": value.get("is_whole") is not False,
        "samples": _samples(value.get("samples")),
        "steps": rows(value.get("steps"), _is_step, MOST_STEPS),
        "marks": rows(value.get("marks"), _is_mark, MOST_MARKS),
        "origins": _origins(value.get("origins")),
        "latency_us": rows(value.get("latency_us"), _is_bucket),
    }


def _samples(value: Any) -> Answer:
    """Return the columns that have a value for each time."""
    at = rows(value.get("at"), is_time) if isinstance(value, dict) else None
    if at is None:
        return {}

    def fits(values: Any, is_one: Callable[[Any], bool]) -> bool:
        return isinstance(values, list) and len(values) == len(at) and all(map(is_one, values))

    waits = value.get("vcpu_block_s")
    columns = {name: of for name, of in value.items() if fits(of, _is_sample)}
    of_vcpus = {
        vcpu: of
        for vcpu, of in (waits.items() if isinstance(waits, dict) else ())
        if is_whole(vcpu) and at and fits(of, is_number)
    }
    return {**columns, "at": at, "vcpu_block_s": of_vcpus}


def _is_sample(value: Any) -> bool:
    return value is None or is_number(value)


def _is_step(value: Any) -> bool:
    return isinstance(value, dict) and is_name(value.get("step")) and is_time(value.get("s"))


def _is_mark(value: Any) -> bool:
    """Whether this is what an operator asked for, with the options that were changed."""
    if not isinstance(value, dict) or not isinstance(value.get("values"), dict):
        return False
    options = value["values"].items()
    return (
        is_name(value.get("asked"))
        and is_time(value.get("at"))
        and all(is_name(key) and (of is None or figure(key, of) is not None) for key, of in options)
    )


def _is_bucket(value: Any) -> bool:
    """Whether this is the lower and the upper limit of a bucket, and the number of faults in it."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    low, high, count = value
    is_limit = all(is_number(one, *MICROSECONDS) for one in (low, high))
    return is_limit and low < high and count_of(count) is not None


def _origins(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    pages, per_cell, cells = value.get("pages"), value.get("pages_per_cell"), value.get("map")
    names = [origin.name.lower() for origin in Origin]
    if not isinstance(pages, dict) or list(pages) != names or not isinstance(cells, str):
        return None
    if any(count_of(count) is None for count in pages.values()) or not count_of(per_cell):
        return None
    try:
        data = base64.b64decode(cells, validate=True)
        decompressor = zlib.decompressobj()
        of_each = decompressor.decompress(data, MOST_CELLS)
    except (ValueError, zlib.error):
        return None
    is_whole = decompressor.eof and max(of_each, default=0) < len(names)
    return value if is_whole else None
