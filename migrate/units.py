# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes as people write them, text and commands as people read them, and pauses that grow."""

from __future__ import annotations

import ipaddress
import re
import shlex
import unicodedata
from collections.abc import Iterator
from typing import Any

from migrate.errors import MigrationError

MAX_SIZE = 2**63 - 1
MAX_SHOWN = 80
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(value: Any) -> int:
    """Return the number of bytes in a size such as ``4096``, ``64K``, ``512M``, ``1G`` or
    ``1.5GiB``.  Raises :class:`ValueError`.
    """
    if type(value) is int:
        size: float = value
    else:
        match = re.fullmatch(
            r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE
        )
        if not match:
            raise ValueError(
                f"{shortened(value)!r} is not a size: a number of bytes, or one with K, M, G or T, "
                "such as 512M"
            )
        size = float(match[1]) * UNITS[match[2].upper()]
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"{shortened(value)!r} is not a size that there can be")
    return int(size)


def shortened(value: Any) -> str:
    """Return a user's text, shortened for a message."""
    text = str(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def command(*words: str) -> str:
    """Return a command of xen-postcopy as a message names it: it can be pasted, whatever characters
    the name of a guest has.
    """
    return _pasted("xen-postcopy", *words)


def xl_command(*words: str) -> str:
    """Return a command of xl as :func:`command` returns one of xen-postcopy."""
    return _pasted("xl", *words)


def _pasted(*words: str) -> str:
    return f"`{shlex.join(words)}`"


def printable(text: str) -> str:
    """Return ``text`` for a terminal.  Every character that is neither printable nor a line feed is
    replaced, because a control character could move the cursor.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def display_width(text: str) -> int:
    """Return how many columns of a terminal printable text takes: characters of East Asian scripts
    take two, combining marks none (Unicode Standard Annex 11).
    """
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def counted(count: int, noun: str) -> str:
    """Return ``1 page``, or ``2 pages``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """Return ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min`` or ``3 d 4 h``.  An ``int`` has no
    decimal.
    """
    if type(seconds) is float and seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    for size, unit, part, smaller in ((60, "min", 1, "s"), (3600, "h", 60, "min")):
        if whole < 60 * size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def human_us(us: float) -> str:
    """Return ``350 us``, ``12.3 ms`` or what :func:`human_seconds` returns."""
    if us < 999.5:
        return f"{us:.0f} us"
    return f"{us / 1000:.3g} ms" if us < 999_500 else human_seconds(us / 1e6)


def pauses(first_s: float, last_s: float, *, growth: float = 1.05) -> Iterator[float]:
    """Return the pauses between polls, or between attempts.  Each pause is ``growth`` times the
    pause before it, up to ``last_s``.

    With the default growth, an event that takes a time T is noticed at most T / 20 late.
    """
    pause_s = first_s
    while True:
        yield pause_s
        pause_s = min(pause_s * growth, last_s)


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """Parse ``host``, ``host:port``, ``v6``, ``[v6]`` or ``[v6]:port``.  Raises
    :class:`MigrationError`.
    """

    def wrong(why: str) -> MigrationError:
        return MigrationError(f"address {shortened(text)!r}: HOST, HOST:PORT or [IPV6]:PORT; {why}")

    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket:
            raise wrong("a bracket is not closed")
        if ":" not in host:
            raise wrong("brackets are for IPv6 addresses")
        colon, port = rest[:1], rest[1:]
        if colon not in ("", ":"):
            raise wrong("between bracket and port belongs a colon")
    elif text.count(":") > 1:  # an IPv6 address by itself
        host, colon, port = text, "", ""
    else:
        host, colon, port = text.partition(":")
    if not colon:
        port = str(default_port)
    if not host:
        raise wrong("the host is missing")
    if not colon and host.isascii() and host.isdigit():
        raise wrong("this is a port, or no host at all")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise wrong("a port is a number of at most 65535")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise wrong("this is no IPv6 address") from None
    elif "[" in host or "]" in host or not host.isprintable() or " " in host:
        raise wrong("this is no name of a host")
    else:
        try:
            host.encode("idna")
        except UnicodeError:
            raise wrong("this is no name of a host") from None
    return host, int(port)


def parse_dialled(text: str, default_port: int) -> tuple[str, int]:
    """Parse an address that is dialled, as :func:`parse_address` does.  No program listens at port
    0, which means any free one where a daemon listens.
    """
    host, port = parse_address(text, default_port)
    if port == 0:
        raise MigrationError(f"address {shortened(text)!r}: a port that is dialled is 1 to 65535")
    return host, port
