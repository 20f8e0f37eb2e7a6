# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands print, without control characters.

Names and reasons come from guests, peers and options.  A terminal obeys the control characters that
such a text contains.
"""

from __future__ import annotations

from typing import Any

import click

from migrate.units import printable


def echo(text: Any, *, err: bool = False) -> None:
    click.echo(printable(str(text)) if text else "", err=err)
