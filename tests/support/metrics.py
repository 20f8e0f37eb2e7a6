# SPDX-License-Identifier: GPL-2.0-or-later
"""Scrapes of daemons, read as Prometheus reads them, and the lines that document the metrics."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from migrate.cli.world import World
from migrate.metrics.table import COUNTER, EACH, METRICS, OTHERS, PREFIX, Of
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
