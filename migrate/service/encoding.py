# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON of large values, made in a thread while the event loop and the threads of guests work.

``json`` encodes a value without giving up the interpreter lock: all threads of the daemon wait for
as long as that takes, 60 ms for the record of a guest with 128 vCPUs.  So each list of numbers is
encoded by a call of its own, which takes half a millisecond, and other threads run in between.
"""

from __future__ import annotations

import json
from typing import Any


def encoded(value: Any) -> str:
    """Return what ``json.dumps`` returns.  Takes about as long."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        parts = (f"{json.dumps(key)}: {encoded(inner)}" for key, inner in value.items())
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return f"[{', '.join(map(encoded, value))}]"
    return json.dumps(value)


def is_nested(value: Any, levels: int) -> bool:
    """Whether dictionaries and lists are nested in more levels than that."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    inner = (one for one in value if isinstance(one, dict | list))
    return levels == 0 or any(is_nested(one, levels - 1) for one in inner)
