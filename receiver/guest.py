# SPDX-License-Identifier: GPL-2.0-or-later
"""The incoming domain, and what a pager needs of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from migrate.protocol import messages as m
from receiver.outstanding import OutstandingPages
from receiver.restore import FrameLimit
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import NoSuchDomainError
from xenbackend.ring import PagingRing


class Holdings:
    """What this process has open of the domain, from the moment at which the domain exists."""

    def __init__(self) -> None:
        self.domain: Domain | None = None
        """``None`` if there is no domain yet, or if the domain was released."""
        self._closing = ExitStack()

    def add_domain(self, domain: Domain) -> Domain:
        self.domain = domain
        self._closing.callback(domain.close)
        return domain

    def add(self, close: Callable[[], None]) -> None:
        """Have ``close`` called when the domain is released."""
        self._closing.callback(close)

    def release(self) -> None:
        """Close what is open.  The domain itself is not changed."""
        self._closing.close()
        self.domain = None


@dataclass(frozen=True)
class Guest:
    offer: m.Offer
    domain: Domain
    ring: PagingRing | None
    """``None`` if no page is missing."""
    pages: OutstandingPages
    limit: FrameLimit

    def state(self) -> DomainState | None:
        """Return the domain's state, or ``None`` if the domain does not exist any more."""
        return state_of(self.domain)


def state_of(domain: Domain) -> DomainState | None:
    """Return the domain's state, or ``None`` if the domain does not exist any more."""
    try:
        return domain.state()
    except NoSuchDomainError:
        return None
