# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics as text, by the client library of Prometheus, and the answer to a scrape.  Sans-IO.

This module is imported only if metrics are switched on, because it imports the client library.
"""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import MetricsHandler
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from migrate import __version__, logs
from migrate.metrics.table import (
    COUNTER,
    EACH,
    OTHERS,
    OUTCOMES,
    PREFIX,
    SUM,
    Figures,
    Histogram,
    Json,
    Metric,
    Of,
    Snapshot,
    metrics_of,
    unit_of,
)
from migrate.outcomes import ENDED

MOST_MIGRATIONS = 100
"""The most migrations with series of their own: the newest."""
WITHOUT_SERIES = ("connecting", "preflight", *ENDED)
"""The phases of migrations without series of their own.  Before memory is copied nothing has been
measured, and a stranger could make many such migrations.
"""
STARTED = time.time()
PATHS = ("/", "/metrics")


class Exposition(Collector):
    """Makes the families of metrics of a snapshot."""

    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot
        begun = [one for one in snapshot.under_way if one["phase"] not in WITHOUT_SERIES]
        self._with_series = begun[-MOST_MIGRATIONS:]
        self._end = snapshot.totals.end

    def collect(self) -> Iterator[Family]:
        yield from self._of_daemon()
        snapshot = self._snapshot
        together = snapshot.totals.copy()
        for shown in snapshot.under_way:
            together.add_under_way(shown)
        for metric in metrics_of(self._end):
            if metric.of is not Of.ENDED:
                yield self._each(metric)
            if metric.of is not Of.EACH:
                family = _family(metric, "", ["end"])
                _add(family, metric, [self._end], together.figures.get(metric.name, {}))
                yield family

    def _each(self, metric: Metric) -> Family:
        family: Family = _family(metric, EACH, ["end", "migration", "domain"])
        for shown in self._with_series:
            _add(family, metric, self._labels(shown), metric.figures(shown))
        return family

    def _labels(self, shown: Json) -> list[str]:
        return [self._end, shown["id"], shown["domain"]]

    def _of_daemon(self) -> Iterator[Family]:
        snapshot, end = self._snapshot, self._end
        info = InfoMetricFamily(PREFIX + "daemon", OTHERS["daemon_info"].meaning, labels=["end"])
        info.add_metric([end], {"version": __version__})
        yield info
        started = _other(GaugeMetricFamily, "daemon_started_timestamp_seconds")
        started.add_metric([end], STARTED)
        yield started
        phases = _other(GaugeMetricFamily, "migrations", "phase")
        for phase, count in Counter(shown["phase"] for shown in snapshot.under_way).items():
            if phase not in ENDED:  # the migration has ended meanwhile
                phases.add_metric([end, phase], count)
        yield phases
        ended = _other(CounterMetricFamily, "ended_migrations", "outcome")
        for outcome in OUTCOMES:
            ended.add_metric([end, outcome], snapshot.totals.outcomes[outcome])
        yield ended
        logged = _other(CounterMetricFamily, "log_messages", "level")
        for level, count in logs.counted().items():
            logged.add_metric([end, level], count)
        yield logged
        about = InfoMetricFamily(
            PREFIX + "migration",
            OTHERS["migration_info"].meaning,
            labels=["end", "migration", "domain"],
        )
        for shown in self._with_series:
            facts = {key: str(shown.get(key) or "") for key in ("peer", "strategy", "phase")}
            about.add_metric(self._labels(shown), facts)
        yield about


def _other(family: Any, name: str, *labels: str) -> Any:
    meaning = OTHERS[name].meaning
    return family(PREFIX + name, meaning, labels=["end", *labels], unit=unit_of(name))


def _family(metric: Metric, scope: str, labels: list[str]) -> Any:
    name, unit = PREFIX + scope + metric.name, unit_of(metric.name)
    if isinstance(metric.figures, Histogram):
        return HistogramMetricFamily(name, metric.meaning, labels=labels, unit=unit)
    kind = CounterMetricFamily if metric.kind == COUNTER else GaugeMetricFamily
    label = [metric.label] if metric.label else []
    return kind(name, metric.meaning, labels=[*labels, *label], unit=unit)


def _add(family: Any, metric: Metric, labels: list[str], figures: Figures) -> None:
    """Add the samples of these figures.  Of a counter of all migrations a figure that is missing is
    0; of one migration it is not known.
    """
    if isinstance(metric.figures, Histogram):
        below, buckets = 0.0, []
        for bound in (*metric.figures.bounds, math.inf):
            below += figures.get(str(bound), 0)
            buckets.append(("+Inf" if bound == math.inf else str(bound), below))
        family.add_metric(labels, buckets, figures.get(SUM, 0.0))
        return
    of_all = len(labels) == 1
    for value in metric.figures.places:
        if value in figures or of_all:
            family.add_metric([*labels, *filter(None, [value])], figures.get(value, 0))


def _registry(snapshot: Snapshot) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Exposition(snapshot))
    return registry


def as_text(snapshot: Snapshot) -> bytes:
    """Return the metrics in the older format, which node_exporter reads from files."""
    return generate_latest(_registry(snapshot))


class _Arrived:
    """Stands for the connection of a request that has arrived.  Keeps the answer."""

    def __init__(self, request: bytes):
        self._request = request
        self.answer = b""

    def makefile(self, *_arguments: object) -> io.BytesIO:
        return io.BytesIO(self._request)

    def sendall(self, data: bytes) -> None:
        self.answer += data


class _Handler(MetricsHandler):
    server_version = f"xen-postcopy/{__version__}"
    sys_version = ""

    def do_GET(self) -> None:  # noqa: N802
        if urlparse(self.path).path in PATHS:
            super().do_GET()
        else:
            self.send_error(404, "the metrics are at /metrics")


def answer(request: bytes, snapshot: Snapshot) -> bytes:
    """Return the answer to an HTTP request, whose headers are complete: OpenMetrics, or the older
    format, as the client accepts.
    """
    connection = _Arrived(request)
    handler: Any = _Handler.factory(_registry(snapshot))
    handler(connection, ("", 0), None)
    return connection.answer
