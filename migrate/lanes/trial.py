# SPDX-License-Identifier: GPL-2.0-or-later
"""Trying another host without a migration, the end that is dialled.

The hello of the peer requires ``preflight`` and ``trial``.  After ``host`` this end answers

- ``offer`` by ``accepted`` or ``refused``, as the preflight of a migration would, and makes
  nothing;
- ``barrier`` by ``passed``, when all pages before it were written to memory that had not been used
  before, as a restore does.  Nothing is kept.

The peer ends the connection.  This end does so after :data:`TRIAL_S` or :data:`MOST_BYTES`.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable

import trio

from migrate.errors import PeerClosedError, RemoteProtocolError
from migrate.lanes.connection import LaneConnection, run_in_thread
from migrate.protocol import messages as m

TRIAL_S = 30.0
MOST_BYTES = 2**30

Judge = Callable[[m.Offer], str]
"""Returns why an offered guest could not be taken in here; empty if it could.  Called in a
thread.
"""


def judge_nothing(_offer: m.Offer) -> str:
    """Refuse every guest."""
    return "no guest is taken in here"


async def serve_trial(lane: LaneConnection, judge: Judge) -> None:
    """Answer the peer until it ends the connection, or until the limits.  Raises
    :class:`RemoteProtocolError` for a message that does not belong to a trial.
    """
    with trio.move_on_after(TRIAL_S):
        await run_in_thread(functools.partial(_answer, lane, judge), lane.shut)


def _answer(lane: LaneConnection, judge: Judge) -> None:
    try:
        while lane.bytes_received < MOST_BYTES:
            message, payload = lane.receive_blocking()
            match message:
                case m.Offer():
                    problem = judge(message)
                    refused = m.Refused(m.printable(problem), False)
                    lane.send_blocking(refused if problem else m.Accepted("", b""))
                case m.Barrier():
                    lane.send_blocking(m.Passed(message.number))
                case m.Pages():
                    _write(payload)
                case _:
                    raise RemoteProtocolError(f"{message.type} in a trial")
    except PeerClosedError:
        return


def _write(payload: memoryview) -> None:
    """Write pages to fresh memory, and give that memory back."""
    if payload:
        with mmap.mmap(-1, len(payload)) as fresh:
            fresh.write(payload)
