# SPDX-License-Identifier: GPL-2.0-or-later
"""The progress of a migration: a live line on a terminal, a line per event elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, TextIO

from migrate.units import counted, human_bytes, printable

PLAIN_EVERY_S = 5.0
RATE_S = 3.0
SHOWN = ("precopy", "switchover", "deciding", "postcopy", "interrupted", "in doubt")
"""The phases that are shown.  The others are short, or end in a message of their own."""


class Rate:
    """The rate at which a number of bytes has grown in the last :data:`RATE_S`.

    With a cap the sender sends in bursts, so between two answers it may have sent nothing.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int) -> None:
        self._samples.append((now, count))
        while self._samples[0][0] < now - RATE_S and len(self._samples) > 2:
            self._samples.popleft()

    @property
    def bytes_per_s(self) -> float:
        (then, before), (now, count) = self._samples[0], self._samples[-1]
        return max(0.0, (count - before) / (now - then)) if now > then else 0.0


class ProgressDisplay:
    """Shows the progress.  The caller passes each ``progress`` answer of the daemon to it; the
    answers of a receiver have fewer keys.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._live = stream.isatty()
        self._bar: Any = None
        self._stage: tuple[str, int, bool] | None = None
        self._last_line = 0.0
        self._rate = Rate()

    def show(self, p: dict[str, Any]) -> None:
        self._rate.add(time.monotonic(), p.get("bytes_sent", 0))
        stage = (p["phase"], p.get("round", 0), bool(p["problem"]))
        if p["phase"] not in SHOWN:
            return
        is_new = stage != self._stage
        self._stage = stage
        if self._live:
            if is_new:
                self.close()
            if is_new and p["problem"]:  # the live line is cut off at the edge of the terminal
                self._print(p)
            self._show_bar(p)
        elif is_new or time.monotonic() - self._last_line > PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self._print(p)

    def _print(self, p: dict[str, Any]) -> None:
        line = ": ".join(filter(None, (self._title(p), self._details(p))))
        print(printable(line), file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_bar(self, p: dict[str, Any]) -> None:
        from tqdm import tqdm

        total = p.get("pages_total") or None
        if self._bar is None:
            bar = " {bar:20} {percentage:3.0f}%" if total else ""
            self._bar = tqdm(
                desc=printable(self._title(p)), total=total, file=self._stream,
                leave=False, unit=" pages", dynamic_ncols=True,
                bar_format=f"{{desc}}{bar}{{postfix}}",
            )  # fmt: skip
        self._bar.total = total
        self._bar.n = min(p["pages_done"], total) if total else 0
        self._bar.set_description_str(printable(self._title(p)), refresh=False)
        self._bar.set_postfix_str(printable(self._details(p)), refresh=True)

    @staticmethod
    def _title(p: dict[str, Any]) -> str:
        in_rounds = p["phase"] == "precopy" and "round" in p
        return f"{p['domain']}: {p['phase']}" + (f", round {p['round']}" if in_rounds else "")

    def _details(self, p: dict[str, Any]) -> str:
        if p["problem"]:
            return str(p["problem"])
        parts = []
        if "bytes_sent" in p:
            parts.append(f"{human_bytes(self._rate.bytes_per_s)}/s")
        if p["phase"] == "precopy" and "pages_total" in p:
            parts.append(f"{p['pages_done']} of {p['pages_total']} pages")
        if p.get("handed_over", p["phase"] not in ("precopy", "switchover")):
            parts.append(counted(p["outstanding"], "page") + " outstanding")
            if p.get("checkpoint_age_s") is not None:
                parts.append(f"protected as of {p['checkpoint_age_s']:.1f} s ago")
            if p.get("unprotected"):
                parts.append("not protected any more")
            if "faults" in p:
                latency = f" at {p['latency_us']} us" if p["faults"] else ""
                parts.append(counted(p["faults"], "fault") + latency)
        return ", ".join(parts)
