# SPDX-License-Identifier: GPL-2.0-or-later
"""The progress of an incoming migration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class IncomingProgress:
    """The values that ``list`` shows besides the phase.  No decision depends on them."""

    domain: str = ""
    outstanding: int = 0
    waiting: int = 0
    unprotected: str = ""
    """Why there are no further checkpoints, although they were requested."""
    problem: str = ""
    io_fails_in_s: float | None = None
    """Until dom0 gives up I/O to missing pages.  ``None``: the lanes are there, or the guest has no
    devices in dom0.
    """
