# SPDX-License-Identifier: GPL-2.0-or-later
"""The results of a run: read from the stages' JUnit files, shown as tables, kept as one JSON
record.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SLOWEST = 20


@dataclass(frozen=True)
class TestResult:
    """One test, as pytest's JUnit file has it."""

    __test__ = False  # this is not a test

    name: str
    result: str
    """``passed``, ``failed``, ``error`` or ``skipped``."""
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The result of one stage."""

    name: str
    command: str
    status: int
    """The exit status; negative for a signal."""
    seconds: float
    cpu_seconds: float
    timed_out: bool
    has_tests: bool
    tests: tuple[TestResult, ...]
    commit: str = ""
    """The commit on which the stage ran; empty: that of the record."""
    before: tuple[str, ...] = ()
    """The verdicts of the stage in earlier runs that this run continues."""
    figures: tuple[str, ...] = ()
    """The last lines of the output, of a stage that prints figures."""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def verdict(self) -> str:
        if self.timed_out:
            return "out of time"
        if self.status:
            return f"failed (exit status {self.status})"
        if self.count("failed", "error"):
            return "failed (tests failed, though the exit status is 0)"
        if self.has_tests and not self.count("passed"):
            return "failed (no test has passed)"
        return "passed"

    def count(self, *results: str) -> int:
        return sum(test.result in results for test in self.tests)


def junit_results(directory: Path) -> tuple[TestResult, ...]:
    """Return the tests of every JUnit file in a folder.

    A file that cannot be read, such as that of a run that was killed, counts as one error.
    """
    found: list[TestResult] = []
    paths = sorted(directory.glob("*.xml"))
    for path in paths:
        # One stage may run the same test in several places, each with a file of its own.
        place = f"{path.stem}: " if len(paths) > 1 else ""
        try:
            found += [
                _result(place, case) for case in ElementTree.parse(path).getroot().iter("testcase")
            ]
        except (ElementTree.ParseError, ValueError, LookupError, OSError):
            found.append(TestResult(path.name, "error", 0.0))
    return tuple(found)


def _result(place: str, case: ElementTree.Element) -> TestResult:
    kinds = {child.tag for child in case}
    words = (("failure", "failed"), ("error", "error"), ("skipped", "skipped"))
    result = next((word for tag, word in words if tag in kinds), "passed")
    name = f"{place}{case.get('classname', '')}::{case.get('name', '')}"
    return TestResult(name, result, float(case.get("time", "0")))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _machine() -> dict[str, Any]:
    """Return the properties of the machine on which the figures depend."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [
        line.partition(":")[2].strip()
        for line in cpuinfo.splitlines()
        if line.startswith("model name")
    ]
    release = platform.freedesktop_os_release()
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
        "system": release.get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


class Record:
    """The whole run of a tier, from its beginning."""

    def __init__(self, tier: str, started: str):
        """``started``: the time of day in UTC, as ISO 8601 has it."""
        self._head = {
            "tier": tier,
            "started": started,
            "commit": _output("git", "rev-parse", "HEAD"),
            "uncommitted_changes": bool(_output("git", "status", "--porcelain")),
            "machine": _machine(),
        }

    @property
    def commit(self) -> str:
        return str(self._head["commit"])

    @property
    def name(self) -> str:
        """Return the name of its file: the date, the tier, and the commit."""
        head = self._head
        return f"{str(head['started'])[:10]}-{head['tier']}-{str(head['commit'])[:10]}.json"

    def continues(self, head: dict[str, Any]) -> bool:
        """Whether another record is of the same tier and product, and neither has changes that are
        not committed.  Commits that differ only in tests and documents have the same product.
        """
        if head.get("tier") != self._head["tier"] or head.get("uncommitted_changes"):
            return False
        compared = ("git", "diff", "--quiet", str(head.get("commit")), str(self._head["commit"]))
        same = subprocess.run(
            [*compared, "--", ".", ":!tests", ":!docs", ":!*.md"],
            stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        return not self._head["uncommitted_changes"] and same.returncode == 0

    def write(self, path: Path, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Write the record, with one line for each test and for each line of figures, so that two
        records can be compared line by line.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        passed = all(outcome.passed for outcome in outcomes)
        head = {**self._head, "passed": passed, "seconds": round(seconds, 1)}
        lines = [json.dumps(head)[:-1] + ', "stages": [']
        for number, outcome in enumerate(outcomes):
            stage = asdict(outcome)
            tests, figures = stage.pop("tests"), stage.pop("figures")
            lines.append(json.dumps(stage)[:-1] + ', "figures": [')
            lines.append(",\n".join(json.dumps(line) for line in figures))
            lines.append('], "tests": [')
            lines.append(",\n".join(json.dumps(list(test.values())) for test in tests))
            lines.append("]}" + "," * (number + 1 < len(outcomes)))
        lines.append("]}\n")
        path.write_text("\n".join(line for line in lines if line))


def read(path: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Return the head of a record, and its outcomes.  Raises ``OSError``, or ``ValueError`` if the
    file is no record.
    """
    try:
        head = json.loads(path.read_text())
        outcomes = [
            Outcome(
                **{
                    **stage,
                    "tests": tuple(TestResult(*test) for test in stage["tests"]),
                    "before": tuple(stage.get("before", ())),
                    "figures": tuple(stage.get("figures", ())),
                }
            )
            for stage in head.pop("stages")
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a tier: {error!r}") from error
    return head, outcomes


def continued(earlier: Sequence[Outcome], commit: str, now: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of two runs, of which the earlier one was of ``commit``: the later
    outcome of each stage.
    """
    before = {one.name: (*one.before, one.verdict) for one in earlier}
    names = {one.name for one in now}
    return [
        *(replace(one, commit=one.commit or commit) for one in earlier if one.name not in names),
        *(replace(one, before=before.get(one.name, ())) for one in now),
    ]


def figures(outcomes: Sequence[Outcome]) -> str:
    """Return the outputs of the stages that print figures, each below its name."""
    return "\n\n".join(
        "\n".join((f"{one.name}:", *(f"    {line}".rstrip() for line in one.figures)))
        for one in outcomes
        if one.figures
    )


def tables(outcomes: Sequence[Outcome]) -> str:
    """Return the tables: stages in the order in which they ended, then the slowest tests, then the
    number of passed tests.
    """
    rows = [
        f"{'stage':<14} {'seconds':>8} {'CPU':>8} {'passed':>7} {'failed':>7} {'skipped':>8}  "
        "result"
    ]
    for one in outcomes:
        counts = [
            one.count(*results) if one.tests else ""
            for results in (("passed",), ("failed", "error"), ("skipped",))
        ]
        before = f" (before: {', '.join(one.before)})" if one.before else ""
        before += f" (on {one.commit[:10]})" if one.commit else ""
        rows.append(
            f"{one.name:<14} {one.seconds:>8.1f} {one.cpu_seconds:>8.1f} {counts[0]:>7} "
            f"{counts[1]:>7} {counts[2]:>8}  {one.verdict}{before}"
        )
    tests = [(test, one.name) for one in outcomes for test in one.tests]
    tests.sort(key=lambda found: -found[0].seconds)
    if tests:
        rows += ["", f"The {min(SLOWEST, len(tests))} slowest tests:"]
        rows += [f"{test.seconds:>8.1f} s  {stage}  {test.name}" for test, stage in tests[:SLOWEST]]
    failed = [(test, stage) for test, stage in tests if test.result in ("failed", "error")]
    if failed:
        rows += ["", "Failed:", *(f"  {stage}  {test.name}" for test, stage in failed)]
    passed, failures, skipped = (
        sum(one.count(*results) for one in outcomes)
        for results in (("passed",), ("failed", "error"), ("skipped",))
    )
    # If a stage failed without a test that failed, it counts as one failure.
    failures += sum(not one.passed and not one.count("failed", "error") for one in outcomes)
    rows += ["", f"{passed} passed, {failures} failed, {skipped} skipped"]
    return "\n".join(rows)
