# SPDX-License-Identifier: GPL-2.0-or-later
"""The names that a shell completes: of migrations and of domains, as the daemons of this host have
them.

A shell shows nothing until it has the answer.  So each daemon has little time for it, and what it
does not answer is left out without an error.  Nothing is imported here that would make the command
slow to start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrate.control.client import ControlClient, Json, receiver_socket, sender_socket
from migrate.errors import MigrationError
from migrate.outcomes import ENDED

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

ANSWER_S = 0.5
"""How long each daemon may take for its answer."""
ID_CHARACTERS = 8
"""The characters of an identifier that are completed."""


def migrations_under_way(
    ctx: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Return the migrations under way whose name begins with ``begun``."""
    return _items(begun, (line for line in _migrations(ctx) if line["phase"] not in ENDED))


def migrations(ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Return the migrations, also those that have ended, whose name begins with ``begun``."""
    return _items(begun, _migrations(ctx))


def domains(ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Return the domains of this host whose name begins with ``begun``."""
    path = ctx.params.get("socket_path") or sender_socket()
    return [
        _item(one["name"], one["state"])
        for answer in _answers([path], command="domains")
        for one in answer["domains"]
        if _fits(one["name"], begun)
    ]


def _migrations(ctx: click.Context) -> Iterator[Json]:
    """Yield what the daemons list that the command would ask, the oldest migration first."""
    named = ctx.params.get("socket_paths") or [ctx.params.get("socket_path")]
    paths = [path for path in named if path] or [sender_socket(), receiver_socket()]
    for answer in _answers(paths, command="list"):
        yield from answer["migrations"]


def _items(begun: str, lines: Iterable[Json]) -> list[CompletionItem]:
    """Return the names that fit.  If none does, return the identifiers that fit."""
    known = list(lines)
    # A guest may have several migrations, of which the newest is described.
    names = {line["domain"]: line for line in known if _fits(line["domain"], begun)}
    found = names or {
        line["id"][:ID_CHARACTERS]: line for line in known if line["id"].startswith(begun)
    }
    return [_item(word, f"{line['direction']}, {line['phase']}") for word, line in found.items()]


def _fits(name: str, begun: str) -> bool:
    """Whether a name can be completed.  A shell reads the answer line by line."""
    return name.startswith(begun) and name.isprintable() and bool(name)


def _item(word: str, about: str) -> CompletionItem:
    from click.shell_completion import CompletionItem

    return CompletionItem(word, help=about)


def _answers(paths: Iterable[str | Path], **request: Any) -> list[Json]:
    """Return the answers of the daemons that answer in time."""
    found = []
    for path in paths:
        with (
            contextlib.suppress(MigrationError),
            ControlClient(path, answer_s=ANSWER_S) as client,
        ):
            found.append(client.call(**request))
    return found
