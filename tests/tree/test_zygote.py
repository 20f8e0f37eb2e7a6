# SPDX-License-Identifier: GPL-2.0-or-later
"""A forked process of the zygote finds the same as an executed one, and ends in the same way."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import zygote
from tests.support.waiting import ready

TIMEOUT_S = 60.0
PROBE = [sys.executable, "-m", "tests.support.probe"]


def run(
    popen: type[subprocess.Popen[Any]], *arguments: str, given: str = "", **options: Any
) -> tuple[int, dict[str, Any], str]:
    """Return the exit status, what the process has found, and the end of its standard error."""
    with popen(
        [*PROBE, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **options
    ) as process:  # fmt: skip
        out, err = process.communicate(given, timeout=TIMEOUT_S)
    assert err.startswith("to standard error\n")
    return process.returncode, json.loads(out), err.splitlines()[-1]


def compare(*arguments: str, given: str = "", **options: Any) -> int:
    """Return the status with which both have ended."""
    executed = run(subprocess.Popen, *arguments, given=given, **options)
    forked = run(zygote.Popen, *arguments, given=given, **options)
    differences = {
        key: (value, forked[1][key])
        for key, value in executed[1].items()
        if forked[1][key] != value
    }
    assert differences == {}
    assert forked == executed
    return executed[0]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["return"], 0),
        (["status", "7"], 7),
        (["text"], 1),
        (["raise"], 1),
        (["killed"], -signal.SIGKILL),
    ],
)
def test_a_forked_process_finds_and_ends_as_an_executed_one(
    arguments: list[str], status: int
) -> None:
    assert compare(*arguments, given="some\ntext") == status


@pytest.mark.parametrize(
    "option",
    ["process_group", "start_new_session", "env", "no locale", "cwd", "pass_fds", "inherited"],
)
def test_an_option_means_the_same(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    cases: dict[str, dict[str, Any]] = {
        "process_group": {"process_group": 0},
        "start_new_session": {"start_new_session": True},
        "env": {"env": {**zygote.of_the_interpreter(os.environ), "ONLY": "this"}},
        "no locale": {"env": {"PATH": os.environ["PATH"], "ONLY": "this"}},
        "cwd": {"cwd": zygote.TREE.parent, "env": {**os.environ, "PYTHONPATH": str(zygote.TREE)}},
        "pass_fds": {"pass_fds": [writer, reader]},
        "inherited": {},
    }
    options = cases[option]
    if option == "inherited":
        monkeypatch.setenv("SET_LATER", "1")
        previous = os.umask(0o027)
    try:
        assert compare("return", **options) == 0
    finally:
        if option == "inherited":
            os.umask(previous)
        os.close(reader)
        os.close(writer)


def test_a_terminal_is_one() -> None:
    for popen in (subprocess.Popen, zygote.Popen):
        master, slave = pty.openpty()
        process = popen(
            [*PROBE, "return"], stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.DEVNULL
        )
        os.close(slave)
        shown = b""
        while not shown.endswith(b"\n"):
            assert ready(master, TIMEOUT_S)
            shown += os.read(master, 65536)
        assert process.wait(TIMEOUT_S) == 0
        os.close(master)
        assert [stream[-1] for stream in json.loads(shown)["streams"]] == [False, True, False]


def test_signals_reach_the_process_and_a_limit_of_time_is_kept() -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        with zygote.Popen(
            [*PROBE, "wait"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            assert process.poll() is None
            process.send_signal(sent)
            assert process.wait(TIMEOUT_S) == -sent


ENDS_FIRST = """
import os, signal, subprocess, sys
from tests.support import zygote

process = zygote.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
process.stdout.readline()
os.write(1, b"%d\\n" % process.pid)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_process_dies_with_the_one_that_asked_for_it() -> None:
    """The parent may be killed.  The zygote, which has the other end of standard error open, ends
    as well.
    """
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_FIRST, *PROBE, "wait"], cwd=zygote.TREE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE
    ) as asking:  # fmt: skip
        out, _err = asking.communicate(timeout=TIMEOUT_S)
    assert asking.returncode == -signal.SIGKILL
    # An orphan of that process: this process waits for orphans if it has a zygote itself; otherwise
    # another process does.
    process = os.pidfd_open(int(out)) if Path(f"/proc/{int(out)}").exists() else -1
    if process >= 0:
        assert ready(process, TIMEOUT_S)
        os.close(process)


def test_what_the_zygote_cannot_do_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    for environment in (None, dict(os.environ)):
        with zygote.Popen(
            [*PROBE, "return"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=environment, text=True,
        ) as process:  # fmt: skip
            assert "import time:" in process.communicate(timeout=TIMEOUT_S)[1]
    with zygote.Popen(
        [sys.executable, "-c", "print(__name__)"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.communicate(timeout=TIMEOUT_S)[0] == "__main__\n"
