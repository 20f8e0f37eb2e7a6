# SPDX-License-Identifier: GPL-2.0-or-later
"""What each strategy would have cost, by what a migration has measured of its guest and its link.
Sans-IO.

The model is that of ``estimate`` (``sender/estimate.py``).  The rate and the time of a page are
those that the policy has compared last, and what the guest has dirtied is that of each round.  A
migration without a round of precopy has measured none of this.
"""

from __future__ import annotations

import numpy as np

from migrate.cli.report.series import End, Recorded
from migrate.options import MigrationOptions, Strategy
from sender.estimate import Expected, Measured, expect
from xenbackend.pages import PAGE_SIZE

LEAST_ROUND_S = 0.05


def measured_of(recorded: Recorded) -> Measured | None:
    """Return what a migration has measured; ``None`` if that is unknown."""
    source = recorded.source
    if source is None:
        return None
    seen = source.figure("expected") or {}
    memory_pages = int((source.figure("memory_bytes") or 0) // PAGE_SIZE)
    dirtied = _dirtied(recorded, source, memory_pages)
    if not seen.get("bytes_per_s") or not memory_pages or not dirtied:
        return None
    sent = sum(
        source.figure(*keys) or 0
        for keys in (("precopy", "pages"), ("switchover", "pages"), ("push", "pages"))
    )
    zeros = source.figure("zero_pages") or 0
    return Measured(
        memory_pages,
        max(1 - zeros / sent, 0.0) if sent else 1.0,
        dirtied,
        seen["bytes_per_s"],
        seen["fault_us"] / 1e6,
        seen["round_trip_us"] / 1e6,
    )


def _dirtied(recorded: Recorded, source: End, most: int) -> list[tuple[float, int]]:
    """Return how many pages the guest dirtied in rounds of some lengths in seconds, ascending.  A
    round has ended when the dirty rate changes.
    """
    dirty, at = source.column("dirty_bytes_per_s"), recorded.time_of(source)
    begins = [phase.begins for phase in recorded.phases if phase.name == "precopy"]
    found, before = dict[float, int](), np.nan
    for rate, now in zip(dirty.tolist(), at.tolist(), strict=True):
        if np.isnan(rate) or rate == before or not begins:
            continue
        round_s = max(now - begins[-1], LEAST_ROUND_S)
        found[round_s] = min(round(rate * round_s / PAGE_SIZE), most)
        begins.append(now)
        before = rate
    times = sorted(found)
    pages = np.maximum.accumulate([found[s] for s in times]).tolist() if times else []
    return list(zip(times, pages, strict=True))


def strategies(measured: Measured) -> list[Expected]:
    """Return what each strategy is expected to take without a bandwidth cap."""
    return [expect(measured, MigrationOptions(strategy)) for strategy in Strategy]
