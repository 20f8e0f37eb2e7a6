# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of fields that a message can have, each with the limits of its values.

Each function returns a field for a message's dataclass.  The field's metadata holds the parser of
its value, as ``parse``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from migrate.protocol.pfns import MAX_PFN, NO_PFNS
from xenbackend.pages import PfnArray


class InvalidFieldError(Exception):
    """The value is not allowed for the field.  The text describes the values that are allowed."""


Parser = Callable[[Any], Any]
"""Makes a field's value of the value in the frame.  Raises :class:`InvalidFieldError`."""


def _field(parse: Parser, **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"parse": parse}, **kwargs)


def uint_field(most: int, least: int = 0) -> Any:
    """Return a field for a number from ``least`` to ``most``."""

    def parse(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise InvalidFieldError(f"a number from {least} to {most}")
        return value

    return _field(parse)


def text_field(most: int, **kwargs: Any) -> Any:
    """Return a field for printable text of at most ``most`` characters."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise InvalidFieldError(f"printable text of at most {most} characters")
        return value

    return _field(parse, **kwargs)


def bytes_field(most: int, **kwargs: Any) -> Any:
    """Return a field for at most ``most`` bytes."""

    def parse(value: Any) -> bytes:
        if not isinstance(value, bytes) or len(value) > most:
            raise InvalidFieldError(f"at most {most} bytes")
        return value

    return _field(parse, **kwargs)


def flag_field() -> Any:
    """Return a field that is true or false."""

    def parse(value: Any) -> bool:
        if type(value) is not bool:
            raise InvalidFieldError("true or false")
        return value

    return _field(parse)


def texts_field(most: int, **kwargs: Any) -> Any:
    """Return a field for at most ``most`` names, each of at most 64 printable characters."""

    def parse(value: Any) -> tuple[str, ...]:
        if (
            not isinstance(value, list)
            or len(value) > most
            or not all(isinstance(v, str) and len(v) <= 64 and v.isprintable() for v in value)
        ):
            raise InvalidFieldError(f"a list of at most {most} printable names")
        return tuple(value)

    return _field(parse, **kwargs)


def pfns_field(most: int, **kwargs: Any) -> Any:
    """Return a field for at most ``most`` pfns below ``MAX_PFN``, in ascending order, each once."""

    def parse(value: Any) -> PfnArray:
        if not isinstance(value, bytes) or len(value) % 8 or len(value) > most * 8:
            raise InvalidFieldError(f"at most {most} pfns of 8 bytes")
        if not value:
            return NO_PFNS
        pfns = np.frombuffer(value, dtype="<u8")
        if int(pfns[-1]) >= MAX_PFN or (len(pfns) > 1 and bool((pfns[1:] <= pfns[:-1]).any())):
            raise InvalidFieldError("pfns in ascending order, each once")
        return pfns

    return _field(parse, **kwargs)
