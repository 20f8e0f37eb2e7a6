# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``watch`` follows, what ``list --watch`` shows, and how they end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click
import pytest

from migrate.cli import migrations
from migrate.cli.migrations import Answers
from migrate.errors import DaemonGoneError, MigrationError, UnknownMigrationError
from migrate.outcomes import RESCUED


def test_a_guest_that_comes_back_is_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, the end of the migration by which the guest had left this host was reported."""
    left: dict[str, Any] = {
        "id": "1" * 32,
        "domain": "web",
        "phase": "failed",
        "problem": "an earlier one",
    }
    comes: dict[str, Any] = {
        "id": "2" * 32,
        "domain": "web",
        "phase": "precopy",
        "problem": "",
        "outstanding": 0,
    }
    answers = [[left, comes], [comes], [comes | {"phase": "completed"}]]
    asked = []

    def ask(_sockets: object, **request: Any) -> Answers:
        asked.append(request["migration"])
        found = answers[len(asked) - 1]
        return Answers(found, tuple(Path(one["id"]) for one in found))

    monkeypatch.setattr(migrations, "ask_all", ask)
    monkeypatch.setattr(migrations, "WATCH_EVERY_S", 0)
    migrations.watch_command.main(["web"], standalone_mode=False)
    assert asked == ["web", "2" * 32, "2" * 32]
    assert capsys.readouterr().out == "web: completed\n"


def line(phase: str, problem: str = "", **more: Any) -> dict[str, Any]:
    found = {"id": "1" * 32, "domain": "web", "direction": "outgoing", "phase": phase}
    return {**found, "problem": problem, "outstanding": 0, "details": {}, **more}


class Daemons:
    """Stands for the daemons: each question takes the next answer."""

    def __init__(self, *answers: list[dict[str, Any]] | MigrationError):
        self._answers = list(answers)
        self.asked: list[tuple[Path, ...]] = []
        """The sockets of each question."""

    def ask(self, sockets: tuple[Path, ...], **request: Any) -> Answers:
        self.asked.append(sockets)
        if not self._answers:
            raise KeyboardInterrupt
        answer = self._answers.pop(0)
        if isinstance(answer, MigrationError):
            raise answer
        is_list = request["command"] == "list"
        paths = tuple(Path(one["direction"]) for one in answer)
        return Answers([{"migrations": answer}] if is_list else answer, paths)


def run(
    monkeypatch: pytest.MonkeyPatch, daemons: Daemons, command: click.Command, *arguments: str
) -> None:
    monkeypatch.setattr(migrations, "ask_all", daemons.ask)
    for name in ("WATCH_EVERY_S", "EVERY_S"):
        monkeypatch.setattr(migrations, name, 0)
    command.main(list(arguments), standalone_mode=False)


def test_events_are_lines_of_json_and_nothing_else_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [line("postcopy"), line("postcopy", direction="incoming")]
    daemons = Daemons(ends, ends, [line("completed"), line("completed", direction="incoming")])
    run(monkeypatch, daemons, migrations.watch_command, "web", "--json")
    output = capsys.readouterr()
    found = [json.loads(text) for text in output.out.splitlines()]
    assert output.err == ""
    for direction in ("outgoing", "incoming"):
        assert [one["event"] for one in found if one["direction"] == direction] == [
            "phase", "progress", "phase", "end",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "problem", "status"),
    [
        ("failed", "no memory", "web: failed: no memory"),
        (
            "failed",
            "cancelled by the operator",
            "web was not migrated: cancelled by the operator; the guest continues at the source",
        ),
        ("failed", RESCUED, f"web: rescued: {RESCUED}"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_migration_that_was_not_completed_is_an_error(
    monkeypatch: pytest.MonkeyPatch, phase: str, problem: str, status: str, options: list[str]
) -> None:
    daemons = Daemons([line(phase, problem)])
    with pytest.raises(MigrationError) as error:
        run(monkeypatch, daemons, migrations.watch_command, "web", *options)
    assert str(error.value) == status


LEFT = line("completed", id="2" * 32, started_at=200.0, strategy="hybrid")
"""The end of the migration by which a guest has left this host, after it came by another one."""
CAME = line("failed", "the link was lost", direction="incoming", started_at=100.0)


@pytest.mark.parametrize("answers", [[LEFT, CAME], [CAME, LEFT]])
def test_of_two_that_have_ended_the_newer_one_is_watched_and_shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: list[dict[str, Any]],
) -> None:
    run(monkeypatch, Daemons(answers), migrations.watch_command, "web")
    assert capsys.readouterr().out == "web: completed\n"
    run(monkeypatch, Daemons(answers), migrations.show_command, "web", "--json")
    assert [one["id"] for one in json.loads(capsys.readouterr().out)] == [LEFT["id"]]


@pytest.mark.parametrize("kind", [UnknownMigrationError, DaemonGoneError])
def test_the_daemon_that_has_the_migration_is_waited_for_when_it_is_restarted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[MigrationError],
) -> None:
    """The other daemon of the host runs meanwhile, and has another migration of the guest.  The one
    that is restarted does not run, or has ended in the middle of its answer.
    """
    daemons = Daemons(
        [CAME, LEFT | {"phase": "postcopy"}],
        kind("no answer"),
        [LEFT | {"phase": "completing"}],
        [LEFT],
    )
    run(monkeypatch, daemons, migrations.watch_command, "web")
    assert daemons.asked == [(), (), (Path("outgoing"),), ()]
    assert capsys.readouterr().out == "web: completed\n"


def test_a_migration_that_no_daemon_has_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    daemons = Daemons(UnknownMigrationError("there is no such migration"))
    with pytest.raises(MigrationError, match="no such migration"):
        run(monkeypatch, daemons, migrations.watch_command, "web")


def test_both_ends_of_one_migration_are_shown_the_source_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The destination has begun a moment later."""
    both = [LEFT, LEFT | {"direction": "incoming", "started_at": 201.0}, CAME]
    run(monkeypatch, Daemons(both), migrations.show_command, "web", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert [one["direction"] for one in shown] == ["outgoing", "incoming"]


def test_of_migrations_whose_starts_are_not_known_all_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [LEFT | {"started_at": None}, CAME | {"started_at": None}]
    run(monkeypatch, Daemons(answers), migrations.show_command, "web", "--json")
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_all_migrations_are_watched_while_a_daemon_is_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = MigrationError("no daemon")
    daemons = Daemons([line("postcopy")], gone, gone, [line("completed")])
    with pytest.raises(click.exceptions.Abort):
        run(monkeypatch, daemons, migrations.list_command, "--watch", "--json")
    output = capsys.readouterr()
    assert [json.loads(text)["event"] for text in output.out.splitlines()] == [
        "phase", "progress", "phase", "end",
    ]  # fmt: skip
    assert output.err.split("\n") == ["xen-postcopy: no daemon", "", ""]  # click ends with a line


def test_without_a_terminal_the_table_is_printed_after_each_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemons = Daemons([line("precopy")], [line("precopy")], [line("completed")])
    with pytest.raises(click.exceptions.Abort):
        run(monkeypatch, daemons, migrations.list_command, "--watch")
    rows = [text.split() for text in capsys.readouterr().out.splitlines()]
    assert [row[3] for row in rows if row] == ["PHASE", "precopy", "PHASE", "completed"]


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_active_leaves_out_what_has_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], watch: list[str]
) -> None:
    ended = line("completed", id="2" * 32, domain="mail")
    daemons = Daemons([ended, line("precopy")])
    with pytest.raises(click.exceptions.Abort) if watch else contextlib.nullcontext():
        run(monkeypatch, daemons, migrations.list_command, "--active", *watch)
    rows = [text.split() for text in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows if row] == ["DOMAIN", "web"]


def test_active_has_the_events_of_a_migration_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = line("completed", id="2" * 32, domain="mail")
    daemons = Daemons([ended, line("precopy")], [ended, line("completed")])
    with pytest.raises(click.exceptions.Abort):
        run(monkeypatch, daemons, migrations.list_command, "--active", "--watch", "--json")
    found = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert {one["domain"] for one in found} == {"web"} and found[-1]["event"] == "end"


def test_no_daemon_at_the_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MigrationError, match="no daemon"):
        run(monkeypatch, Daemons(MigrationError("no daemon")), migrations.list_command, "--watch")


@pytest.mark.parametrize(
    ("command", "arguments", "facts"),
    [
        (migrations.cancel_command, ["web"], {"done": "cancel"}),
        (migrations.reconnect_command, ["web"], {"done": "reconnect"}),
        (
            migrations.decide_command,
            ["web", "here", "--yes"],
            {"done": "decide", "where": "here"},
        ),
    ],
)
def test_what_was_done_is_printed_as_json_on_standard_output(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: click.Command,
    arguments: list[str],
    facts: dict[str, str],
) -> None:
    known = line("interrupted", known="it has the guest")
    run(monkeypatch, Daemons(*[[known]] * 3), command, *arguments, "--json")
    output = capsys.readouterr()
    assert json.loads(output.out) == {"migration": "web", **facts}
    assert "decided" not in output.err and "cancelled" not in output.err


DAMAGE: tuple[dict[str, Any], ...] = (
    {"started_at": 1e300}, {"ended_at": 1e300}, {"elapsed_s": "x"}, {"elapsed_s": 1e308},
    {"outstanding": 10**400}, {"phases": [{"phase": "precopy"}]}, {"phases": 7},
    {"pages_done": "1", "pages_total": []}, {"bytes_per_s": {}}, {"quiet_s": "x"},
    {"io_fails_in_s": "soon", "problem": "lost"}, {"checkpoints": {"kept": {}}},
    {"details": {"downtime_s": "x", "precopy": 7, "fault_latency_us": {"max": "x"}}},
    {"details": {"vcpu_block_s": {"0": None}, "options": []}}, {"unknown": [7]},
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_of_a_history_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: dict[str, Any]
) -> None:
    """A daemon lists what its history has; the types of a few keys are checked there."""
    lines = [line("completed", **damage), line("failed", "no memory", id="2" * 32)]
    for command in (migrations.list_command, migrations.show_command):
        run(monkeypatch, Daemons(lines), command, *(["web"] if "show" in str(command.name) else []))
        output = capsys.readouterr()
        assert "1" * 8 in output.out and "no memory" in output.out
    run(monkeypatch, Daemons(lines), migrations.list_command, "--json")
    assert json.loads(capsys.readouterr().out) == lines
