# SPDX-License-Identifier: GPL-2.0-or-later
"""How a migration has ended, by its phase and by the first words of its ``problem``."""

from __future__ import annotations

CANCELLED = "cancelled"
"""The first word of the ``problem`` of a migration that was cancelled."""
RESCUED = "the guest continues here, as it was when the last checkpoint was made"
"""The first words of the ``problem`` of a migration whose guest was lost at the destination, and
has returned to its last checkpoint (``--protect``).
"""
ENDED = ("completed", "failed", "refused")
"""Phases of a migration that has ended."""
MOST_PHASES = 100
"""The number of phases that are kept.  A link that is lost again and again adds two each time."""
GAVE_UP = "the sender gave up: "
"""What precedes the sender's reason in the ``problem`` of an incoming migration."""
CANNOT_CONTINUE = "the destination cannot continue: "
GIVEN_UP = "the destination has given the guest up: "
"""What precedes the receiver's reason in the ``problem`` of an outgoing migration."""


def outcome(phase: str, problem: str) -> str:
    """Return how a migration has ended: ``completed``, ``cancelled``, ``rescued``, ``refused`` or
    ``failed``; empty if it has not.  The phase of a cancelled and of a rescued one is ``failed``.
    """
    if phase == "failed":
        reason = problem
        for of_other_end in (GAVE_UP, CANNOT_CONTINUE, GIVEN_UP):
            reason = reason.removeprefix(of_other_end)
        for begins, word in ((CANCELLED, "cancelled"), (RESCUED, "rescued")):
            if reason.startswith(begins):
                return word
    return phase if phase in ENDED else ""
