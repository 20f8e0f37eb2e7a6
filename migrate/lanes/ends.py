# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ends of a migration by name, and the ports at which their daemons listen."""

from __future__ import annotations

SENDER, RECEIVER = "sender", "receiver"
SENDER_PORT, RECEIVER_PORT = 8014, 8013
OTHER = {
    RECEIVER: f"this is a sender, and no receiver; receivers listen on port {RECEIVER_PORT}",
    SENDER: f"this is a receiver, and no sender; senders listen on port {SENDER_PORT}",
}
"""What answers instead of the end that is dialled."""


def wrong_end(wanted: str) -> str:
    """Return why a daemon does not serve a peer that dials the end ``wanted``."""
    return f"{OTHER[wanted]} by default"
