# SPDX-License-Identifier: GPL-2.0-or-later
"""The two lanes of a session, whichever end dials: one end dials, the other waits.

The direction of dialling is independent of the direction of the migration.  For a migration by the
command line, the sender dials the receiver.  Under xl the receiver dials the sender, because only
the receiver is given the address of the other end.  Both ends ask a :class:`Lanes` for the push
lane first.  They ask for the pull lane when the preflight has provided the token for it.

If both lanes are lost after the switchover, the same end dials again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from migrate.lanes.accept import AwaitedLanes
from migrate.lanes.connection import LaneConnection, Terms
from migrate.lanes.dial import REJOINS_OF_ONE_LIFE, DialledLanes


class Lanes(Protocol):
    @property
    def peer(self) -> str:
        """The other end, for people; empty if it is not known yet."""

    @property
    def dials(self) -> tuple[str, int] | None:
        """The address that this end dials; ``None`` if the other end dials."""

    def facts(self) -> dict[str, Any]:
        """Return what a successor needs to resume the session, as the journal can have it:
        ``dials``, and ``rejoins`` and ``proven`` of :class:`DialledLanes`.
        """

    async def push(self) -> LaneConnection:
        """Return the push lane.  Raises :class:`PeerClosedError` if it cannot be opened, and
        :class:`ProtocolError` if the peer's answer is not allowed.
        """

    async def pull(self, token: bytes) -> LaneConnection:
        """Return the pull lane, as :meth:`push` does.  ``token``: the token of ``accepted`` or
        ``rejoined``.
        """

    def keep(self, key: bytes) -> None:
        """Allow from here on that the session is resumed.  ``key``: the key of the offer."""

    async def again(self, note: Callable[[str], None]) -> LaneConnection:
        """Wait for a new push lane of a session that lost its lanes.  ``note`` is called with the
        reason of each failure in the meantime.

        Raises :class:`RefusedError`.  The next call waits before it dials.
        """

    def hurry(self) -> None:
        """End the pause of :meth:`again`, so that the next attempt begins at once."""


def rejoining(
    session: str, facts: dict[str, Any], awaited: dict[str, AwaitedLanes], terms: Terms
) -> Lanes:
    """Return the lanes of a session that a predecessor has left with these facts in the journal.
    If the other end dials, the lanes are added to ``awaited``.  The caller notes their facts
    in the journal.
    """
    if facts["dials"] is None:
        awaited[session] = AwaitedLanes()
        return awaited[session]
    host, port = facts["dials"]
    # Releases that did not note ``rejoins`` counted from the time of day.
    rejoins = (
        int(facts["rejoins"]) + REJOINS_OF_ONE_LIFE if "rejoins" in facts else int(time.time())
    )
    proven = facts.get("proven", False)
    return DialledLanes((str(host), int(port)), session, terms, rejoins=rejoins, proven=proven)
