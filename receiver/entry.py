# SPDX-License-Identifier: GPL-2.0-or-later
"""The facts that a migration's entry in the journal has besides its step."""

from __future__ import annotations

import time
from typing import Any

from migrate.lanes.pairs import Lanes
from migrate.protocol import messages as m
from migrate.service.journal import Journal, check_facts
from receiver.ownership import INHERITED

NUMBER_OR_NONE = (int, float, type(None))
FACTS: dict[str, tuple[type, ...]] = {
    "offer": (dict,),
    "unprotected": (str,),
    "decided": (bool,),
    "raised": (list,),
    "reason": (str,),
    "recalled": (str,),
    "started_at": NUMBER_OR_NONE,
    "missing": (int,),
}
"""The facts that only this end notes in the journal, with the types of their values."""
NOT_ALWAYS_NOTED = (
    "handle", "rejoins", "proven", "unprotected", "decided", "raised", "reason", "recalled",
    "started_at", "missing",
)  # fmt: skip
"""The facts that an earlier release did not note."""


class Entry:
    """The facts of one migration.  ``owns_domain``: the domain was made by a toolstack."""

    def __init__(self, journal: Journal, session: str, lanes: Lanes, *, owns_domain: bool):
        self._journal = journal
        self._session = session
        self._lanes = lanes
        self.stopped = journal.stopped(session)
        """See :meth:`Journal.stopped`."""
        self.owns_domain = owns_domain
        self._offer: dict[str, Any] = {}
        self._key = b""
        self.domid = -1
        self.handle: bytes | None = None
        """``None`` if there is no domain yet, or if an earlier release wrote the journal, which had
        no handles.
        """
        self.unprotected = ""
        self.decided = False
        """An operator has decided that the guest runs here."""
        self.raised = (0, 0)
        """See :class:`FrameLimit`."""
        self.reason = ""
        """Why the guest is held, or why its missing pages are lost."""
        self.recalled = ""
        """Why the guest runs at the source, although it was complete here, and was paused."""
        self.started_at: float | None = round(time.time(), 3)
        """When the migration began, in seconds since 1970; for people.  ``None`` if an earlier
        release began it.
        """
        self.missing = 0
        """How many pages were missing when the guest was ready; for people.  0 if that is not
        known.
        """

    @classmethod
    def of_predecessor(
        cls, journal: Journal, session: str, lanes: Lanes, facts: dict[str, Any]
    ) -> Entry:
        """Return the facts that a predecessor has noted.  Raises ``ValueError`` for facts that this
        release must not act on.
        """
        check_facts(facts, INHERITED, FACTS, NOT_ALWAYS_NOTED)
        entry = cls(journal, session, lanes, owns_domain=facts["xl"])
        entry._offer, entry._key = facts["offer"], bytes.fromhex(facts["key"])
        entry.domid = facts["domid"]
        entry.handle = bytes.fromhex(handle) if (handle := facts.get("handle")) else None
        entry.unprotected = facts.get("unprotected", "")
        entry.decided = facts.get("decided", False)
        raised = facts.get("raised", (0, 0))
        if [type(value) for value in raised] != [int, int]:
            raise ValueError(f"raised cannot be {raised!r}")
        entry.raised = raised[0], raised[1]
        entry.reason = facts.get("reason", "")
        entry.recalled = facts.get("recalled", "")
        entry.started_at = facts.get("started_at")
        entry.missing = facts.get("missing", 0)
        return entry

    @property
    def offer(self) -> m.Offer:
        """Return the offer of a predecessor's migration.

        Raises ``ValueError`` or :class:`MigrationError` if the journal does not have an offer.
        """
        platform = self._offer.get("platform")
        if not isinstance(platform, str):
            raise ValueError(f"the platform of an offer cannot be {platform!r}")
        fields = {"type": m.Offer.type, "platform": bytes.fromhex(platform), "key": self._key}
        offer = self._offer | fields
        parsed = m.parse(offer)
        if not isinstance(parsed, m.Offer):
            raise ValueError("the offer is another message")
        return parsed

    def offered(self, offer: m.Offer) -> None:
        self._offer, self._key = offer.header(), offer.key
        del self._offer["type"], self._offer["key"]
        self._offer["platform"] = offer.platform.hex()

    def write(self, step: str, needed: bool) -> None:
        """Add an entry to the journal.

        Raises :class:`MigrationError` if the entry cannot be written and is ``needed``.
        """
        self._journal.write(
            self._session,
            {
                "step": step,
                "domid": self.domid,
                "handle": self.handle and self.handle.hex(),
                "offer": self._offer,
                "key": self._key.hex(),
                "unprotected": self.unprotected,
                "decided": self.decided,
                **self._lanes.facts(),
                "xl": self.owns_domain,
                "raised": self.raised,
                "reason": self.reason,
                "recalled": self.recalled,
                "started_at": self.started_at,
                "missing": self.missing,
            },
            needed=needed,
        )

    def erase(self) -> None:
        self._journal.erase(self._session)
