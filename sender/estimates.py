# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests of ``estimate``: the guest and the link are measured, and what each strategy would take
is answered.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any

from migrate.control.client import Json
from migrate.control.server import ControlConnection
from migrate.errors import MigrationError, OccupiedError
from migrate.lanes.connection import Terms
from migrate.lanes.probe import free_bytes_of
from migrate.options import MigrationOptions, Strategy
from migrate.service.journal import Journal
from migrate.tasks import in_stoppable_thread, in_thread, task_group
from sender.estimate import Expected, Measured, expect, recommend
from sender.measure import Found, GuestMeasure, Link, try_destination
from sender.policy import Decision
from xenbackend.contract import DomainId, Hypervisor
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.pages import PAGE_SIZE

log = logging.getLogger(__name__)

LEAST_S, MOST_S = 0.1, 600.0
"""The bounds of the time for which a guest is measured."""
ALL = (Strategy.PRECOPY, Strategy.HYBRID, Strategy.POSTCOPY)


class Estimates:
    """The estimates that a daemon is making, at most one of each guest."""

    def __init__(self, hypervisor: Hypervisor, terms: Terms, journal: Journal):
        self._hypervisor, self._terms, self._journal = hypervisor, terms, journal
        self._measured: set[int] = set()
        """The numbers of the domains that are measured."""

    def end_predecessors(self) -> None:
        """Switch log-dirty off for the guests that a predecessor was measuring when it was killed.
        Called in a thread.
        """
        for domid, handle in self._journal.take_measured().items():
            try:
                with self._hypervisor.open(domid, handle) as domain:
                    if domain.log_dirty_is_on():
                        domain.log_dirty_disable()
                        log.warning(
                            "%s: log-dirty is off again: this sender was killed while it measured "
                            "the guest",
                            domain.info().name,
                        )
            except NoSuchDomainError:
                continue  # the guest has ended
            except XenError as error:
                log.error("log-dirty may still be on for domain %d: %s", domid, error)

    def check_unmeasured(self, domid: int) -> None:
        """Raises :class:`OccupiedError` if the domain is being measured, because log-dirty has one
        owner.
        """
        if self.measures(domid):
            raise OccupiedError(
                f"domain {domid} is being measured by `xen-postcopy estimate`, which takes a few "
                "seconds: try again"
            )

    def measures(self, domid: int) -> bool:
        """Whether the domain is being measured."""
        return domid in self._measured

    async def answer(
        self,
        request: Json,
        connection: ControlConnection,
        target: DomainId,
        address: tuple[str, int],
        options: MigrationOptions,
    ) -> None:
        """Answer a request.  If the client leaves, the measurement ends.  The caller has checked
        that nobody uses the domain.  Raises as :func:`estimate`.
        """
        seconds, link = _checked(request["seconds"]), _link(request.get("link"))

        async def end_with_client() -> None:
            while await connection.request() is not None:
                pass
            tasks.cancel_scope.cancel()

        self._measured.add(target.domid)
        try:
            async with task_group() as tasks:
                tasks.start_soon(end_with_client)
                handle = target.handle or b""  # the hypervisor has given one
                noted = functools.partial(self._journal.measuring, target.domid, handle)
                guest = GuestMeasure(
                    self._hypervisor, target, seconds, noted, options.take_log_dirty
                )
                found = await estimate(guest, address, options, self._terms, link)
                await connection.answer("result", **found)
                tasks.cancel_scope.cancel()
        finally:
            self._measured.remove(target.domid)


def _checked(value: Any) -> float:
    """Return the time of a measurement in a request.  Raises :class:`MigrationError`."""
    seconds = float(value)
    if not math.isfinite(seconds) or not LEAST_S <= seconds <= MOST_S:
        raise MigrationError(
            f"a guest is measured for {LEAST_S:g} to {MOST_S:g} seconds, not for {seconds:g}"
        )
    return seconds


def _link(known: Any) -> Link | None:
    """Return the link in a request, as an earlier estimate has measured it.  Raises
    :class:`MigrationError`.
    """
    if known is None:
        return None
    link = Link(float(known["bytes_per_s"]), known["page_us"] / 1e6, known["round_trip_us"] / 1e6)
    if not all(map(math.isfinite, vars(link).values())) or link.bytes_per_s <= 0:
        raise MigrationError(f"there is no such link: {known}")
    return link


async def estimate(
    guest: GuestMeasure,
    address: tuple[str, int],
    options: MigrationOptions,
    terms: Terms,
    known: Link | None,
) -> dict[str, Any]:
    """Measure the link, unless it is ``known``, and the guest, and return the estimate as JSON has
    it.  Cancellation ends both measurements, and log-dirty is off afterwards.

    Raises :class:`MigrationError` or ``XenError`` if there can be no estimate.
    """
    await in_thread(guest.check)
    cap = options.bandwidth_bytes_per_s
    found = await try_destination(address, terms, guest.config, cap, known)
    # One after the other: on a host with few CPUs the traffic would slow the guest down.
    await in_stoppable_thread(guest.run, guest.stop)
    measured = Measured(
        guest.memory_pages,
        guest.content_share,
        guest.dirtied,
        found.link.bytes_per_s,
        found.link.fault_s,
        found.link.round_trip_s,
    )
    return {
        "domain": guest.config.name,
        "domid": guest.target.domid,
        "destination": "{}:{}".format(*address),
        "measured": _facts(measured, guest, found),
        **_strategies(measured, options, found.refusals),
        "devices": guest.devices,
    }


def _facts(measured: Measured, guest: GuestMeasure, found: Found) -> dict[str, Any]:
    return {
        "memory_bytes": measured.memory_pages * PAGE_SIZE,
        "needed_bytes": guest.config.max_pages * PAGE_SIZE,
        "free_bytes": free_bytes_of(found.host),
        "content_share": round(measured.content_share, 3),
        "dirtied": [[round(at_s, 3), pages] for at_s, pages in measured.dirtied],
        "dirty_bytes_per_s": round(measured.dirty_bytes_per_s),
        "bytes_per_s": round(measured.bytes_per_s),
        "page_us": round(measured.fault_s * 1e6),
        "round_trip_us": round(measured.round_trip_s * 1e6),
        "encrypted": found.is_encrypted,
    }


def _strategies(
    measured: Measured, options: MigrationOptions, refusals: dict[bool, str]
) -> dict[str, Any]:
    """Return what each strategy is expected to take, and the best one."""
    shown: dict[str, Any] = {}
    possible = []
    for strategy in ALL:
        try:
            expected = expect(measured, dataclasses.replace(options, strategy=strategy))
        except MigrationError as error:  # options that contradict this strategy
            shown[strategy.value] = {"problem": str(error)}
            continue
        problem = refusals[strategy.pages_after_handover]
        if not problem and expected.ends_by is Decision.CANCEL:
            problem = f"it would be cancelled by {options.policy.limit}"
        shown[strategy.value] = {"problem": problem, **_figures(expected)}
        if not problem:
            possible.append(expected)
    if not possible:
        return {"strategies": shown, "recommended": None, "reason": ""}
    best, reason = recommend(possible, options.policy.downtime_target_ms)
    return {"strategies": shown, "recommended": best.strategy.value, "reason": reason}


def _figures(expected: Expected) -> dict[str, Any]:
    return {
        "total_s": round(expected.total_s, 3),
        "downtime_ms": round(expected.downtime_s * 1000, 1),
        "freeze_ms": round(expected.freeze_s * 1000, 1),
        "rounds": expected.rounds,
        "sent_bytes": expected.sent_pages * PAGE_SIZE,
        "missing_bytes": expected.missing_pages * PAGE_SIZE,
        "ends_by": expected.ends_by.value,
    }
