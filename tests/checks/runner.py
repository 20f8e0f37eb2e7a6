# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs stages beside each other, as many as the machine has cores for, each with a log and a
limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.checks.record import Outcome, junit_results
from tests.checks.stages import Stage
from tests.xenlab.cache import directory

POLL_S = 0.1
STILL_RUNNING_EVERY_S = 60.0
LAST_BYTES = 64 * 1024
"""How much is shown of the log of a failed stage, and kept of figures; a log may be of any size."""
MARK = "XEN_POSTCOPY_STAGE"
"""The environment variable by which every process of a stage is found.  It has the stage, the
runner, and the runner's start.
"""

CACHES = {"MYPY_CACHE_DIR": str(directory().parent / "mypy")}
"""Where a tool keeps what it would make again in a new checkout."""


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    junit: Path
    started: float
    timed_out: bool = False

    def kill(self) -> None:
        """End all processes that the stage started, whatever group or session they are in."""
        while pids := [pid for pid, mark in marks().items() if mark == self.mark]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)

    def ended(self) -> Outcome | None:
        """The outcome, or None while the stage runs."""
        seconds = time.monotonic() - self.started
        if seconds > self.stage.limit_s and not self.timed_out:
            self.timed_out = True
            self.kill()
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.kill()  # the stage may have left processes running
        return Outcome(
            self.stage.name,
            " ".join(self.stage.command),
            self.process.returncode,
            round(seconds, 1),
            round(usage.ru_utime + usage.ru_stime, 1),
            self.timed_out,
            self.stage.has_tests,
            junit_results(self.junit),
            figures=tuple(_end_of(self.log).splitlines()) if self.stage.prints_figures else (),
        )


def marks() -> dict[int, str]:
    """Return the processes of stages, of any runner, that have not ended."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for entry in (process / "environ").read_bytes().split(b"\0"):
                if entry.startswith(MARK.encode() + b"="):
                    found[int(process.name)] = entry.decode(errors="replace").partition("=")[2]
    return found


def _identity(pid: int) -> str:
    """Identify a process by its number and the time of its start, which distinguishes it from a
    later process with the same number.  Empty if the process has ended.
    """
    try:
        return f"{pid} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return ""


def end_orphans() -> None:
    """End the processes that killed runners have left."""
    for pid, mark in marks().items():
        runner = mark.partition(" ")[2]
        if runner and _identity(int(runner.split()[0])) != runner:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _printable(text: str) -> str:
    """Return the text without characters that control a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


class Runner:
    """Starts stages in their order.  ``directory`` gets a log and the JUnit files of each stage."""

    def __init__(self, directory: Path, *, cores: int, show: Callable[[str], None]):
        self._directory, self._cores, self._show = directory, cores, show
        self.interrupted_by = 0
        """The signal that a handler has received.  It ends the stages, and the run with exit status
        128 + signal.
        """
        self.outcomes: list[Outcome] = []
        """Of the stages that have ended, in that order; also after an interruption."""
        self._running: list[_Running] = []
        self._runner = _identity(os.getpid())

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages.

        A stage that fails does not stop the others, because a report of all stages is worth more
        than the minutes.  An interruption ends the running stages: see ``interrupted_by``.
        """
        waiting, outcomes = list(stages), self.outcomes
        shown = time.monotonic()
        try:
            while waiting or self._running:
                if self.interrupted_by:
                    sys.exit(128 + self.interrupted_by)
                while waiting and self._has_room_for(waiting[0]):
                    failed = self._start(waiting.pop(0))
                    outcomes += [failed] if failed else []
                for one in list(self._running):
                    outcome = one.ended()
                    if outcome is not None:
                        self._running.remove(one)
                        outcomes.append(outcome)
                        self._report(outcome, one.log)
                        shown = time.monotonic()
                if time.monotonic() - shown > STILL_RUNNING_EVERY_S:
                    shown = time.monotonic()
                    self._show(
                        "running: "
                        + ", ".join(
                            f"{one.stage.name} ({shown - one.started:.0f} s)"
                            for one in self._running
                        )
                    )
                time.sleep(POLL_S)
        finally:
            for one in self._running:
                one.kill()
                one.process.wait()

    def _has_room_for(self, stage: Stage) -> bool:
        busy = sum(min(one.stage.cores, self._cores) for one in self._running)
        return busy + min(stage.cores, self._cores) <= self._cores

    def _start(self, stage: Stage) -> Outcome | None:
        """Start a stage.  Returns the outcome of a stage that cannot be started."""
        log, junit = self._directory / f"{stage.name}.log", self._directory / stage.name
        command = " ".join(stage.command)
        junit.mkdir(parents=True)
        self._show(f"{stage.name}: {command}")
        mark = f"{stage.name} {self._runner}"
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    stage.command, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**CACHES, **os.environ, "JUNIT": str(junit.resolve()), MARK: mark},
                    process_group=0,
                )  # fmt: skip
        except OSError as error:
            self._show(f"{stage.name}: cannot be started: {error}")
            return Outcome(stage.name, command, 127, 0.0, 0.0, False, stage.has_tests, ())
        self._running.append(_Running(stage, process, mark, log, junit, time.monotonic()))
        return None

    def _report(self, outcome: Outcome, log: Path) -> None:
        if not outcome.passed:
            self._show(f"---- {outcome.name}: {log} ----\n{_end_of(log)}\n----")
        self._show(f"{outcome.name}: {outcome.verdict} after {outcome.seconds:.0f} s")


def _end_of(log: Path) -> str:
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LAST_BYTES))
            return _printable(file.read().decode(errors="replace"))
    except OSError as error:
        return f"the log cannot be read: {error.strerror}"
