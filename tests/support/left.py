# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that a killed daemon has left in its journal, before the successor has found their
domains.
"""

from __future__ import annotations

from typing import Any, cast

import trio

from migrate.lanes.connection import LaneConnection
from migrate.protocol import messages as m
from migrate.service.journal import Journal
from receiver.migration import IncomingMigration
from sender.migration import OutgoingMigration
from xenbackend.contract import Hypervisor

SESSION, NAME, DOMID = "session", "guest", 9


class NoLanes:
    """Lanes that are never used."""

    dials: tuple[str, int] | None = None
    peer = ""

    def facts(self) -> dict[str, Any]:
        return {"dials": self.dials, "rejoins": 0, "proven": False}

    def keep(self, key: bytes) -> None:
        pass


class Ends(NoLanes):
    """Lanes that fail to deliver the final message, each time for another reason.  At last the
    other end does not need the message any more.
    """

    dials, peer = ("peer", 1), "peer"

    def __init__(self, errors: list[Exception]):
        self.errors = errors

    async def again(self, note: object) -> LaneConnection:
        await trio.lowlevel.checkpoint()
        raise self.errors.pop(0)


FACTS: dict[str, Any] = {
    "xl": False,
    "domid": DOMID,
    "handle": "09" * 16,
    "key": "00",
    "dials": None,
    "rejoins": 0,
    "proven": False,
}


def left_by_a_sender(
    host: Hypervisor, journal: Journal, step: str, lanes: Any = None
) -> OutgoingMigration:
    facts = {
        **FACTS, "step": step, "xl": step == "deciding", "domain": NAME,
        "strategy": "postcopy", "bandwidth": None,
        "checkpoints": None, "successor": None,
    }  # fmt: skip
    lanes = lanes or cast(Any, NoLanes())
    return OutgoingMigration.of_predecessor(SESSION, host, lanes, journal, facts)


def left_by_a_receiver(host: Hypervisor, journal: Journal, step: str) -> IncomingMigration:
    offer = m.Offer(NAME, 64, 64, 1, b"", True, bytes(32), 0).header()
    del offer["type"], offer["key"]
    facts = {**FACTS, "step": step, "offer": {**offer, "platform": ""}}
    return IncomingMigration.of_predecessor(host, SESSION, cast(Any, NoLanes()), journal, facts)
