# SPDX-License-Identifier: GPL-2.0-or-later
"""What both ends answer to ``record``, of a migration whose every part has something to show."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

from migrate.service.record import Record
from receiver.context import COLUMNS as DESTINATION
from receiver.origins import Origin
from receiver.statistics import PagerStatistics
from sender.context import COLUMNS as SOURCE

START = 1_800_000_000.0
NAME = "<b>web</b>&\"'"
MIB = 2**20
LONG, HANDOVER, END = 120, 80, 119
"""Samples, one each tenth of a second."""


def _phases() -> list[dict[str, Any]]:
    began = (("connecting", 0), ("preflight", 0.2), ("precopy", 0.5), ("switchover", 7.99),
             ("postcopy", 8.0), ("completing", 11.8), ("completed", 11.9))  # fmt: skip
    return [{"phase": phase, "at": START + at} for phase, at in began]


def _line(direction: str) -> dict[str, Any]:
    return {
        "id": "0123456789abcdef", "direction": direction, "domain": NAME, "domid": 3,
        "peer": "host2:8013", "phase": "completed", "outcome": "completed", "problem": "",
        "unknown": [], "started_at": START, "ended_at": START + 12, "elapsed_s": 12.0,
        "outstanding": 0, "phases": _phases(), "known": "nothing",
    }  # fmt: skip


def source() -> dict[str, Any]:
    record = Record(SOURCE)
    for n in range(LONG):
        in_rounds = 5 <= n < HANDOVER
        round_left = (HANDOVER - n) * 900 if in_rounds else None
        dirty = 30 * MIB * (1 + n // 40) if 20 <= n < HANDOVER else None
        later = n >= HANDOVER
        values = (
            n * 6 * MIB, round_left, dirty, (END - n) * 500 if later else None,
            (n - HANDOVER) * 30 if later else None,
        )  # fmt: skip
        record.samples.add(START + n / 10, values, {})
    record.begin_steps(10.0)
    at = 10.0
    for step in ("suspend the guest", "choose pages", "send pages", "announce missing pages",
                 "send vCPUs and devices", "wait until the destination is ready"):  # fmt: skip
        at += 0.0005
        record.end_step(step, at)
    record.end_step("start at the destination", at + 0.001, is_last=True)
    record.mark(START + 3.0, "pause")
    record.mark(START + 4.5, "set", {"bandwidth_bytes_per_s": 2**24, "timeout_s": None})
    record.mark(START + 6.0, "resume")
    details = {
        **statistics().summary(), "strategy": "hybrid", "memory_bytes": 512 * MIB, "total_s": 12.0,
        "downtime_s": 0.004, "precopy": {"rounds": 2, "pages": 160000},
        "switchover": {"pages": 256, "missing_pages": 20000},
        "expected": {"pages": 20000, "bytes_per_s": 60 * MIB, "fault_us": 250, "round_trip_us": 90,
                     "stop_and_copy_ms": 1302.1, "postcopy_ms": 120.3},
        "push": {"pages": 19000, "bytes": 70 * MIB}, "zero_pages": 1000, "rejoins": 0,
        "throughput_bytes_per_s": 50 * MIB,
    }  # fmt: skip
    return {**_line("outgoing"), "strategy": "hybrid", "details": details, "record": record.taken()}


def statistics() -> PagerStatistics:
    found = PagerStatistics()
    for number in range(1200):
        found.answered(number % 3, 0.0001 * (1 + number % 40))
    found.answered(1, 0.25)
    return found


def destination() -> dict[str, Any]:
    record, counted = Record(DESTINATION), statistics()
    for n in range(LONG):
        later = n >= HANDOVER
        values = (
            n * 6 * MIB, (END - n) * 500 if later else None, 1 if later else None,
            (n - HANDOVER) * 30 if later else None,
        )  # fmt: skip
        waits = {vcpu: max(n - HANDOVER, 0) * 0.02 * (vcpu + 1) for vcpu in range(3)}
        record.samples.add(START + n / 10, values, waits)
    record.begin_steps(5.0)
    record.end_step("receive pages and vCPUs", 5.002)
    record.end_step("restore vCPUs and devices", 5.0024)
    record.end_step("note that the guest is ready", 5.0026)
    record.end_step("wait for the handover", 5.003)
    record.end_step("start the guest", 5.0033, is_last=True)
    record.origins = origins()
    taken = {**record.taken(), "latency_us": counted.latencies()}
    return {**_line("incoming"), "details": counted.summary(), "record": taken}


def origins() -> dict[str, Any]:
    cells = np.random.default_rng(1).choice(
        [origin.value for origin in Origin], 2**16, p=[0.1, 0.4, 0.05, 0.3, 0.05, 0.05, 0.05, 0, 0]
    )
    counts = np.bincount(cells, minlength=len(Origin))
    return {
        "pages": {origin.name.lower(): int(counts[origin]) * 2 for origin in Origin},
        "pages_per_cell": 2, "cells": len(cells),
        "map": base64.b64encode(zlib.compress(cells.astype(np.uint8).tobytes())).decode(),
    }  # fmt: skip


def answers() -> list[dict[str, Any]]:
    return [source(), destination()]
