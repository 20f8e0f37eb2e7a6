# SPDX-License-Identifier: GPL-2.0-or-later
"""The runner of the tiers: what it starts, ends, counts and records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checks.record import Outcome, Record, TestResult, junit_results, tables
from tests.checks.runner import Runner, marked
from tests.checks.stages import TIERS, Stage

TREE = Path(__file__).parents[1]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good" time="1.5"/>
<testcase classname="tests.test_a" name="test_bad" time="0.5"><failure message="no">why</failure></testcase>
<testcase classname="tests.test_a" name="test_left_out" time="0"><skipped/></testcase>
<testcase classname="tests.test_a" name="test_broken" time="0"><error/></testcase>
</testsuite></testsuites>"""


def stage(name: str, script: str, *, limit_s: float = 60, cores: int = 1) -> Stage:
    return Stage(name, "a stage of this test", ("sh", "-c", script), limit_s, cores)


def run(tmp_path: Path, *stages: Stage, cores: int = 2) -> tuple[dict[str, Outcome], str]:
    """The outcomes by name, and what was shown."""
    shown: list[str] = []
    outcomes = Runner(tmp_path, cores=cores, show=shown.append).run(stages)
    return {outcome.name: outcome for outcome in outcomes}, "\n".join(shown)


def test_a_stage_that_fails_is_reported_with_its_log_and_the_others_run(tmp_path: Path) -> None:
    outcomes, shown = run(
        tmp_path, stage("bad", "echo the $((40 + 2)) reasons; exit 3"), stage("good", "echo $((6 * 7)) quiet")
    )
    assert not outcomes["bad"].passed and outcomes["bad"].status == 3
    assert outcomes["good"].passed
    assert "the 42 reasons" in shown and "42 quiet" not in shown
    assert (tmp_path / "good.log").read_text() == "42 quiet\n"


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Whatever session the process is in by then."""
    script = f"setsid sleep 600 & echo $$ > {tmp_path}/started; sleep 600"
    outcomes, _shown = run(tmp_path, stage("slow", script, limit_s=1))
    assert outcomes["slow"].timed_out and not outcomes["slow"].passed
    assert (tmp_path / "started").exists()
    assert marked(f"slow-{os.getpid()}") == []


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path) -> None:
    outcomes, _shown = run(
        tmp_path, stage("untidy", f"setsid sleep 600 & echo $! > {tmp_path}/left"), stage("other", "true")
    )
    assert outcomes["untidy"].passed
    left = int((tmp_path / "left").read_text())
    stat = Path(f"/proc/{left}/stat")
    assert not stat.exists() or " Z " in stat.read_text()


def test_stages_run_beside_each_other_as_far_as_there_are_cores(tmp_path: Path) -> None:
    """Each of the two waits for the other; the third needs the machine to itself."""
    a, b = tmp_path / "first", tmp_path / "second"
    wait = "touch {0}; for i in $(seq 600); do test -e {1} && exit 0; sleep 0.1; done; exit 1"
    alone = f"test -e {a}.done && test -e {b}.done"
    outcomes, _shown = run(
        tmp_path,
        stage("one", f"({wait.format(a, b)}) && touch {a}.done"),
        stage("two", f"({wait.format(b, a)}) && touch {b}.done"),
        stage("alone", alone, cores=99),
    )
    assert {name for name, outcome in outcomes.items() if outcome.passed} == {"one", "two", "alone"}


def test_the_tests_of_a_stage_are_read_from_its_junit_files(tmp_path: Path) -> None:
    (tmp_path / "xml").write_text(JUNIT)
    outcomes, _shown = run(tmp_path, stage("tested", f"cp {tmp_path}/xml $JUNIT/results.xml"))
    assert outcomes["tested"].tests == (
        TestResult("tests.test_a::test_good", "passed", 1.5),
        TestResult("tests.test_a::test_bad", "failed", 0.5),
        TestResult("tests.test_a::test_left_out", "skipped", 0.0),
        TestResult("tests.test_a::test_broken", "error", 0.0),
    )
    text = tables(list(outcomes.values()))
    assert "1 passed, 2 failed, 1 skipped" in text.splitlines()
    assert "tests.test_a::test_bad" in text.partition("Failed:")[2]


def test_a_torn_junit_file_is_an_error_and_two_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "here.xml").write_text(JUNIT)
    (tmp_path / "there.xml").write_text(JUNIT[:100])
    found = junit_results(tmp_path)
    assert found[0] == TestResult("here: tests.test_a::test_good", "passed", 1.5)
    assert found[-1] == TestResult("there.xml", "error", 0.0)


def test_a_stage_that_fails_without_a_test_is_counted(tmp_path: Path) -> None:
    outcome = Outcome("fuzz", "make fuzz", 77, 1.0, 1.0, False, ())
    assert tables([outcome]).endswith("0 passed, 1 failed, 0 skipped")


def test_the_record_can_be_read_and_says_what_ran_where(tmp_path: Path) -> None:
    outcomes, _shown = run(tmp_path, stage("bad", "exit 1"), stage("good", "exit 0"))
    record = Record("everything", "2026-01-02T03:04:05+00:00")
    assert record.name.startswith("2026-01-02-everything-")
    record.write(tmp_path / "results" / record.name, list(outcomes.values()), 12.0)
    path = tmp_path / "results" / record.name
    read = json.loads(path.read_text())
    assert read["passed"] is False and read["seconds"] == 12.0
    assert {found["name"]: found["status"] for found in read["stages"]} == {"bad": 1, "good": 0}
    assert read["machine"]["cores"] > 0 and read["machine"]["cpu"]
    shown = checks("show", str(path))
    assert shown.returncode == 0 and tables(list(outcomes.values())) in shown.stdout
    path.write_text("{}")
    shown = checks("show", str(path))
    assert shown.returncode == 1 and "is no record" in shown.stderr and "Traceback" not in shown.stderr


def checks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.checks", *arguments]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("tier", TIERS)
def test_each_stage_is_a_target_of_the_makefile(tier: str) -> None:
    assert checks(tier, "--list").returncode == 0
    for one in TIERS[tier]:
        assert one.command[0] == "make"
        dry = subprocess.run([*one.command, "-n"], cwd=TREE, capture_output=True, text=True, timeout=60, check=False)
        assert dry.returncode == 0, dry.stderr


def test_a_stage_that_does_not_exist_is_refused() -> None:
    done = checks("gate", "--only", "tset")
    assert done.returncode == 2 and "no stage 'tset'" in done.stderr


def test_everything_has_each_stage_of_the_gate() -> None:
    assert {one.name for one in TIERS["gate"]} <= {one.name for one in TIERS["everything"]}
