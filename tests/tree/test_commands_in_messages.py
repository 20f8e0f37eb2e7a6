# SPDX-License-Identifier: GPL-2.0-or-later
"""A command of xen-postcopy in a message can be pasted: its subcommand, arguments and options are
complete.

A message is a string of the program that is not a docstring.  A command is what stands between
backticks there, or in parentheses, and begins with ``xen-postcopy``.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from migrate.cli import cli
from tests.tree.listing import FOLDERS, TREE, files

COMMAND = re.compile(r"`xen-postcopy ([^`]*)`|\(xen-postcopy ([^)`,]*)[,)]")
NAMED = {"init", "estimate", "migrate", "show", "simulated-host"}
"""Commands that messages name without an argument, as a program that does something."""


def messages(path: Path) -> Iterator[str]:
    """Yield the strings of a module.  Each value in a string is replaced by a word."""
    done: set[ast.AST] = set()
    for node in ast.walk(ast.parse((TREE / path).read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            done.add(node.value)  # a docstring
        elif isinstance(node, ast.JoinedStr):
            done.update(node.values)
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "web" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in done:
            yield node.value


def commands() -> list[tuple[str, str]]:
    return sorted(
        {
            (str(path), found[1] or found[2])
            for path in files()
            if path.suffix == ".py" and path.parts[0] in FOLDERS
            for message in messages(path)
            for found in COMMAND.finditer(message)
        }
    )


@pytest.mark.parametrize(("path", "command"), commands())
def test_a_command_in_a_message_can_be_pasted(path: str, command: str) -> None:
    if command in NAMED:
        return
    with click.Context(cli) as above:
        _name, found, arguments = cli.resolve_command(above, shlex.split(command))
        assert found is not None
        found.make_context(command, arguments, parent=above)  # raises UsageError


def test_the_commands_are_found() -> None:
    found = {command for _path, command in commands()}
    assert {"decide web elsewhere", "list", "init --renew"} <= found
