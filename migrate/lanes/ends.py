# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ends of a migration by name, and the ports at which their daemons listen."""

from __future__ import annotations

SENDER, RECEIVER = "sender", "receiver"
SENDER_PORT, RECEIVER_PORT = 8014, 8013
WRONG_END = {
    RECEIVER: (
        f"this is a sender, and no receiver; receivers listen on port {RECEIVER_PORT} by default"
    ),
    SENDER: f"this is a receiver, and no sender; senders listen on port {SENDER_PORT} by default",
}
"""Why a daemon does not serve a peer that has dialled this end."""
