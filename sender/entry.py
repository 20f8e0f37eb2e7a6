# SPDX-License-Identifier: GPL-2.0-or-later
"""What the sender notes in the journal about one migration, besides the step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from migrate.options import LEAST_BANDWIDTH, MigrationOptions, Strategy
from migrate.protocol.session import new_token
from migrate.service.journal import check_facts
from sender.ownership import INHERITED, State
from sender.pause import Pause
from xenbackend.contract import DomainId

NUMBER_OR_NONE = (int, float, type(None))
FACTS: dict[str, tuple[type, ...]] = {
    "domain": (str,),
    "strategy": (str,),
    "bandwidth": NUMBER_OR_NONE,
    "postcopy_bandwidth": NUMBER_OR_NONE,
    "paused": (bool,),
    "checkpoints": NUMBER_OR_NONE,
    "successor": (int, type(None)),
    "ran": (bool,),
    "recall": (bool,),
    "ended_there": (bool,),
    "max_pages": (int,),
    "applied": (bool,),
    "started_at": NUMBER_OR_NONE,
    "missing": (int,),
}
"""The facts that only this end notes, with the types of their values."""
NOT_ALWAYS_NOTED = (
    "handle", "rejoins", "proven", "ran", "recall", "max_pages", "applied", "started_at",
    "postcopy_bandwidth", "paused", "ended_there", "missing",
)  # fmt: skip
"""The facts that an earlier release did not note."""


@dataclass
class Entry:
    domain: DomainId
    options: MigrationOptions
    """The journal has the strategy, the bandwidths and the interval of checkpoints of these.  The
    others have no effect after a restart.
    """
    xl: bool
    """A toolstack decides at which end the guest runs."""
    key: bytes = field(default_factory=new_token)
    """The session's key, which proves that a connection is from the same destination."""
    max_pages: int = 0
    """The domain's own limit of frames; the domain has another limit while the guest is copied.  0:
    the limit is not known and is not restored.
    """
    restored_domid: int | None = None
    """The domid of the domain in which the guest continues from a checkpoint."""
    applied: bool = False
    """The guest cannot be resumed in the source domain, because pages of a checkpoint were written
    into it or pages of it were moved into the restored domain.
    """
    ran: bool = False
    """The destination has reported that the guest runs there."""
    recall: bool = False
    """An operator has decided that the guest continues here, although it was handed over."""
    ended_there: bool = False
    """The destination has reported that its migration has ended: it waits for no message."""
    started_at: float | None = field(default_factory=lambda: round(time.time(), 3))
    """When the migration began, in seconds since 1970; for people.  ``None`` if an earlier release
    began it.
    """
    pause: Pause = field(default_factory=Pause)
    missing: int = 0
    """How many pages were missing at the handover; for people.  0 if that is not known."""

    def facts(self) -> dict[str, Any]:
        """Return the facts as JSON can have them."""
        handle = self.domain.handle
        return {
            "domain": self.domain.name,
            "domid": self.domain.domid,
            "handle": None if handle is None else handle.hex(),
            "key": self.key.hex(),
            "xl": self.xl,
            "strategy": self.options.strategy.value,
            "bandwidth": self.options.bandwidth_bytes_per_s,
            "postcopy_bandwidth": self.options.postcopy_bandwidth_bytes_per_s,
            "paused": self.pause.is_on,
            "checkpoints": self.options.checkpoint_every_s,
            "successor": self.restored_domid,
            "ran": self.ran,
            "recall": self.recall,
            "ended_there": self.ended_there,
            "max_pages": self.max_pages,
            "applied": self.applied,
            "started_at": self.started_at,
            "missing": self.missing,
        }


def read_entry(facts: dict[str, Any], *, has_checkpoint: bool) -> tuple[Entry, State]:
    """Return what a predecessor has noted.  ``has_checkpoint``: its checkpoint file exists.

    Raises ``ValueError`` for an entry that this release must not act on.
    """
    check_facts(facts, INHERITED, FACTS, NOT_ALWAYS_NOTED)
    step, handle = facts["step"], facts.get("handle")
    # An earlier release accepted a bandwidth of less than a page a second.
    bandwidth = facts["bandwidth"]
    options = MigrationOptions(
        Strategy(facts["strategy"]),
        bandwidth_bytes_per_s=None if bandwidth is None else max(bandwidth, LEAST_BANDWIDTH),
        checkpoint_every_s=facts["checkpoints"],
        postcopy_bandwidth_bytes_per_s=facts.get("postcopy_bandwidth"),
    )
    entry = Entry(
        DomainId(
            facts["domid"], None if handle is None else bytes.fromhex(handle), facts["domain"]
        ),
        options,
        facts["xl"],
        bytes.fromhex(facts["key"]),
        facts.get("max_pages", 0),
        facts["successor"],
        # A release that did not note this had applied any checkpoint that exists.
        facts.get("applied", step == "going back" or has_checkpoint),
        facts.get("ran", False),
        facts.get("recall", False),
        facts.get("ended_there", False),
        facts.get("started_at"),
        Pause(facts.get("paused", False)),
        facts.get("missing", 0),
    )
    # A release that did not note handles did not note the step before the suspension either.
    state = State.SUSPENDED if step == "begun" and handle is None else INHERITED[step]
    return entry, state
