# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Any

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(value: Any) -> int:
    """Bytes: ``4096``, ``64K``, ``512M``, ``1G``, ``1.5GiB``.  Raises :class:`ValueError`."""
    if type(value) is int:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is not a size: a number of bytes, or one with K, M, G or T, such as 512M")
    return int(float(match[1]) * UNITS[match[2].upper()])


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
