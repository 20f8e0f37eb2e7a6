# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a condition in an emulated dom0."""

from __future__ import annotations

from collections.abc import Callable

from tests.support import waiting
from tests.support.labs import LAB_WAIT_S

MOST_PAUSE_S = 2.0
"""A look at xl or at a daemon takes up to a second of dom0's only CPU."""


def until(condition: Callable[[], object], what: str, timeout_s: float = LAB_WAIT_S) -> None:
    """Wait as :func:`tests.support.waiting.until` does, with longer pauses.  Not for a condition
    that itself does what the guest waits for.
    """
    waiting.until(condition, what, timeout_s, MOST_PAUSE_S)
