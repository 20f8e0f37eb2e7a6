# SPDX-License-Identifier: GPL-2.0-or-later
"""A sender that is played: guests, estimates and migrations for the planner of an evacuation."""

from __future__ import annotations

from typing import Any

from migrate.cli.evacuate.planner import Action, Begin, Guest, Measure, Planner, Step

GIB = 2**30
Json = dict[str, Any]


def here(domid: int, name: str = "", *, gib: float = 1, **more: Any) -> Json:
    size = round(gib * GIB)
    return {
        "name": name or f"guest{domid}", "domid": domid, "uuid": f"uuid{domid}",
        "target": f"uuid{domid}", "state": "running", "memory_bytes": size, "needed_bytes": size,
        "devices": [], "problem": "", "passes": False, **more,
    }  # fmt: skip


def line(domid: int, phase: str = "precopy", **more: Any) -> Json:
    return {
        "id": f"{domid:08}abcdef", "domain": f"guest{domid}", "domid": domid, "peer": "there:8013",
        "direction": "outgoing", "strategy": "hybrid", "phase": phase, "problem": "",
        "paused": False, "handed_over": False, "pages_done": 50, "pages_total": 100,
        "bytes_per_s": 100 * 2**20, "eta_s": 7.0, "elapsed_s": 3.0, **more,
    }  # fmt: skip


def estimate(recommended: str | None = "hybrid", problem: str = "") -> Json:
    names = ("precopy", "hybrid", "postcopy")
    figures = {"total_s": 8.5, "downtime_ms": 6.0, "freeze_ms": 120.0, "problem": problem}
    return {
        "measured": {"bytes_per_s": 10**9, "page_us": 90, "round_trip_us": 20},
        "strategies": dict.fromkeys(names, figures),
        "recommended": recommended, "reason": "it freezes the guest for 120 ms",
    }  # fmt: skip


class Played:
    """An evacuation, and a sender that does what the planner wants."""

    def __init__(
        self,
        guests: list[Json],
        free: dict[str, int] | None = None,
        lines: Any = (),
        **options: Any,
    ):
        defaults: dict[str, Any] = {"named": None, "parallel": 2}
        self.here, self.lines = guests, {one["domid"]: one for one in lines}
        self.now = 100.0
        self._kept: list[Measure] = []
        self.planner = Planner(
            free or {"there": 100 * GIB}, guests, list(lines), **{**defaults, **options}
        )

    def guest(self, domid: int) -> Guest:
        (found,) = [one for one in self.planner.guests if one.domid == domid]
        return found

    def steps(self) -> dict[int, Step]:
        return {one.domid: one.step for one in self.planner.guests}

    def next(self) -> list[Action]:
        return list(self.planner.next(self.now))

    def to_measure(self) -> list[Measure]:
        """Return what the planner wants measured, now or while other things were done."""
        self._kept += [action for action in self.next() if isinstance(action, Measure)]
        found, self._kept = self._kept, []
        return found

    def seen(self, *, guests: bool = True) -> None:
        self.planner.seen(self.here if guests else None, list(self.lines.values()))

    def measure(self, recommended: str | None = "hybrid", problem: str = "") -> list[Guest]:
        """Measure all that the planner wants measured, and return these guests."""
        found = [action.guest for action in self.to_measure()]
        for guest in found:
            self.planner.measured(guest, estimate(recommended, problem))
        return found

    def begin(self) -> list[tuple[Guest, int | None]]:
        """Begin what the planner wants, and return the guests with their shares."""
        actions = self.next()
        self._kept += [action for action in actions if isinstance(action, Measure)]
        found = [action.guest for action in actions if isinstance(action, Begin)]
        for guest in found:
            self.lines[guest.domid] = line(guest.domid, strategy=guest.strategy)
            self.planner.begun(guest, self.lines[guest.domid])
        return [(guest, guest.share) for guest in found]

    def end(self, domid: int, phase: str = "completed", problem: str = "") -> None:
        self.lines[domid] = line(domid, phase, problem=problem)
        if phase == "completed":
            self.here = [one for one in self.here if one["domid"] != domid]
        self.seen()

    def run(self) -> None:
        """Let everything go well until it is over."""
        for _turn in range(1000):
            self.measure()
            self.begin()
            for guest in self.planner.of(Step.MOVES):
                self.end(guest.domid)
            self.seen()
            if self.planner.is_over:
                return
        raise AssertionError(self.steps())


def over(played: Played) -> bool:
    return played.planner.is_over


def named(guests: list[Guest]) -> list[int]:
    return [guest.domid for guest in guests]
