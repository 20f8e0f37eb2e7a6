# SPDX-License-Identifier: GPL-2.0-or-later
"""Scrapes of daemons, read as Prometheus reads them, and the lines that document the metrics; a
daemon without migrations of its own.
"""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import trio
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from migrate.cli.world import World
from migrate.metrics.serve import Metrics
from migrate.metrics.table import COUNTER, EACH, METRICS, OTHERS, PREFIX, Of
from migrate.service.config import MetricsConfig
from migrate.service.history import History
from receiver.statistics import PagerStatistics
from sender.statistics import SenderStatistics
from tests.support.waiting import WAIT_S

OPENMETRICS = "application/openmetrics-text"
Samples = dict[str, list[tuple[dict[str, str], float]]]


def families(text: str) -> list[Family]:
    """Return the families of an answer in OpenMetrics.  The parser refuses what the standard does
    not allow.
    """
    parse: Callable[[str], Iterable[Family]] = text_string_to_metric_families
    return list(parse(text))


def samples(text: str) -> Samples:
    """Return the labels and values of samples, by their name."""
    found: Samples = {}
    for family in families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    """Return the one value of a metric with these labels."""
    (one,) = [value for having, value in found[PREFIX + name] if having == {**having, **labels}]
    return one


def endpoint(world: World, which: str) -> str:
    """Return the address at which a daemon answers scrapes; the last process, if several had it."""
    log = world.processes[which].log.read_text()
    return str(re.findall(r"metrics at (http://\S+)", log)[-1])


def scrape(url: str, accept: str = OPENMETRICS) -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        assert answer.headers["Content-Type"].startswith(accept)
        return str(answer.read(), "utf-8")


def exchange(path: Path, request: bytes) -> bytes:
    """Return the answer to a request at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT_S)
        client.connect(str(path))
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def documented() -> Iterator[str]:
    """Yield the lines of the tables in docs/metrics.md."""

    def line(name: str, kind: str, labels: tuple[str, ...], end: str, meaning: str) -> str:
        shown = f"`{PREFIX}{name}{'_total' if kind == COUNTER else ''}`"
        of = ", ".join(f"`{label}`" for label in labels)
        return f"| {shown} | {kind} | {of} | {end or 'both'} | {meaning} |"

    for name, other in OTHERS.items():
        if not name.startswith(EACH):
            yield line(name, other.kind, other.labels, "", other.meaning)
    for scope, left_out in (("", Of.EACH), (EACH, Of.ENDED)):
        for name, other in OTHERS.items():
            if scope and name.startswith(scope):
                yield line(name, other.kind, other.labels, "", other.meaning)
        for metric in METRICS:
            if metric.of is not left_out:
                labels = (metric.label,) if metric.label else ()
                yield line(scope + metric.name, metric.kind, labels, metric.end, metric.meaning)


# ---- a daemon in this process ----
def shown(end: str, number: int = 1, **others: Any) -> dict[str, Any]:
    """Return what ``show`` answers of a migration in postcopy."""
    details = SenderStatistics("hybrid", 2**24, 1.0, 2.0, 2.5, push_pages=7, ahead_pages=1)
    details.pull_pages = 3
    pager = PagerStatistics(pulled_pages=3, requests=2)
    for seconds in (1e-6, 0.001, 0.002, 60.0):
        pager.answered(0, seconds)
    return {
        "id": f"{number:032d}", "domain": "web", "peer": "host2:8013", "phase": "postcopy",
        "strategy": "hybrid", "outcome": "failed", "problem": "", "outstanding": 9, "waiting": 1,
        "round": 2, "started_at": 1.5, "checkpoint_age_s": 0.5, "unknown": [],
        "dirty_bytes_per_s": 4096.0, "expected_freeze_ms": 20.0,
        "details": details.summary(5000, 300) if end == "sender" else pager.summary(), **others,
    }  # fmt: skip


class Daemon:
    """A daemon with migrations as a test sets them."""

    def __init__(self, directory: Path):
        self.history = History(directory / "history.jsonl")
        self.started = trio.Event()
        self.started.set()
        self.migrations: list[dict[str, Any]] = []

    def snapshots(self) -> Iterator[dict[str, Any]]:
        return iter(list(self.migrations))


async def served(
    nursery: trio.Nursery, daemon: Daemon, config: MetricsConfig, end: str = "sender"
) -> int:
    """Start to serve metrics, and return the port."""
    listeners = await nursery.start(Metrics(end, config, daemon).serve)
    port: int = listeners[0].socket.getsockname()[1] if listeners else 0
    return port
