# SPDX-License-Identifier: GPL-2.0-or-later
"""A command of xen-postcopy in a message can be pasted: its subcommand, arguments and options are
complete, and the name of a guest is one word of it.

A message is a string of the program that is not a docstring.  A command is made by
:func:`migrate.units.command`, or stands between backticks, or in parentheses, and begins with
``xen-postcopy``.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import click
import pytest

from migrate.cli import cli
from tests.tree.listing import FOLDERS, TREE, files

COMMAND = re.compile(r"`xen-postcopy ([^`]*)`|\(xen-postcopy ([^)`,]*)[,)]")
NAMED = {(name,) for name in ("init", "estimate", "migrate", "show", "simulated-host")}
"""Commands that messages name without an argument, as a program that does something."""

MAKERS = {"command": 0, "command_at": 1}
"""The functions that make a command, with the number of arguments before its first word."""
GUEST = "my guest"
"""Any value in a message, such as the name of a guest, which may have a space."""


def words_of(call: ast.Call) -> tuple[str, ...]:
    """Return the words of a command that one of :data:`MAKERS` makes."""
    first = MAKERS[ast.unparse(call.func)]
    arguments = [arg for arg in call.args[first:] if not isinstance(arg, ast.Starred)]
    return tuple(str(arg.value) if isinstance(arg, ast.Constant) else GUEST for arg in arguments)


def filled(message: ast.JoinedStr) -> str:
    """Return a message with :data:`GUEST` for each value, quoted where the message quotes it."""
    words = ""
    for part in message.values:
        if isinstance(part, ast.FormattedValue):
            is_quoted = ast.unparse(part.value).startswith("shlex.quote(")
            words += shlex.quote(GUEST) if is_quoted else GUEST
        else:
            words += str(ast.literal_eval(part))
    return words


def messages(tree: ast.AST) -> Iterator[str]:
    done: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            done.add(node.value)  # a docstring
        elif isinstance(node, ast.JoinedStr):
            done.update(node.values)
            yield filled(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in done:
            yield node.value


def parsed() -> Iterator[tuple[Path, ast.AST]]:
    for path in files():
        if path.suffix == ".py" and path.parts[0] in FOLDERS:
            yield path, ast.parse((TREE / path).read_text())


def commands_of(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield the commands in the messages of a module, each as its words."""
    for node in ast.walk(tree):
        is_made = isinstance(node, ast.Call) and ast.unparse(node.func) in MAKERS
        if is_made and (words := words_of(cast(ast.Call, node))):
            yield words
    for message in messages(tree):
        for found in COMMAND.finditer(message):
            yield tuple(shlex.split(found[1] or found[2]))


def commands() -> list[tuple[str, tuple[str, ...]]]:
    return sorted({(str(path), words) for path, tree in parsed() for words in commands_of(tree)})


def parse(words: tuple[str, ...]) -> None:
    """Raises :class:`click.UsageError` for words that are no command."""
    with click.Context(cli) as above:
        name, found, arguments = cli.resolve_command(above, [*words])
        assert found is not None
        found.make_context(name, arguments, parent=above)


def test_a_command_in_a_message_can_be_pasted() -> None:
    wrong = []
    for path, words in commands():
        try:
            if words not in NAMED:
                parse(words)
        except click.UsageError as error:
            wrong.append((path, words, error.format_message()))
    assert wrong == []


@pytest.mark.parametrize("words", [("lists",), ("list", "--every"), ("migrate",)])
def test_what_is_no_command_is_noticed(words: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parse(words)


def test_the_name_of_a_guest_is_one_word_of_a_command_of_xl() -> None:
    unquoted = re.compile(rf"\bxl (?:destroy|migrate|save|pause|unpause) {GUEST}")
    found = [(path, text) for path, tree in parsed() for text in messages(tree)]
    assert [(path, text) for path, text in found if unquoted.search(text)] == []
    assert any(f"xl migrate {shlex.quote(GUEST)}" in text for _path, text in found)


def test_the_commands_are_found() -> None:
    found = {words for _path, words in commands()}
    assert {("decide", GUEST, "elsewhere"), ("list",), ("init", "--renew")} <= found
