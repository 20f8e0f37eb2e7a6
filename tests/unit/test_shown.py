# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of ``show``, and the events of ``watch --json``."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from migrate.cli import shown
from migrate.cli.accepted import accepted
from migrate.cli.events import Events
from migrate.cli.figures import time_of_day
from migrate.outcomes import MOST_PHASES
from receiver.progress import IncomingProgress
from receiver.statistics import PagerStatistics
from sender.progress import Progress
from sender.statistics import SenderStatistics

SENDER: dict[str, Any] = {
    "event": "result", "id": "0123456789abcdef", "direction": "outgoing", "domain": "web",
    "peer": "there:8013", "strategy": "hybrid", "handed_over": True, "checkpoint_age_s": None,
    "unknown": [], "outcome": "", "phase": "postcopy", "round": 2, "pages_done": 80_000,
    "pages_total": 131_072, "outstanding": 51_072, "faults": 1200, "latency_us": 350,
    "bytes_sent": 536_870_912, "checkpoints": 0, "unprotected": "", "problem": "",
    "started_at": 1_700_000_000.0, "elapsed_s": 12.0, "bytes_per_s": 118.2 * 2**20,
    "dirty_bytes_per_s": 35_000_000, "expected_freeze_ms": None, "eta_s": 2.1,
    "eta_least_s": 2.1, "faults_per_s": 412.0, "longest_wait_us": 12_345,
    "phases": [{"phase": "precopy", "at": 1_700_000_000.0}], "known": "it has the guest",
    "details": {
        "strategy": "hybrid", "memory_bytes": 2**29, "total_s": 12.0, "downtime_s": 0.0052,
        "precopy": {"rounds": 2, "pages": 150_000},
        "switchover": {"pages": 12, "missing_pages": 131_072},
        "expected": {
            "pages": 9000, "bytes_per_s": 2**27, "fault_us": 350, "round_trip_us": 80,
            "stop_and_copy_ms": 281.2, "postcopy_ms": 120.5,
        },
        "push": {"pages": 100, "bytes": 409_600}, "zero_pages": 512, "bytes_sent": 536_870_912,
        "rejoins": 0, "throughput_bytes_per_s": 2**26,
    },
}  # fmt: skip
PAGER: dict[str, Any] = {
    "fault_latency_us": {
        "count": 1200, "mean": 400.0, "p50": 350.0, "p99": 2000.0, "max": 12_345.0,
        "histogram": {"512": 1000},
    },
    "vcpu_block_s": {"0": 0.31, "1": 0.2}, "pull": {"requests": 12, "ahead": 30, "pages": 40},
    "checkpoints": {"kept": 3, "pages": 120, "pause_s": 0.1, "longest_pause_s": 0.05},
}  # fmt: skip


def values(answer: dict[str, Any]) -> dict[str, str]:
    found = [(line[:22].rstrip(), line[23:]) for line in shown.lines(answer, answer["elapsed_s"])]
    assert len(found) == len(dict(found)), found
    return dict(found)


@pytest.mark.parametrize("answer", [SENDER, {**SENDER, "details": PAGER}], ids=["sender", "pager"])
def test_of_an_answer_of_this_release_all_is_accepted(answer: dict[str, Any]) -> None:
    assert values(accepted(answer)) == values(answer)
    for phase in ("precopy", "completed"):
        now = {**answer, "phase": phase, "eta_s": None, "pages_total": None, "started_at": None}
        assert values(accepted(now)) == values(now)


def test_more_phases_than_a_daemon_keeps_are_not_accepted() -> None:
    for count, unknown in ((MOST_PHASES, []), (MOST_PHASES + 1, ["phases"])):
        phases = [{"phase": "precopy", "at": 1.0}] * count
        assert accepted({**SENDER, "phases": phases})["unknown"] == unknown


def test_each_figure_has_one_name_and_its_unit() -> None:
    found = values(SENDER)
    assert found == {
        "id": "0123456789abcdef", "direction": "outgoing", "domain": "web", "peer": "there:8013",
        "strategy": "hybrid", "handed over": "yes", "phase": "postcopy",
        "done": "312 of 512 MiB (61%)", "round": "2", "outstanding": "51072 pages (199.5 MiB)",
        "fault latency": "1200 faults, median 350 us, longest 12.3 ms", "sent": "512.0 MiB",
        "checkpoints": "none",
        "started": found["started"], "elapsed": "12 s", "rate": "118.2 MiB/s",
        "dirty rate": "33.4 MiB/s", "ETA": "3 s", "fault rate": "412.0 faults/s",
        "phases": f"precopy {found['started']}",
        "known of the other end": "it has the guest", "memory": "512.0 MiB", "downtime": "5.2 ms",
        "precopy": "2 rounds, 150000 pages", "switchover": "12 pages, 131072 missing pages",
        "expected": "9000 pages, 128.0 MiB/s, fault 350 us, round trip 80 us, stop and copy 281 ms,"
        " postcopy 120 ms",
        "push": "100 pages, 400.0 KiB", "zero pages": "512 pages (2.0 MiB)", "rejoins": "0",
        "average rate": "64.0 MiB/s",
    }  # fmt: skip


def test_the_options_that_can_be_changed_are_shown_with_their_units() -> None:
    options = {
        "max_rounds": 5, "downtime_target_ms": 20.0, "timeout_s": None,
        "bandwidth_bytes_per_s": 2**24, "postcopy_bandwidth_bytes_per_s": 0,
    }  # fmt: skip
    assert values({**SENDER, "options": options})["options"] == (
        "max rounds 5, downtime target 20 ms, bandwidth 16.0 MiB/s, postcopy bandwidth none"
    )


def test_the_counters_of_the_pager_replace_what_they_contain() -> None:
    found = values({**SENDER, "details": {**SENDER["details"], **PAGER}})
    assert found["fault latency"] == (
        "1200 faults, mean 400 us, median 350 us, 99% below 2 ms, longest 12.3 ms"
    )
    assert found["vcpu block"] == "vCPU 0 310 ms, vCPU 1 200 ms"
    assert found["pull"] == "12 requests, 30 ahead, 40 pages"


def test_an_end_has_its_outcome_and_the_final_counters() -> None:
    ended = {**SENDER, "phase": "failed", "problem": "cancelled by the operator", "eta_s": None}
    found = values({**ended, "details": {**SENDER["details"], **PAGER}})
    assert (found["phase"], found["problem"]) == ("cancelled", "cancelled by the operator")
    assert found["checkpoints"] == "3 kept, 120 pages, pause 0.1 s, longest pause 0.1 s"
    assert not {"rate of", "ETA"} & set(found)


def test_a_pause_is_shown_in_place_of_the_time_that_is_left() -> None:
    assert values({**SENDER, "paused": True})["ETA"] == "paused"


def test_what_there_is_not_yet_is_not_shown_as_0() -> None:
    details = {**SENDER["details"], "downtime_s": 0.0, "precopy": {"rounds": 1, "pages": 9}}
    found = values({**SENDER, "latency_us": 0, "details": details})
    assert "downtime" not in found
    assert found["fault latency"] == "1200 faults, longest 12.3 ms"
    before = {"faults": 0, "latency_us": 0, "longest_wait_us": None}
    assert values({**SENDER, **before})["fault latency"] == "none"
    assert found["precopy"] == "1 round, 9 pages"


def test_an_unknown_value_is_shown_as_one() -> None:
    found = values({**SENDER, "unknown": ["outstanding", "memory_bytes", "downtime_s", "precopy"]})
    for name in ("outstanding", "memory", "downtime", "precopy"):
        assert found[name] == "-"
    assert values({**SENDER, "unknown": ["faults", "latency_us"]})["fault latency"] == "-"


RECEIVER: dict[str, Any] = {
    "id": "0123456789abcdef", "direction": "incoming", "domid": 7, "peer": "here:8014",
    "unknown": [], "phase": "postcopy", "outcome": "",
    **asdict(
        IncomingProgress(
            "web", outstanding=51_072, waiting=1, started_at=1_700_000_000.0, elapsed_s=12.0,
            pages_done=80_000, pages_total=131_072, bytes_received=500_000_000, bytes_per_s=1e8,
            eta_s=2.1, faults=1200, latency_us=350, faults_per_s=412.0, longest_wait_us=99_000,
            phases=[{"phase": "postcopy", "at": 1_700_000_000.0}],
        )
    ),
    "ended_at": None, "known": "it has the guest", "details": PagerStatistics().summary() | PAGER,
}  # fmt: skip


def test_both_ends_show_the_same_figures_in_one_order_under_one_name() -> None:
    ours, theirs = list(values(SENDER | {"domid": 3})), list(values(RECEIVER))
    both = set(ours) & set(theirs)
    assert len(both) > 12 and {"fault latency", "checkpoints", "ETA"} <= both
    assert [name for name in ours if name in both] == [name for name in theirs if name in both]


def test_a_wait_that_has_not_ended_is_among_the_longest() -> None:
    assert values(RECEIVER)["fault latency"].endswith("99% below 2 ms, longest 99 ms")


def test_each_key_of_both_ends_has_its_place() -> None:
    keys = {*SENDER, *SENDER["details"], *RECEIVER, *RECEIVER["details"], "options", "ended_at"}
    keys |= {field.name for kind in (Progress, IncomingProgress) for field in fields(kind)}
    keys |= SenderStatistics().summary().keys()
    assert keys - {*shown.HIDDEN, *shown.LATENCY, "details", "checkpoint_at"} <= {*shown.ORDER}


def test_the_day_is_shown_of_an_earlier_one() -> None:
    now = 1_700_000_000.0
    assert time_of_day(now, now) == time.strftime("%H:%M:%S", time.localtime(now))
    assert time_of_day(now, now + 100_000).startswith("2023-11-1")


def test_each_key_of_the_progress_is_documented_with_its_unit() -> None:
    text = (Path(__file__).parents[2] / "docs/commands.md").read_text()
    section = text.split("\n### The keys of `list` and `show`\n")[1].split("\n### ")[0]
    documented = {
        key
        for cell in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", cell)
    }
    ours = {field.name for kind in (Progress, IncomingProgress) for field in fields(kind)}
    assert ours - {"checkpoint_at"} <= documented  # a daemon makes its age of it


# ---- events ----
def events(*answers: tuple[float, dict[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Return for each answer the events and their phases."""
    one = Events()
    return [
        [(event["event"], event["phase"]) for event in one.lines(now, 0.0, {**SENDER, **answer})]
        for now, answer in answers
    ]


def phases(*names: str) -> dict[str, Any]:
    began = [{"phase": name, "at": 1000.0 + number} for number, name in enumerate(names)]
    return {"phase": names[-1], "phases": began}


def test_there_is_a_line_for_each_change_and_each_second() -> None:
    assert events(
        (0.0, phases("precopy")),
        (0.5, phases("precopy")),
        (1.0, phases("precopy")),
        (1.2, {**phases("precopy"), "round": 3}),
        (1.4, phases("precopy", "switchover", "postcopy")),
        (1.6, {**phases("precopy", "switchover", "postcopy"), "problem": "no memory"}),
        (1.8, phases("precopy", "switchover", "postcopy", "completed")),
        (3.0, phases("precopy", "switchover", "postcopy", "completed")),
    ) == [
        [("phase", "precopy"), ("progress", "precopy")],
        [],
        [("progress", "precopy")],
        [("progress", "precopy")],
        [("phase", "switchover"), ("phase", "postcopy"), ("progress", "postcopy")],
        [("progress", "postcopy")],
        [("phase", "completed"), ("end", "completed")],
        [],
    ]


def test_a_clock_that_is_set_back_delays_no_line() -> None:
    one = Events()
    answer = {**SENDER, **phases("precopy")}
    found = [len(list(one.lines(now, at, answer))) for now, at in ((5.0, 9000.0), (6.0, 1000.0))]
    assert found == [2, 1]


def test_phases_that_are_not_remembered_any_more_are_not_missed() -> None:
    """The daemon keeps a number of phases only."""
    later = [{"phase": name, "at": at} for at, name in ((7.0, "interrupted"), (8.0, "postcopy"))]
    assert events((0.0, phases("postcopy")), (9.0, {"phase": "postcopy", "phases": later}))[1] == [
        ("phase", "interrupted"), ("phase", "postcopy"), ("progress", "postcopy"),
    ]  # fmt: skip


def test_a_daemon_of_an_earlier_release_notes_no_phases() -> None:
    one, found = Events(), []
    for now, phase in ((0.0, "precopy"), (0.1, "precopy"), (0.2, "completed")):
        answer = {key: value for key, value in SENDER.items() if key != "phases"}
        found += [event["event"] for event in one.lines(now, now, {**answer, "phase": phase})]
    assert found == ["phase", "progress", "phase", "end"]


def test_only_the_end_has_all_that_was_measured() -> None:
    one = Events()
    (_phase, progress) = one.lines(0.0, 9.0, {**SENDER, **phases("precopy")})
    (_phase, end) = one.lines(1.0, 10.0, {**SENDER, **phases("precopy", "completed")})
    assert "details" not in progress and end["details"] == SENDER["details"]
    assert progress["at"] == 9.0 and progress["bytes_per_s"] == SENDER["bytes_per_s"]


@pytest.mark.parametrize("phase", ["completed", "failed", "refused"])
def test_an_end_is_reported_once(phase: str) -> None:
    assert [len(found) for found in events((0.0, phases(phase)), (9.0, phases(phase)))] == [2, 0]
