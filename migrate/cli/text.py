# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands print, without control characters.

Names and reasons come from guests, peers and options.  A terminal obeys the control characters that
such a text contains.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from migrate.streams import write
from migrate.units import display_width, printable


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: str = "") -> str:
    """Return lines whose columns are as wide as their longest text.  ``numbers``: the titles of the
    columns that are aligned at the right.
    """
    texts = [[printable(str(value)).replace("\n", " ") for value in row] for row in (titles, *rows)]
    widths = [max(map(display_width, column)) for column in zip(*texts, strict=True)]
    right = [title in numbers.split() for title in titles]
    return "\n".join(
        "  ".join(
            _padded(text, width, is_number)
            for text, width, is_number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in texts
    )


def _padded(text: str, width: int, is_number: bool) -> str:
    pad = " " * (width - display_width(text))
    return pad + text if is_number else text + pad


def echo(text: Any, *, err: bool = False) -> None:
    """Print a line.  Raises ``OSError`` if standard output cannot be written.  If standard error
    cannot be written, nothing is raised, because that changes no exit status.
    """
    line = printable(str(text)) if text else ""
    write(sys.stderr if err else sys.stdout, f"{line}\n")


def announce_wait(*paths: str | os.PathLike[str]) -> None:
    """State on a terminal for which daemons the command waits.  ``paths``: of their sockets."""
    if sys.stderr.isatty():
        named = " or at ".join(str(path) for path in paths)
        echo(f"waiting for the daemon at {named}", err=True)


json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")


def report(text: str, as_json: bool, **facts: Any) -> None:
    """Report what a command has done: in words on standard error, or as JSON on standard output."""
    echo(json.dumps(facts) if as_json else text, err=not as_json)
