# SPDX-License-Identifier: GPL-2.0-or-later
"""What the sender notes in the journal about one migration, besides the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migrate.options import LEAST_BANDWIDTH, MigrationOptions, Strategy
from migrate.protocol.session import new_token
from migrate.service.journal import check_facts
from sender.ownership import INHERITED, State
from xenbackend.contract import DomainId

NUMBER_OR_NONE = (int, float, type(None))
FACTS: dict[str, tuple[type, ...]] = {
    "domain": (str,),
    "strategy": (str,),
    "bandwidth": NUMBER_OR_NONE,
    "checkpoints": NUMBER_OR_NONE,
    "successor": (int, type(None)),
    "ran": (bool,),
    "recall": (bool,),
    "max_pages": (int,),
    "applied": (bool,),
}
"""The facts that this end alone notes, with the types of their values."""
NOT_ALWAYS_NOTED = ("handle", "rejoins", "ran", "recall", "max_pages", "applied")
"""An earlier release did not."""


@dataclass
class Entry:
    domain: DomainId
    options: MigrationOptions
    """Of these the journal has the strategy, the bandwidth and the interval of checkpoints."""
    xl: bool
    """A toolstack decides at which end the guest runs."""
    key: bytes = field(default_factory=new_token)
    """The session's key, by which a connection proves that it is the same destination's."""
    max_pages: int = 0
    """The domain's own limit of frames, which is another one while the guest is copied.  0: the
    limit is not known and is not restored.
    """
    restored_domid: int | None = None
    """The domid of the domain in which the guest goes on as it was at a checkpoint."""
    applied: bool = False
    """The source domain has pages of a checkpoint, or has lost pages to the successor: the guest
    cannot be resumed in the source domain.
    """
    ran: bool = False
    """The destination has reported that the guest runs there."""
    recall: bool = False
    """An operator has the guest go on here, though it was handed over."""

    def facts(self) -> dict[str, Any]:
        """As JSON can have them."""
        handle = self.domain.handle
        return {
            "domain": self.domain.name,
            "domid": self.domain.domid,
            "handle": None if handle is None else handle.hex(),
            "key": self.key.hex(),
            "xl": self.xl,
            "strategy": self.options.strategy.value,
            "bandwidth": self.options.bandwidth_bytes_per_s,
            "checkpoints": self.options.checkpoint_every_s,
            "successor": self.restored_domid,
            "ran": self.ran,
            "recall": self.recall,
            "max_pages": self.max_pages,
            "applied": self.applied,
        }


def read_entry(facts: dict[str, Any], *, has_checkpoint: bool) -> tuple[Entry, State]:
    """What a predecessor has noted.  ``has_checkpoint``: its checkpoint file is there.

    Raises ``ValueError`` for an entry that this release must not act on.
    """
    check_facts(facts, INHERITED, FACTS, NOT_ALWAYS_NOTED)
    step, handle = facts["step"], facts.get("handle")
    # An earlier release accepted less than a page a second.
    bandwidth = facts["bandwidth"]
    options = MigrationOptions(
        Strategy(facts["strategy"]),
        bandwidth_bytes_per_s=None if bandwidth is None else max(bandwidth, LEAST_BANDWIDTH),
        checkpoint_every_s=facts["checkpoints"],
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
        # A release that did not note this has applied the checkpoint that is there.
        facts.get("applied", step == "going back" or has_checkpoint),
        facts.get("ran", False),
        facts.get("recall", False),
    )
    # A release that did not note handles did not note the step before the suspension either.
    state = State.SUSPENDED if step == "begun" and handle is None else INHERITED[step]
    return entry, state
