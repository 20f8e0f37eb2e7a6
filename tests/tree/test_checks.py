# SPDX-License-Identifier: GPL-2.0-or-later
"""The runner of the tiers: what it starts, ends, counts and records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checks import unchanged
from tests.checks.record import Outcome, Record, TestResult, continued, junit_results, read, tables
from tests.checks.runner import MARK, Runner, end_orphans, marks
from tests.checks.stages import TIERS, Stage
from tests.support.labs import until
from tests.tree import listing
from tests.xenlab import parts

TREE = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good" time="1.5"/>
<testcase classname="tests.test_a" name="test_bad" time="0.5">
<failure message="no">why</failure></testcase>
<testcase classname="tests.test_a" name="test_left_out" time="0"><skipped/></testcase>
<testcase classname="tests.test_a" name="test_broken" time="0"><error/></testcase>
</testsuite></testsuites>"""


def stage(
    name: str, script: str, *, limit_s: float = 60, cores: int = 1, has_tests: bool = False
) -> Stage:
    return Stage(name, "a stage of this test", ("sh", "-c", script), limit_s, cores, has_tests)


def run(tmp_path: Path, *stages: Stage, cores: int = 2) -> tuple[dict[str, Outcome], str]:
    """Run the stages.  Returns the outcomes by name, and the output."""
    shown: list[str] = []
    runner = Runner(tmp_path, cores=cores, show=shown.append)
    runner.run(stages)
    return {outcome.name: outcome for outcome in runner.outcomes}, "\n".join(shown)


def test_a_stage_that_fails_is_reported_with_its_log_and_the_others_run(tmp_path: Path) -> None:
    outcomes, shown = run(
        tmp_path,
        stage("bad", "echo the $((40 + 2)) reasons; exit 3"),
        stage("good", "echo $((6 * 7)) quiet"),
    )
    assert not outcomes["bad"].passed and outcomes["bad"].status == 3
    assert outcomes["good"].passed
    assert "the 42 reasons" in shown and "42 quiet" not in shown
    assert (tmp_path / "good.log").read_text() == "42 quiet\n"


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """The process is ended whatever session it is in."""
    script = f"setsid sleep 600 & echo ${MARK} > {tmp_path}/mark; sleep 600"
    outcomes, _shown = run(tmp_path, stage("slow", script, limit_s=1))
    assert outcomes["slow"].timed_out and not outcomes["slow"].passed
    mark = (tmp_path / "mark").read_text().strip()
    assert mark and mark not in marks().values()


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path) -> None:
    outcomes, _shown = run(
        tmp_path,
        stage("untidy", f"setsid sleep 600 & echo $! > {tmp_path}/left"),
        stage("other", "true"),
    )
    assert outcomes["untidy"].passed
    left = int((tmp_path / "left").read_text())

    def has_ended() -> bool:
        try:
            return " Z " in Path(f"/proc/{left}/stat").read_text()
        except OSError:
            return True

    until(has_ended, "the process is left running")


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


def test_a_torn_junit_file_is_an_error_and_two_files_are_distinct(tmp_path: Path) -> None:
    (tmp_path / "here.xml").write_text(JUNIT)
    (tmp_path / "there.xml").write_text(JUNIT[:100])
    found = junit_results(tmp_path)
    assert found[0] == TestResult("here: tests.test_a::test_good", "passed", 1.5)
    assert found[-1] == TestResult("there.xml", "error", 0.0)


def test_a_stage_that_fails_without_a_test_is_counted(tmp_path: Path) -> None:
    outcome = Outcome("fuzz", "make fuzz", 77, 1.0, 1.0, False, False, ())
    assert tables([outcome]).endswith("0 passed, 1 failed, 0 skipped")


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ("cp {0}/xml $JUNIT/results.xml", "failed (tests failed, though the exit status is 0)"),
        (
            "head -c 100 {0}/xml > $JUNIT/results.xml",
            "failed (tests failed, though the exit status is 0)",
        ),
        (
            "echo '<testcase time=\"1,2\"/>' > $JUNIT/results.xml",
            "failed (tests failed, though the exit status is 0)",
        ),
        ("mkdir $JUNIT/results.xml", "failed (tests failed, though the exit status is 0)"),
        ("true", "failed (no test has passed)"),
        ("rmdir $JUNIT", "failed (no test has passed)"),
        ("rm {0}/tested.log; exit 1", "failed (exit status 1)"),
        ("printf '\\033[2J%0300000d' 0; exit 1", "failed (exit status 1)"),
        ("kill -9 $$", "failed (exit status -9)"),
    ],
)
def test_a_stage_that_only_looks_good_has_failed(tmp_path: Path, script: str, verdict: str) -> None:
    (tmp_path / "xml").write_text(JUNIT)
    outcomes, shown = run(
        tmp_path, stage("tested", script.format(tmp_path), has_tests=True), stage("other", "true")
    )
    assert outcomes["tested"].verdict == verdict
    assert outcomes["other"].passed
    assert "\033" not in shown and len(shown) < 100_000


def test_a_stage_that_cannot_be_started_has_failed_and_the_others_run(tmp_path: Path) -> None:
    outcomes, _shown = run(
        tmp_path, Stage("none", "no program", ("/nonexistent",), 60), stage("other", "true")
    )
    assert not outcomes["none"].passed and outcomes["other"].passed


def test_what_a_killed_runner_has_left_is_ended_by_the_next(tmp_path: Path) -> None:
    """Nothing of a runner that runs is ended."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    ours = marks_of_this_process(tmp_path)
    orphan, other = (
        subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: f"stage {runner}"})
        for runner in (f"{gone.pid} 1", ours)
    )
    try:
        end_orphans()
        assert orphan.wait(60) == -9
        assert other.poll() is None
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


def marks_of_this_process(tmp_path: Path) -> str:
    """Return the second part of the marks of a runner in this process."""
    run(tmp_path, stage("marked", f"echo $XEN_POSTCOPY_STAGE > {tmp_path}/mark"))
    return (tmp_path / "mark").read_text().strip().partition(" ")[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_stages_as_well(tmp_path: Path, number: signal.Signals) -> None:
    """The signal is sent twice, as by an impatient user."""
    program = tmp_path / "make"
    program.write_text(f"#!/bin/sh\nsetsid sleep 600 & echo $! > {tmp_path}/$2.pid; sleep 600\n")
    program.chmod(0o755)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "tests").symlink_to(TREE / "tests")
    script = "\n".join([
        "import pathlib, sys",
        f"sys.path.insert(0, {str(TREE)!r})",
        "import tests.checks.__main__ as checks",
        f"checks.TREE = pathlib.Path({str(tree)!r})",
        "sys.argv = ['checks', 'gate', '--only', 'model', '--only', 'demo']",
        "checks.main()",
    ])  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=TREE, text=True,
    )  # fmt: skip
    pids = [tmp_path / f"{name}.pid" for name in ("model", "demo")]
    until(
        lambda: all(pid.exists() and pid.read_text().strip() for pid in pids),
        "the stages do not start",
    )
    process.send_signal(number)
    process.send_signal(number)
    _out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "interrupted" in error and "Traceback" not in error
    for pid in pids:
        stat = Path(f"/proc/{pid.read_text().strip()}/stat")
        assert not stat.exists() or " Z " in stat.read_text()


def test_the_record_can_be_read_and_says_what_ran_where(tmp_path: Path) -> None:
    outcomes, _shown = run(tmp_path, stage("bad", "exit 1"), stage("good", "exit 0"))
    record = Record("everything", "2026-01-02T03:04:05+00:00")
    assert record.name.startswith("2026-01-02-everything-")
    record.write(tmp_path / "results" / record.name, list(outcomes.values()), 12.0)
    path = tmp_path / "results" / record.name
    record_file = json.loads(path.read_text())
    assert record_file["passed"] is False and record_file["seconds"] == 12.0
    assert {found["name"]: found["status"] for found in record_file["stages"]} == {
        "bad": 1,
        "good": 0,
    }
    assert record_file["machine"]["cores"] > 0 and record_file["machine"]["cpu"]
    shown = checks("show", str(path))
    assert shown.returncode == 0 and tables(list(outcomes.values())) in shown.stdout
    path.write_text("{}")
    shown = checks("show", str(path))
    assert (
        shown.returncode == 1 and "is no record" in shown.stderr and "Traceback" not in shown.stderr
    )


def test_a_record_keeps_the_figures_that_a_stage_prints(tmp_path: Path) -> None:
    figures = replace(stage("figures", "echo fault 1.02; echo bulk 0.57"), prints_figures=True)
    outcomes, _shown = run(tmp_path, figures, stage("quiet", "echo 42"))
    record = Record("everything", "2026-01-02T03:04:05+00:00")
    record.write(tmp_path / record.name, list(outcomes.values()), 12.0)
    kept = {one.name: one.figures for one in read(tmp_path / record.name)[1]}
    assert kept == {"figures": ("fault 1.02", "bulk 0.57"), "quiet": ()}
    shown = checks("show", "--figures", f"{tmp_path}/{record.name}").stdout
    assert shown.endswith("\n\nfigures:\n    fault 1.02\n    bulk 0.57\n")


def test_a_stage_that_ran_again_replaces_the_earlier_run_and_keeps_its_verdict(
    tmp_path: Path,
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, _shown = run(tmp_path / "first", stage("bad", "exit 1"), stage("good", "exit 0"))
    second, _shown = run(tmp_path / "second", stage("bad", "exit 0"), stage("late", "exit 0"))
    both = continued(list(first.values()), "0123456789abcdef", list(second.values()))
    assert {one.name: (one.passed, one.before) for one in both} == {
        "good": (True, ()),
        "bad": (True, ("failed (exit status 1)",)),
        "late": (True, ()),
    }
    assert both[0].name == "good"  # the stages that did not run again come first
    assert [one.commit for one in both] == ["0123456789abcdef", "", ""]
    record = Record("everything", "2026-01-02T03:04:05+00:00")
    record.write(tmp_path / record.name, both, 12.0)
    shown = checks("show", f"{tmp_path}/{record.name}").stdout
    assert "passed (before: failed (exit status 1))" in shown and "(on 0123456789)" in shown


@pytest.mark.parametrize(
    ("changed", "continues"), [("tests/test_a.py", True), ("docs/README.md", True), ("a.py", False)]
)
def test_a_run_is_continued_on_a_commit_with_the_same_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, continues: bool
) -> None:
    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, timeout=60)

    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "first")
    at = "2026-01-02T03:04:05+00:00"
    first = Record("everything", at)
    first.write(tmp_path / ".git" / "first.json", [], 1.0)
    head, _outcomes = read(tmp_path / ".git" / "first.json")
    (tmp_path / changed).parent.mkdir(exist_ok=True)
    (tmp_path / changed).write_text("changed")
    assert not Record("everything", at).continues(head), "a change is not committed"
    git("add", "--all")
    git("commit", "--quiet", "--message", "second")
    assert Record("everything", at).continues(head) is continues
    assert not Record("gate", at).continues(head)


def checks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.checks", *arguments]
    return subprocess.run(
        command, cwd=TREE, capture_output=True, text=True, timeout=60, check=False
    )


# ---- what has passed with the same files and tools ----
@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stage, Path]:
    """A stage whose result follows from files and a tool, and the file with the tool's version."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    version = tmp_path / "version"
    version.write_text("1")
    one = replace(stage("known", "true"), files=("tests/checks/*.py",), tools=(f"cat {version}",))
    return one, version


def outcome_of(one: Stage) -> Outcome:
    return Outcome(one.name, " ".join(one.command), 0, 1.5, 1.0, False, False, ())


def test_a_stage_that_has_passed_is_known_until_a_file_or_a_tool_changes(
    known: tuple[Stage, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, version = known
    assert unchanged.earlier(one) is None
    unchanged.note([one], [outcome_of(one)], "1234")
    found = unchanged.earlier(one)
    assert found is not None and (found.commit, found.passed) == ("1234", True)
    assert unchanged.earlier(replace(one, command=("false",))) is None
    version.write_text("2")
    assert unchanged.earlier(one) is None
    version.write_text("1")
    assert unchanged.earlier(one) is not None
    fewer = [path for path in listing.files() if path.name != "runner.py"]
    monkeypatch.setattr(unchanged, "files", lambda: fewer)
    assert unchanged.earlier(one) is None


def test_a_stage_that_failed_or_that_follows_from_more_is_not_known(
    known: tuple[Stage, Path],
) -> None:
    one, _version = known
    unchanged.note([one], [replace(outcome_of(one), status=1)], "1234")
    assert unchanged.earlier(one) is None
    other = replace(one, files=())
    unchanged.note([other], [outcome_of(other)], "1234")
    assert unchanged.earlier(other) is None


@pytest.mark.parametrize("tier", TIERS)
def test_each_stage_is_a_target_of_the_makefile(tier: str) -> None:
    assert checks(tier, "--list").returncode == 0
    for one in TIERS[tier]:
        assert one.command[0] == "make"
        dry = subprocess.run(
            [*one.command, "-n"], cwd=TREE, capture_output=True, text=True, timeout=60, check=False
        )
        assert dry.returncode == 0, dry.stderr


def test_a_stage_that_does_not_exist_is_refused_and_no_stage_at_all() -> None:
    done = checks("gate", "--only", "tset")
    assert done.returncode == 2 and "no stage 'tset'" in done.stderr
    done = checks("gate", "--only", "demo", "--skip", "demo")
    assert done.returncode == 2 and "leave no stage" in done.stderr


def test_everything_has_each_stage_of_the_gate() -> None:
    names = {one.name for one in TIERS["gate"]} - {"xenlab"}
    assert names <= {one.name for one in TIERS["everything"]}


def test_everything_has_each_machine_of_the_lab_once() -> None:
    settings = [one.command[-1] for one in TIERS["everything"] if one.name.startswith("xenlab-")]
    kinds = [kind for setting in settings for kind in setting.split("--hypervisor ")[1:]]
    assert sorted(kind.strip() for kind in kinds) == sorted(parts.KINDS)
