# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics: what is counted, what the text of a scrape may have, and who may hold a daemon up."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from migrate.metrics import exposition, serve
from migrate.metrics.exposition import MOST_MIGRATIONS, answer, as_text
from migrate.metrics.serve import MOST_SCRAPES, Metrics
from migrate.metrics.table import METRICS, OUTCOMES, PREFIX, Of, Snapshot, Totals, metrics_of
from migrate.service.config import ConfigError, MetricsConfig
from tests.support.metrics import (
    Daemon,
    Samples,
    documented,
    families,
    samples,
    served,
    shown,
    value,
)
from tests.support.waiting import WAIT_S

TREE = Path(__file__).parents[2]
DASHBOARD = TREE / "systemd/grafana-dashboard.json"
BOTH = ("sender", "receiver")
REQUEST = b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n"


def text_of(end: str, *under_way: dict[str, Any], ended: tuple[dict[str, Any], ...] = ()) -> str:
    totals = Totals(end)
    for one in ended:
        totals.add_ended(one)
    head, text = answer(REQUEST, Snapshot(totals, [*under_way])).split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.0 200 ") and b"application/openmetrics-text" in head
    return text.decode()


def scraped(end: str, *under_way: dict[str, Any], **more: Any) -> Samples:
    return samples(text_of(end, *under_way, **more))


def exposed() -> dict[str, set[str]]:
    """Return the labels of each sample that there is, by its name."""
    found: dict[str, set[str]] = {}
    for end in BOTH:
        ended = shown(end, phase="completed", details=shown("sender")["details"])
        for name, having in scraped(end, shown(end), ended=(ended,) * (end == "sender")).items():
            for labels, _value in having:
                found.setdefault(name, set()).update(labels)
    return found


# ---- what is counted ----
def test_every_metric_is_documented() -> None:
    text = (TREE / "docs/metrics.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert lines == [*documented()], "Correct the tables of docs/metrics.md."


def test_every_documented_metric_is_exposed_with_its_labels() -> None:
    found = exposed()
    for line in documented():
        name, kind, labels = (cell.strip() for cell in line.split("|")[1:4])
        sample = name.strip("`") + ("_count" if kind == "histogram" else "")
        assert {*re.findall(r"`(\w+)`", labels), "end"} <= found.pop(sample), line
        for suffix in ("_bucket", "_sum") if kind == "histogram" else ():
            found.pop(name.strip("`") + suffix)
    assert found == {}


def test_the_text_is_openmetrics_with_names_by_its_conventions() -> None:
    for end in BOTH:
        for family in families(text_of(end, shown(end))):
            assert family.name.startswith(PREFIX) and family.documentation
            if family.name.endswith(("_bytes", "_seconds")):
                assert family.unit == family.name.rpartition("_")[2]
    assert all("_total" not in metric.name for metric in METRICS)


def test_older_clients_and_files_get_the_older_format() -> None:
    snapshot = Snapshot(Totals("sender"), [shown("sender")])
    head, text = answer(b"GET / HTTP/1.0\r\n\r\n", snapshot).split(b"\r\n\r\n", 1)
    assert b"Content-Type: text/plain" in head
    for older in (text, as_text(snapshot)):
        names = {family.name for family in text_string_to_metric_families(older.decode())}
        assert "xen_postcopy_sent_bytes" in names and b"# EOF" not in older


def test_the_figures_are_those_of_show() -> None:
    found = scraped("sender", shown("sender"), shown("sender", 2))
    assert value(found, "migration_sent_bytes_total", migration=f"{1:032d}", lane="pull") == 300
    assert value(found, "sent_bytes_total", lane="push") == 10_000
    for reason, pages in {"push": 7, "fault": 2, "read_ahead": 1, "precopy": 0}.items():
        assert value(found, "sent_memory_bytes_total", reason=reason) == 2 * pages * 4096
    assert value(found, "outstanding_pages") == 18
    assert value(found, "migrations", phase="postcopy") == 2
    assert value(found, "migration_expected_freeze_seconds", migration=f"{1:032d}") == 0.02
    assert value(found, "migration_downtime_seconds", migration=f"{1:032d}") == 0.5


def test_the_latency_of_faults_is_a_histogram() -> None:
    found = scraped("receiver", shown("receiver"))
    name = "fault_latency_seconds"
    assert value(found, f"{name}_count") == 4
    assert value(found, f"{name}_sum") == pytest.approx(60.003001)
    buckets = {labels["le"]: value for labels, value in found[f"{PREFIX}{name}_bucket"]}
    assert buckets["1.6e-05"] == 1 and buckets["0.001024"] == 2 and buckets["0.002048"] == 3
    assert buckets["4.194304"] == 3 and buckets["+Inf"] == 4
    assert list(buckets.values()) == sorted(buckets.values())


@pytest.mark.parametrize("end", BOTH)
def test_no_counter_shrinks_when_a_migration_ends(end: str) -> None:
    one, other = shown(end), shown(end, 2)
    before = scraped(end, one, other)
    after = scraped(end, other, ended=({**one, "phase": "failed"},))
    counters = [name for name in before if name.endswith(("_total", "_count", "_sum", "_bucket"))]
    assert len(counters) > 8
    for name in counters:
        if "_migration_" not in name and "ended_migrations" not in name:
            assert before[name] == after[name]
    assert value(after, "ended_migrations_total", outcome="failed") == 1


def test_outcomes_are_told_apart() -> None:
    ended = (
        shown("sender", phase="completed", outcome="completed"),
        *(shown("sender", phase="failed", outcome=how) for how in ("failed", "cancelled")),
    )
    found = scraped("sender", ended=ended)
    outcomes = {labels["outcome"]: n for labels, n in found[PREFIX + "ended_migrations_total"]}
    ends = {"completed": 1, "failed": 1, "cancelled": 1}
    assert outcomes == {**dict.fromkeys(OUTCOMES, 0), **ends}
    assert value(found, "downtime_seconds_count") == 1
    assert value(found, "downtime_seconds_bucket", le="0.5") == 1
    assert value(found, "downtime_seconds_bucket", le="0.2") == 0


# ---- bounds ----
def test_series_end_with_their_migration() -> None:
    found = scraped("sender", ended=(shown("sender"),))
    assert not any("migration" in labels for having in found.values() for labels, _ in having)


def test_the_number_of_series_is_bounded() -> None:
    many = [shown("receiver", number) for number in range(MOST_MIGRATIONS + 50)]
    found = scraped("receiver", *many)
    series = found[PREFIX + "migration_info"]
    assert [int(labels["migration"]) for labels, _ in series] == [*range(50, MOST_MIGRATIONS + 50)]
    assert value(found, "outstanding_pages") == 9 * len(many)


@pytest.mark.parametrize("phase", ["preflight", "connecting", "completed"])
def test_a_migration_has_no_series_before_memory_is_copied(phase: str) -> None:
    found = scraped("receiver", shown("receiver", phase=phase, domain="of a stranger"))
    assert "of a stranger" not in str(found)


def test_a_value_that_the_daemon_does_not_have_is_left_out() -> None:
    found = scraped("sender", shown("sender", unknown=["outstanding"], dirty_bytes_per_s=None))
    for name in ("migration_outstanding_pages", "migration_dirty_bytes_per_second"):
        assert PREFIX + name not in found
    assert value(found, "outstanding_pages") == 0


def test_no_name_of_a_guest_breaks_the_text() -> None:
    name = 'a"b\\c{d}=,\N{SNOWMAN}\n# EOF'
    found = scraped("sender", shown("sender", domain=name, peer=name))
    (info,) = found[PREFIX + "migration_info"]
    assert info[0]["domain"] == info[0]["peer"] == name


# ---- the dashboard ----
def test_the_dashboard_names_metrics_and_labels_that_there_are() -> None:
    board, found = json.loads(DASHBOARD.read_text()), exposed()
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    assert len(queries) > 15
    used = set()
    for query in queries:
        for name, selector in re.findall(rf"({PREFIX}\w+)(?:{{([^}}]*)}})?", query):
            labels = set(re.findall(r'(\w+)=~?"', selector)) - {"instance"}
            assert labels <= found[name], query
            used.add(name)
        for labels in re.findall(r"\bby \(([\w, ]+)\)", query):
            (name,) = re.findall(rf"{PREFIX}\w+", query)
            assert {*labels.split(", ")} - {"instance"} <= found[name], query
    missing = {PREFIX + metric.name for metric in METRICS if metric.of is Of.ENDED}
    assert all(any(name.startswith(metric) for name in used) for metric in missing)


def test_the_dashboard_is_one_that_grafana_9_imports() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["schemaVersion"] >= 36 and board["id"] is None and board["uid"] and board["title"]
    variables = {one["name"] for one in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", DASHBOARD.read_text())) <= variables
    panels, source = board["panels"], {"type": "prometheus", "uid": "${datasource}"}
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        ids = [target["refId"] for target in panel["targets"]]
        assert ids and len(set(ids)) == len(ids)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == source


# ---- HTTP ----
@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics?name[]=xen_postcopy_migrations HTTP/1.1", b" 200 "),
        (b"GET /secrets HTTP/1.1", b" 404 "),
        (b"POST /metrics HTTP/1.1", b" 501 "),
        (b"GET /metrics HTTP/9.9", b" 505 "),
        (b"GET /" + b"x" * 16_000 + b" HTTP/1.1", b" 404 "),
        (b"\xff\xfe\x00", b"Error code: 400"),
    ],
)
def test_whatever_is_requested_has_an_answer(request_line: bytes, status: bytes) -> None:
    assert status in answer(request_line + b"\r\n\r\n", Snapshot(Totals("sender")))


async def scrape(port: int) -> bytes:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        with trio.fail_after(WAIT_S):
            await stream.send_all(REQUEST)
            return b"".join([data async for data in stream])


LISTENING = MetricsConfig(sender_listen=("127.0.0.1", 0))


async def test_a_migration_that_ends_is_counted_once(nursery: trio.Nursery, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    port = await served(nursery, daemon, LISTENING)
    daemon.migrations = [shown("sender")]
    before = samples((await scrape(port)).split(b"\r\n\r\n", 1)[1].decode())
    (ended,), daemon.migrations = daemon.migrations, []
    await daemon.history.add({**ended, "phase": "completed", "outcome": "completed"})
    after = samples((await scrape(port)).split(b"\r\n\r\n", 1)[1].decode())
    for found in (before, after):
        assert value(found, "sent_bytes_total", lane="push") == 5000
    assert value(after, "ended_migrations_total", outcome="completed") == 1


async def test_a_bug_in_counting_costs_no_entry_of_the_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = Daemon(tmp_path)
    Metrics("receiver", MetricsConfig(), daemon)
    await daemon.history.add(shown("receiver", details={}))
    assert "internal error in counting" in caplog.text
    assert (tmp_path / "history.jsonl").exists()


async def test_clients_that_send_or_receive_nothing_are_left(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(tmp_path)
    daemon.migrations = [shown("sender", number) for number in range(1000)]
    monkeypatch.setattr(serve, "REQUEST_S", 0.3)
    monkeypatch.setattr(serve, "ANSWER_S", 0.3)
    monkeypatch.setattr(exposition, "answer", lambda *_arguments: b"x" * 50_000_000)
    port = await served(nursery, daemon, LISTENING)
    silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(MOST_SCRAPES)]
    for client in silent[: MOST_SCRAPES // 2]:
        await client.send_all(REQUEST)  # these do not receive the answer
    with trio.fail_after(WAIT_S):
        while not await scrape(port):  # closed, because others are answered
            await trio.sleep(0.02)
        for client in silent:
            client.socket.close()


async def test_a_host_without_threads_serves_later(
    nursery: trio.Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = await served(nursery, Daemon(tmp_path), LISTENING)

    async def no_thread(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as used_up:
        used_up.setattr(trio.to_thread, "run_sync", no_thread)
        assert await scrape(port) == b""
    assert "a scrape is given up" in caplog.text
    assert b"# EOF" in await scrape(port)


# ---- the start ----
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MetricsConfig(textfiles="/nowhere"), r"\[metrics\] textfiles: /nowhere is not a direct"),
        (
            MetricsConfig(sender_listen=Path("/nowhere/at/all/metrics.sock")),
            r"\[metrics\] sender_listen: socket .*: there is no folder /nowhere/at",
        ),
        (
            MetricsConfig(sender_listen=("127.0.0.1", 1)),
            r"\[metrics\] sender_listen: cannot listen at 127.0.0.1:1: ",
        ),
    ],
)
async def test_what_cannot_be_served_is_an_error_of_the_configuration(
    tmp_path: Path, config: MetricsConfig, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    monkeypatch.setattr(trio, "open_tcp_listeners", refuse)
    with pytest.raises(ExceptionGroup) as raised:
        async with trio.open_nursery() as nursery:
            await served(nursery, Daemon(tmp_path), config)
    assert raised.group_contains(ConfigError, match=reason)


def test_a_client_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import migrate.metrics

    monkeypatch.delattr(migrate.metrics, "exposition")
    monkeypatch.delitem(sys.modules, "migrate.metrics.exposition")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match="Debian: python3-prometheus-client"):
        Metrics("sender", LISTENING, Daemon(tmp_path))
    with pytest.raises(ImportError):
        importlib.import_module("migrate.metrics.exposition")


def test_the_client_library_is_imported_only_if_metrics_are_on() -> None:
    program = (
        "import sys, migrate.cli.daemons, sender.command, receiver.command\n"
        "assert not [name for name in sys.modules if name.startswith('prometheus_client')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S, cwd=TREE)


def test_each_daemon_has_metrics_of_its_own() -> None:
    assert {metric.end for metric in METRICS} == {"", *BOTH}
    for end in BOTH:
        assert 5 < len(metrics_of(end)) < len(METRICS)
