# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of values that keys of the configuration have.  Each function returns the value of a
key as the program uses it, and raises ``ValueError`` with what the value has to be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate.lanes.connection import LEAST_SILENCE_S, is_loopback
from migrate.lanes.ends import SENDER_PORT
from migrate.options import LEAST_BANDWIDTH, MAX_TIMEOUT_S, NO_CAP, OnTimeout, Strategy
from migrate.units import parse_address, parse_dialled, parse_size

Address = tuple[str, int]


def address(port: int) -> Callable[[Any], Address]:
    def parse(value: Any) -> Address:
        if not isinstance(value, str):
            raise ValueError("an address in quotes: HOST, HOST:PORT or [IPV6]:PORT")
        return parse_address(value, port)

    return parse


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("text in quotes")
    return value


def dialled(value: Any) -> str:
    """Return the text of an address whose port may be left out; empty for none."""
    given = text(value)
    if given:
        parse_dialled(given, SENDER_PORT)
    return given


def names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError('a list of names, ["HOST", ...]')
    return tuple(value)


def strategy(value: Any) -> Strategy:
    try:
        return Strategy(value)
    except ValueError:
        raise ValueError(f"one of {', '.join(strategy.value for strategy in Strategy)}") from None


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return value


def whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("a whole number")
    return value


def seconds(value: Any) -> float:
    if not 0 < number(value) <= 3600:
        raise ValueError("seconds: more than 0, at most 3600")
    return float(value)


def silence(value: Any) -> float:
    if not LEAST_SILENCE_S <= number(value) <= 3600:
        raise ValueError(f"seconds: at least {LEAST_SILENCE_S:g}, at most 3600")
    return float(value)


def bandwidth(value: Any) -> float:
    """Return a number of bytes a second, of which a page is the least."""
    rate = parse_size(value)
    if rate < LEAST_BANDWIDTH:
        raise ValueError(
            f"at least one page ({LEAST_BANDWIDTH} bytes) a second, or left out for no cap"
        )
    return float(rate)


def postcopy_bandwidth(value: Any) -> float:
    return NO_CAP if value == "none" else bandwidth(value)


def timeout(value: Any) -> float:
    if not 0 < number(value) <= MAX_TIMEOUT_S:
        raise ValueError("seconds: more than 0, at most a week, or left out for no limit")
    return float(value)


def on_timeout(value: Any) -> OnTimeout:
    try:
        return OnTimeout(value)
    except ValueError:
        raise ValueError(f"one of {', '.join(action.value for action in OnTimeout)}") from None


def scraped_at(value: Any) -> Address | Path | None:
    """Return where metrics are served: to this host alone, because nothing checks who asks."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("HOST:PORT, or the path of a Unix socket, in quotes")
    if not value:
        return None
    if value.startswith("/"):
        return Path(value)
    if not re.search(r":\d+$", value):
        raise ValueError(f"address {value!r}: HOST:PORT or [IPV6]:PORT")
    host, port = parse_address(value, 0)
    if not is_loopback(host):
        raise ValueError(
            f"{host} can be reached by others: a loopback address, or the path of a Unix socket"
        )
    return host, port


def directory(value: Any) -> str:
    path = text(value)
    if path and not path.startswith("/"):
        raise ValueError("the path of a directory, from / on")
    return path
