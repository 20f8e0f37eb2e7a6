# SPDX-License-Identifier: GPL-2.0-or-later
"""Who suspends, resumes and destroys the source domain.

:class:`OwnToolstack`: this daemon (``xen-postcopy migrate``).

:class:`XlToolstack`: xl, which started the helper and does what the daemon asks for through the
helper.  When the destination is ready, the helper ends.  Then the two halves of xl agree at which
end the guest runs, and the source half destroys the domain or resumes it, by which the daemon sees
the decision.  If the exchange between the halves is cut, xl may do neither.  Then the receiver's
report decides: the receiver has seen whether the guest runs at the destination.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import select
from collections.abc import Callable
from typing import Protocol

import trio

from migrate.control.server import ControlConnection, LastAnswer
from migrate.errors import MigrationError
from migrate.protocol.pfns import PfnMask
from migrate.tasks import first
from migrate.units import pauses
from sender import source_pages
from sender.dirty import DirtyLog
from sender.ownership import State
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.pages import PfnArray

log = logging.getLogger(__name__)

LOOK_EVERY_S, LOOK_AT_LAST_EVERY_S = 0.05, 2.0
"""At what xl does: mostly in a moment, now and then not before an administrator looks."""
XL_TIMEOUT_S = 5.0
"""How long xl may take to resume a guest that runs nowhere, before we do it."""
XL_PATIENCE_S = 300.0
"""How long xl may take to destroy the domain of a guest that runs at the destination.  One hotplug
script can take half a minute, and nobody waits for xl.  The program that started the helper may
also be a daemon, which never ends.
"""
UNKNOWN_XL_S = 60.0
"""The same, where it is not known whether xl still runs."""


class StaysHereError(MigrationError):
    """The guest continues at the source: the toolstack has decided so, or the destination has given
    the guest up before the guest ran there.
    """


class Toolstack(Protocol):
    destroys_source: bool
    """The toolstack destroys the source domain when it has given the guest away: this process holds
    the pages that the destination lacks.
    """
    after_switchover: State
    """Who has the guest when the destination is ready."""

    async def agreed(self) -> None:
        """The destination has accepted the guest, and the migration begins."""

    def track_device_model(self, enable: bool) -> None:
        """Have the pages that the device model writes recorded as dirty, or not any more.  To be
        called in a thread of trio's, and so is :meth:`suspend`.
        """

    def suspend(self, domain: Domain) -> None:
        """Suspend the guest.  Raises :class:`MigrationError` or ``XenError`` if that fails."""

    def hold(self, domain: Domain, missing: PfnMask) -> None:
        """Keep the pages of a set readable, if the domain may be destroyed before the destination
        has the pages.
        """

    def before_decision(
        self, domain: Domain, missing: Callable[[], PfnArray], dirty_log: DirtyLog
    ) -> None:
        """The destination gets ready, and lacks the pages that ``missing`` finds among those that
        have changed.  Called in a thread, with the guest suspended.
        """

    async def give_up(self, domain: Domain, reason: str, *, suspended: bool) -> None:
        """The guest goes on here."""

    async def switched_over(self) -> None:
        """The destination has all but the missing pages, and is the guest's pager."""

    async def decision(self, domain: Domain) -> bool:
        """Wait for the decision: true if the guest goes on at the destination."""

    def may_decide(self) -> bool:
        """The toolstack may still decide at which end the guest runs."""

    def overrule(self) -> None:
        """An operator has decided instead, and the toolstack does nothing more about the domain."""

    async def has_left(self) -> None:
        """Wait until the toolstack does nothing more about the domain."""

    async def finish(self, domain: Domain) -> None:
        """Destroy the source domain, or wait until the toolstack does: nothing of it is needed."""

    def close(self) -> None:
        """Can be called twice."""


def _resume(domain: Domain, name: str = "") -> None:
    """Resume a domain that is still suspended.  ``name``: the name that xl has changed."""
    if domain.state() is DomainState.SUSPENDED:
        if name:
            log.warning("xl has left %s suspended: resuming it", name)
            domain.rename(name)
        domain.resume()


class OwnToolstack:
    destroys_source = False
    after_switchover = State.HANDED_OVER

    async def agreed(self) -> None:
        pass

    def track_device_model(self, enable: bool) -> None:
        pass

    def suspend(self, domain: Domain) -> None:
        domain.suspend()

    def hold(self, domain: Domain, missing: PfnMask) -> None:
        pass

    def before_decision(
        self, domain: Domain, missing: Callable[[], PfnArray], dirty_log: DirtyLog
    ) -> None:
        pass

    async def give_up(self, domain: Domain, reason: str, *, suspended: bool) -> None:
        if suspended:
            await trio.to_thread.run_sync(_resume, domain)

    async def switched_over(self) -> None:
        pass

    async def decision(self, domain: Domain) -> bool:
        return True

    def may_decide(self) -> bool:
        return False

    def overrule(self) -> None:
        pass

    async def has_left(self) -> None:
        pass

    async def finish(self, domain: Domain) -> None:
        await trio.to_thread.run_sync(domain.destroy)

    def close(self) -> None:
        pass


class XlToolstack:
    """``helper``: the connection of the helper, after its request; ``None``: the helper of a
    predecessor.

    ``name``: the domain's name, which xl changes on the way.  ``xl``: the process that started the
    helper; 0: the process is not known.
    """

    destroys_source = True
    after_switchover = State.UNDECIDED

    def __init__(self, name: str, helper: ControlConnection | None = None, xl: int = 0):
        self._name = name
        self._helper = helper
        self._asking = trio.Lock()
        self._answers, self._heard = trio.open_memory_channel[int](math.inf)
        self._agreed = self._overruled = False
        self._xl: int | None = None
        """A descriptor of that process (pidfd), so that no other is taken for it later."""
        if xl > 1:  # 1: it was dead already, and the helper init's
            with contextlib.suppress(OSError):
                self._xl = os.pidfd_open(xl)
        self.last_answer = LastAnswer(helper)
        """The helper is told how it ended."""

    async def listen(self) -> None:
        """Hear the helper's answers until it goes away."""
        assert self._helper is not None
        with self._answers:
            while (answer := await self._helper.request()) is not None:
                self._answers.send_nowait(int(answer["answer"]))

    async def _ask(self, event: str, **fields: object) -> int:
        if self._helper is None:
            raise MigrationError("xl's helper has gone")
        async with self._asking:
            try:
                await self._helper.answer(event, **fields)
                return await self._heard.receive()
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel):
                raise MigrationError("xl, or its helper, has gone") from None

    async def agreed(self) -> None:
        await self._ask("agreed")
        self._agreed = True

    def track_device_model(self, enable: bool) -> None:
        if trio.from_thread.run(functools.partial(self._ask, "log_dirty", enable=enable)):
            raise MigrationError("xl could not have the device model record what it writes")

    def suspend(self, domain: Domain) -> None:
        if trio.from_thread.run(self._ask, "suspend") != 1:
            raise MigrationError("xl could not suspend the guest")

    def hold(self, domain: Domain, missing: PfnMask) -> None:
        source_pages.hold(domain, missing)

    def before_decision(
        self, domain: Domain, missing: Callable[[], PfnArray], dirty_log: DirtyLog
    ) -> None:
        domain.hold(missing())  # a page that was written since may be another frame now
        self.track_device_model(False)
        dirty_log.disable()

    async def give_up(self, domain: Domain, reason: str, *, suspended: bool) -> None:
        """xl resumes a guest that it has suspended; where it is not there to do it, we do."""
        await self.last_answer.give("error" if self._agreed else "declined", message=reason)
        if not suspended:
            return
        with trio.move_on_after(XL_TIMEOUT_S):
            if self._xl is None:
                await self.decision(domain)
            else:
                await first(functools.partial(self.decision, domain), self.has_left)
        await trio.to_thread.run_sync(_resume, domain, self._name)

    async def switched_over(self) -> None:
        await self.last_answer.give("result")

    async def decision(self, domain: Domain) -> bool:
        for pause_s in pauses(LOOK_EVERY_S, LOOK_AT_LAST_EVERY_S):
            try:
                state = await trio.to_thread.run_sync(domain.state)
            except NoSuchDomainError:
                break
            except XenError as error:  # that may pass
                log.warning("%s: its state is not known: %s", self._name, error)
                await trio.sleep(pause_s)
                continue
            if state is not DomainState.SUSPENDED:
                return False
            await trio.sleep(pause_s)
        return True

    def may_decide(self) -> bool:
        """True also if it is not known whether xl still runs."""
        return self._xl is None or not select.select([self._xl], [], [], 0)[0]

    def overrule(self) -> None:
        self._overruled = True

    async def has_left(self) -> None:
        """Wait for the end of xl's process: what xl has not done by then, xl will not do."""
        if self._overruled:
            return
        with trio.move_on_after(XL_PATIENCE_S if self._xl is not None else UNKNOWN_XL_S):
            if self._xl is None:
                await trio.sleep_forever()
            else:
                await trio.lowlevel.wait_readable(self._xl)

    def close(self) -> None:
        if self._xl is not None:
            os.close(self._xl)
            self._xl = None

    async def finish(self, domain: Domain) -> None:
        """Destroy the domain if xl has ended and left the domain.  Usually xl has destroyed the
        domain, which then goes with the last of its pages.
        """
        with contextlib.suppress(NoSuchDomainError):
            await trio.to_thread.run_sync(domain.state)
            await self.has_left()
            info = await trio.to_thread.run_sync(domain.info)
            log.warning(
                "xl has left %s suspended here, and it runs at the destination: destroying it",
                info.name,
            )
            await trio.to_thread.run_sync(domain.destroy)
