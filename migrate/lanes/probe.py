# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking a peer about its host, without a guest.

The hello requires the capability ``preflight``.  A peer that has it answers with ``host`` and ends
the connection; a peer of an older release refuses the hello.  Neither begins a migration.  If the
hello requires ``trial`` as well, the connection continues as :mod:`migrate.lanes.trial` describes.
"""

from __future__ import annotations

import trio

from migrate.errors import MigrationError, PeerClosedError, RefusedError
from migrate.lanes.connection import CONNECT_TIMEOUT_S, LaneConnection, Terms
from migrate.lanes.ends import WRONG_END
from migrate.protocol.messages import PREFLIGHT, Hello, Host, Lane, Refused
from migrate.protocol.session import hello, negotiate, new_id


class OlderPeerError(MigrationError):
    """The peer is of a release that cannot be asked."""


class WrongEndError(MigrationError):
    """The daemon that answers is not the one that was dialled."""


async def greet(lane: LaneConnection, terms: Terms, *further: str) -> Hello:
    """Send the hello that asks about the peer's host, and return the peer's hello.  ``further``:
    capabilities that are required as well.

    Raises :class:`OlderPeerError` if the peer cannot be asked, and :class:`MigrationError` if it
    refuses or has no version in common with this end.
    """
    ours = hello(Lane.PUSH, new_id(), requires=(*terms.requires, PREFLIGHT, *further))
    try:
        await lane.send(ours)
        theirs = await lane.receive_hello()
    except RefusedError as error:
        lacks = str(error).partition("does not have: ")[2].split(", ")
        if {PREFLIGHT, *further}.issuperset(lacks):
            raise OlderPeerError(str(error)) from error
        raise
    negotiate(theirs)
    lane.agree((ours, theirs))
    return theirs


def free_bytes_of(host: Host) -> int | None:
    """Return the memory that new guests can have at a host; ``None`` if its daemon could not find
    that out, for the reason in ``host.problem``.
    """
    return None if host.problem and not host.free_bytes else host.free_bytes


async def host_of(lane: LaneConnection, end: str) -> Host:
    """Receive the answer to :func:`greet`.  Raises :class:`MigrationError`, and
    :class:`WrongEndError` if another daemon answers than the ``end`` that was dialled.
    """
    with trio.move_on_after(CONNECT_TIMEOUT_S):
        message, _pages = await lane.receive()
        if isinstance(message, Refused):
            raise MigrationError(f"the peer cannot look at its host: {message.reason}")
        if not isinstance(message, Host):
            raise MigrationError(f"the peer answered with {message.type} instead of host")
        if message.end != end:
            raise WrongEndError(f"{lane.peer()}: {WRONG_END[end]}")
        return message
    raise PeerClosedError(f"the peer did not look at its host within {CONNECT_TIMEOUT_S:g} s")
