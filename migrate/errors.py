# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors of a migration, by whose fault they are."""

from __future__ import annotations

from typing import Any


class MigrationError(Exception):
    """A migration could not be done; the text has the reason and what to do."""


class ProtocolError(MigrationError):
    """Bytes or messages that the protocol does not allow (h11's local and remote errors)."""


class LocalProtocolError(ProtocolError):
    """This end was about to break the protocol: a bug here."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""


class PeerClosedError(MigrationError):
    """The peer cannot be reached, sends nothing, or has ended the connection too early."""


class CleanEndError(PeerClosedError):
    """The peer has closed the connection between two messages."""


class RefusedError(PeerClosedError):
    """The peer refuses this connection; the text has the peer's reason."""


class UnknownSessionError(RefusedError):
    """The peer refuses this connection because it has no such session, or no longer has it."""


class UnknownMigrationError(MigrationError):
    """The daemon that was asked has no such migration; another may have."""


class DaemonGoneError(MigrationError):
    """The daemon has ended in the middle of a request."""

    progress: dict[str, Any] | None = None
    """The last that the daemon has reported of a migration."""


class UnattendedMigrationError(MigrationError):
    """The sender has ended during a migration.  The text has what is known of the guest; the
    command's exit status is 3.
    """


class SilentDaemonError(MigrationError):
    """The daemon that was asked does not answer."""


class PagesLostError(MigrationError):
    """The missing pages of a guest no longer exist at any host."""


class RecalledError(MigrationError):
    """The guest runs here, and an operator has decided that it runs at its source."""


class OccupiedError(MigrationError):
    """Another migration or another program uses the domain, which must not be touched now."""


class UsedUpError(OSError):
    """This host has no thread or no memory left for the daemon.  The shortage may pass."""

    def __str__(self) -> str:
        return (
            "this host gives the daemon no further thread or memory: see TasksMax= and "
            "MemoryMax= of its unit, and what else runs here"
        )


class InterruptedMigrationError(MigrationError):
    """An administrator pressed Ctrl-C; the text describes what happens to the migration."""


class GuestEndedError(MigrationError):
    """The guest ran at the destination, and ended there: nothing of it is needed any more."""
