# SPDX-License-Identifier: GPL-2.0-or-later
"""The names that a shell completes, from daemons that answer, refuse, hang or do not run."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from migrate.cli import cli, names
from migrate.control.client import SOCKETS
from tests.support.waiting import WAIT_S

HANGS: Any = object()
UNKNOWN = {"event": "error", "message": "unknown command 'domains'"}
ARGUMENTS = (
    "migrate", "estimate", "preflight", "evacuate", "show", "report", "watch", "postcopy-now",
    "set", "pause", "resume", "cancel", "reconnect", "decide",
)  # fmt: skip
"""The commands of which a shell completes a name."""


def line(number: int, domain: str, phase: str = "precopy", **more: str) -> dict[str, str]:
    found = {"id": f"{number}" * 32, "domain": domain, "direction": "outgoing", "phase": phase}
    return found | more


def listed(*lines: dict[str, str]) -> dict[str, Any]:
    return {"event": "result", "migrations": lines}


def domains(*found: str) -> dict[str, Any]:
    return {"event": "result", "domains": [{"name": name, "state": "running"} for name in found]}


@contextlib.contextmanager
def answering(path: Path, answer: Any) -> Iterator[None]:
    """Run a daemon at this path that gives the same answer to each request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    connection, _address = listener.accept()
                    with connection:
                        connection.recv(65536)
                        if answer is HANGS:
                            connection.recv(65536)  # until the client has gone
                        else:
                            connection.sendall(json.dumps(answer).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the daemons' sockets."""
    monkeypatch.setenv(SOCKETS, str(tmp_path))
    return tmp_path


def completed(*words: str) -> list[str]:
    """Return what a shell completes the last word to."""
    *before, last = words
    shell = ShellComplete(cli, {}, "xen-postcopy", "_XEN_POSTCOPY_COMPLETE")
    return [found.value for found in shell.get_completions(before, last)]


def test_migrations_under_way_of_both_daemons_are_completed(folder: Path) -> None:
    sender = listed(line(1, "web"), line(2, "done", "completed"), line(3, "mail", "interrupted"))
    receiver = listed(line(4, "worker", "postcopy", direction="incoming"), line(5, "evil\nplain,x"))
    with (
        answering(folder / "sender.sock", sender),
        answering(folder / "receiver.sock", receiver),
    ):
        assert completed("cancel", "") == ["web", "mail", "worker"]
        assert completed("cancel", "w") == ["web", "worker"]
        assert completed("pause", "w") == ["web"]  # only the sender is asked
        for command in ("show", "report"):
            assert completed(command, "") == ["web", "done", "mail", "worker"]
        assert completed("watch", "d") == []


def test_an_identifier_is_completed_where_no_name_fits(folder: Path) -> None:
    with answering(folder / "sender.sock", listed(line(7, "web"), line(8, "8-ball"))):
        assert completed("watch", "777") == ["7" * 8]
        assert completed("watch", "8") == ["8-ball"]


def test_of_several_migrations_of_a_guest_the_newest_is_described(folder: Path) -> None:
    both = listed(line(1, "web", "failed"), line(2, "web", "postcopy"))
    with answering(folder / "sender.sock", both):
        shell = ShellComplete(cli, {}, "xen-postcopy", "_XEN_POSTCOPY_COMPLETE")
        (found,) = shell.get_completions(["show"], "w")
    assert (found.value, found.help) == ("web", "outgoing, postcopy")


def test_the_daemon_that_is_named_is_asked(folder: Path, tmp_path: Path) -> None:
    with answering(tmp_path / "other", listed(line(1, "other"))):
        for command in ("show", "pause"):
            assert completed(command, "--socket", "other", "") == ["other"]


@pytest.mark.parametrize(
    "words", [("migrate",), ("estimate",), ("preflight",), ("evacuate", "there", "--guest")]
)
def test_domains_are_completed(folder: Path, words: tuple[str, ...]) -> None:
    with answering(folder / "sender.sock", domains("web", "worker", "mail")):
        assert completed(*words, "w") == ["web", "worker"]


@pytest.mark.parametrize("answer", [None, HANGS, UNKNOWN])
def test_a_daemon_without_an_answer_in_time_costs_only_its_names(
    folder: Path, answer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(names, "ANSWER_S", 0.05)
    with contextlib.ExitStack() as daemons:
        daemons.enter_context(answering(folder / "receiver.sock", listed(line(1, "web"))))
        if answer is not None:
            daemons.enter_context(answering(folder / "sender.sock", answer))
        assert completed("show", "") == ["web"]
        assert completed("migrate", "") == []
    assert capfd.readouterr() == ("", "")


def test_nothing_is_imported_that_a_shell_would_wait_for() -> None:
    code = (
        "import sys, click\nfrom migrate.cli import cli\n"
        f"for name in {ARGUMENTS}:\n    assert cli.get_command(click.Context(cli), name)\n"
        "print(*{'numpy', 'trio', 'msgpack', 'cffi', 'cryptography'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=WAIT_S
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
