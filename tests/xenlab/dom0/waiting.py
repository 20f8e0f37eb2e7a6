# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a condition in an emulated dom0."""

from __future__ import annotations

from collections.abc import Callable

from tests.support import waiting

WAIT_S = 600.0
"""The limit of each wait and of each command.  An emulated machine that has a share of a processor
is five times as slow as the quickest one.
"""
MOST_PAUSE_S = 2.0
"""A look at xl or at a daemon takes up to a second of dom0's only CPU."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait as :func:`tests.support.waiting.until` does, with longer pauses.  Not for a condition
    that itself does what the guest waits for.
    """
    waiting.until(condition, what, WAIT_S, MOST_PAUSE_S)
