# SPDX-License-Identifier: GPL-2.0-or-later
"""What an incoming migration shows of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class IncomingProgress:
    """What ``list`` shows besides the phase.  Nothing is decided by it."""

    domain: str = ""
    outstanding: int = 0
    waiting: int = 0
    unprotected: str = ""
    """Why there are no further checkpoints, though they were asked for."""
    problem: str = ""
    io_fails_in_s: float | None = None
    """Until dom0 gives up I/O to missing pages.  ``None``: the lanes are there, or the guest has no
    devices in dom0.
    """
