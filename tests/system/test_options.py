# SPDX-License-Identifier: GPL-2.0-or-later
"""Every option of every command, with values at and beyond its limits, gives an exit status and a
sentence, and never a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate import cli
from migrate.errors import MigrationError
from migrate.units import parse_address, parse_size
from tests.support.thorough import examples

NUMBERS = (
    "0", "-0", "1", "-1", "2", "0.5", "64", "65", "1000", "4096", "nan", "-nan", "inf", "-inf",
    "1e400", "1e-400", "0x10", "1_0", " 1", "", "½", "²", "٣", "9" * 19, "9" * 30, "9" * 5000,
    "-" + "9" * 30, "4K", "1M", "1.5GiB", "9" * 400 + "T", "1E", "-5M",
)  # fmt: skip
TEXTS = (
    "x", "guest", "a" * 300, "\x1b[31mred", "a\nb", "é", "\udcff", "[::1", "[::1]", "[::1]:0",
    "[::1]x", "::1", "host:", ":1", "host:99999", "host:-1", "host:²", "a" * 64 + ".b", "[host]",
    "1:2:3", "here", "elsewhere", "postcopy", "hybrid", "random",
)  # fmt: skip
PATHS = (
    "/proc", ".", "file", "none/file", "fifo", "folder", "/dev/null", "/dev/zero", "/dev/full",
    "/proc/self/mem", "/proc/new", "p" * 300, "d/" * 60 + "s", "locked/file", "image",
)  # fmt: skip
STATUSES = {0, 1, 2, 130}


class Started(MigrationError):
    """The options of a command were accepted."""


def commands() -> Iterator[tuple[str, ...]]:
    for name in cli.COMMANDS:
        command = cli.cli.get_command(click.Context(cli.cli), name)
        if isinstance(command, click.Group):
            yield from ((name, inner) for inner in command.commands)
        else:
            yield (name,)


def parameters(path: tuple[str, ...]) -> list[click.Parameter]:
    command: Any = cli.cli.get_command(click.Context(cli.cli), path[0])
    for name in path[1:]:
        command = command.commands[name]
    return list(command.params)


def values(parameter: click.Parameter) -> st.SearchStrategy[str]:
    """Return values for an option.  Any text is possible, but most are of the option's kind."""
    if isinstance(parameter.type, click.Choice):
        return st.one_of(st.sampled_from(list(parameter.type.choices)), st.sampled_from(TEXTS))
    if isinstance(parameter.type, click.Path):
        return st.sampled_from(PATHS)
    if parameter.type.name in ("size", "number", "integer"):
        return st.sampled_from(NUMBERS)
    return st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.sampled_from(PATHS))


@st.composite
def command_lines(draw: Callable[..., Any]) -> list[str]:
    path = draw(st.sampled_from(sorted(commands())))
    words = list(path)
    for parameter in parameters(path):
        if isinstance(parameter, click.Argument) and (parameter.required or draw(st.booleans())):
            words += [*([] if "--" in words else ["--"]), draw(values(parameter))]
    options = []
    for parameter in parameters(path):
        if isinstance(parameter, click.Option) and (
            parameter.required or draw(st.integers(0, 3)) == 0
        ):
            options.append(parameter.opts[-1])
            if not parameter.is_flag:
                options.append(draw(values(parameter)))
    at = len(path)
    return [*words[:at], *options, *words[at:]]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start nothing and wait for nothing; files are made in this folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "image").write_bytes(bytes(1 << 20))

    def started(*_arguments: Any, **_options: Any) -> NoReturn:
        raise Started("started")

    monkeypatch.setattr("migrate.cli.loopback.loopback_world", started)
    monkeypatch.setattr("migrate.cli.daemons.run", started)
    monkeypatch.setattr("migrate.cli.peer.try_all", started)
    monkeypatch.setattr("migrate.cli.daemons.STATE_DIRECTORY", tmp_path / "state")
    monkeypatch.setattr("migrate.cli.migrate.STARTING_S", 0)
    monkeypatch.setattr("migrate.cli.migrations.STARTING_S", 0)
    monkeypatch.setattr("migrate.cli.adjust.STARTING_S", 0)
    monkeypatch.setattr("migrate.cli.evacuate.run.STARTING_S", 0)
    monkeypatch.setattr("xenbackend.simulated.rpc.STARTING_S", 0)


def run(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xen-postcopy", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


@pytest.mark.usefixtures("_folder")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(400))
@given(command_lines())
def test_any_options_give_an_exit_status(words: list[str]) -> None:
    assert run(*words) in STATUSES


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (["loopback", "--write-share", "nan"], 2, "'nan' is not a number from 0 to 1"),
        (["loopback", "--checkpoint-every", "nan"], 2, "not a number from 0.001"),
        (["loopback", "--rate", "9" * 30], 2, "is not a number from"),
        (["loopback", "--rate", "9" * 5000], 2, "is not a valid integer"),
        (["loopback", "--memory", "9" * 400], 2, "not a size that there can be"),
        (["loopback", "--memory", "512G"], 1, "available: choose a smaller --memory"),
        (["loopback", "--image", "fifo"], 2, "image fifo is not a regular file"),
        (["loopback", "--image", "folder"], 2, "is not a regular file"),
        (["loopback", "--image", "/dev/zero"], 2, "is not a regular file"),
        (["loopback", "--json", "/proc/new"], 2, "cannot be written"),
        (["loopback", "--json", "folder"], 2, "is a directory"),
        (["migrate", "guest", "host", "--socket", "s" * 108], 1, "the path has 108 bytes"),
        (["simulated-guest", "list", "--host", "s" * 108], 1, "the path has 108 bytes"),
        (["receiver", "--config", "/dev/zero"], 1, "not a file with a configuration"),
        (["receiver", "--config", "fifo"], 1, "not a file with a configuration"),
        (
            ["receiver", "--listen", "8213"],
            2,
            "address '8213': HOST, HOST:PORT or [IPV6]:PORT; this is a port",
        ),
        (["migrate", "guest", "8213"], 2, "address '8213': HOST, HOST:PORT"),
        (["migrate", "guest", "host:x"], 2, "address 'host:x': HOST, HOST:PORT"),
        (["receiver", "--listen", "[::1"], 2, "a bracket is not closed"),
        (["receiver", "--listen", "[host]"], 2, "brackets are for IPv6 addresses"),
        (["receiver", "--listen", "host:65536"], 2, "a port is a number of at most 65535"),
        (["migrate", "\x1b[31m", "host", "--socket", "none\x1b[0m"], 1, "none\ufffd[0m"),
        (
            ["migrate", "guest", "host", "--json", "fifo", "--socket", "none"],
            1,
            "is the daemon running?",
        ),
        (
            ["migrate", "guest", "host", "--strategy", "precopy", "--protect"],
            2,
            "has nothing to protect",
        ),
        (["simulated-host", "--socket", "s", "--memory", "1"], 2, "--memory: at least a page"),
        (["loopback", "--json", "-", "--report", "-"], 2, "both write to standard output"),
        (["loopback", "--json", "result", "--report", "result"], 2, "both write to result"),
        (["loopback", "--balloon-back"], 2, "--balloon-back: only with --balloon"),
        (
            ["preflight", "guest", "--config", "none", "--simulated", "none"],
            2,
            "--config: not for DOMAIN, except with --peer",
        ),
        (["init", "host1", "host2", "--renew", "--force"], 2, "--renew and --force: one of them"),
        (["dance"], 2, "No such command 'dance'"),
        (["migrate", "guest", "host", "--strategy", "\x1b[31m"], 2, r"'\x1b[31m' is not one of"),
    ],
)
def test_each_mistake_has_its_own_reason(
    words: list[str], status: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == status
    written = capsys.readouterr()
    assert what in written.err.replace(str(Path.cwd()) + "/", "")
    assert written.out == "" and "\x1b" not in written.err
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["fifo", "folder", "image"]


def test_a_configuration_has_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2 << 20)
    assert run("receiver", "--config", str(tmp_path / "large")) == 1
    assert "more than a configuration has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", ("host", 1)),
        ("host:2", ("host", 2)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("::1", ("::1", 1)),
        ("[::1]", ("::1", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("fe80::1%eth0", ("fe80::1%eth0", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, 1) == address


@given(st.text() | st.sampled_from((*TEXTS, *NUMBERS)))
def test_any_text_is_an_address_and_a_size_or_refused(text: str) -> None:
    try:
        host, port = parse_address(text, 1)
        assert host and 0 <= port <= 65535
    except MigrationError as error:
        assert len(str(error)) < 300
    try:
        assert 0 <= parse_size(text) < 2**63
    except ValueError as error:
        assert len(str(error)) < 300
