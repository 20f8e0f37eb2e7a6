# SPDX-License-Identifier: GPL-2.0-or-later
"""Who suspends, resumes and destroys the source domain.

:class:`OwnToolstack`: this daemon (``xen-postcopy migrate``).

:class:`XlToolstack`: xl, which started the helper and does what the daemon asks for through the
helper.  When the destination is ready, the helper ends.  Then the two halves of xl agree at which
end the guest runs, and the source half destroys the domain or resumes it.  The daemon reads the
decision from the state of the domain.  If the exchange between the halves is cut, xl may do
neither.  Then the receiver's report decides, because the receiver has seen whether the guest runs
at the destination.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import trio

from migrate.control.server import ControlConnection, LastAnswer
from migrate.errors import MigrationError
from migrate.protocol.pfns import PfnMask
from migrate.tasks import first, poll_in_thread
from migrate.units import pauses
from sender import source_pages
from sender.dirty import DirtyLog
from sender.ownership import State
from xenbackend.contract import Domain, DomainState
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.pages import PfnArray

log = logging.getLogger(__name__)

LOOK_EVERY_S, LOOK_AT_LAST_EVERY_S = 0.05, 2.0
"""The first and the longest pause between two polls of what xl has done with the domain.  Usually
xl acts at once, but sometimes only when an administrator intervenes.
"""
XL_TIMEOUT_S = 5.0
"""How long xl may take to resume a guest that runs nowhere.  After this time the sender resumes
it.
"""
XL_DESTROY_TIMEOUT_S = 300.0
"""How long xl may take to destroy the domain of a guest that runs at the destination.  One hotplug
script can take half a minute, and no guest waits for xl.  The program that started the helper may
also be a daemon, which never ends.
"""
UNKNOWN_XL_S = 60.0
"""How long xl may take to destroy the domain, if xl may have ended without this sender noticing."""


class StaysHereError(MigrationError):
    """The guest continues at the source, because the toolstack has decided so, or because the
    destination has given the guest up before it ran there.
    """


class Toolstack(Protocol):
    """What depends on the toolstack.  The methods that do nothing in :class:`OwnToolstack` are for
    a toolstack with a program of its own, or one that decides where the guest runs.

    ``sender/daemon.py`` uses ``listen`` and ``last_answer`` of :class:`XlToolstack` besides: the
    conversation with the helper.
    """

    destroys_source: bool
    """The toolstack destroys the source domain when it has given the guest away.  This process then
    holds the pages that the destination lacks, and a keeper keeps them if this process is killed.
    """
    moves_devices: bool
    """The toolstack gives the guest its devices at the destination."""
    after_switchover: State
    """The state when the destination is ready."""

    async def agreed(self) -> None:
        """Begin the migration, because the destination has accepted the guest."""

    def begin_copy(self, domain: Domain) -> None:
        """Have the pages that the device model writes recorded as dirty, until the toolstack has
        its last answer.  This method and :meth:`suspend` are called in a thread of trio's.
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
        """Prepare the domain for the toolstack's decision, while the destination becomes ready.
        ``missing``: finds the changed pages that the destination lacks.  Called in a thread, with
        the guest suspended.
        """

    async def give_up(self, domain: Domain, reason: str, *, suspended: bool) -> None:
        """Give the migration up, so that the guest continues here."""

    async def switched_over(self) -> None:
        """Report that the destination has all but the missing pages, and is the guest's pager."""

    async def decision(self, domain: Domain) -> bool:
        """Wait for the decision.  Returns true if the guest continues at the destination."""

    def may_decide(self) -> bool:
        """Return whether the toolstack may still decide at which end the guest runs."""

    def overrule(self) -> None:
        """Note that an operator has decided instead, so that the toolstack is not waited for."""

    async def wait_for_end(self) -> None:
        """Wait until the toolstack does nothing more about the domain."""

    async def finish(self, domain: Domain) -> None:
        """Destroy the source domain, or wait until the toolstack does.  Nothing of the domain is
        needed any more.
        """

    def close(self) -> None:
        """Release the resources.  A second call does nothing."""


def _resume(domain: Domain, name: str = "") -> None:
    """Resume a domain that is still suspended.  ``name``: the name that the domain had before."""
    if domain.state() is DomainState.SUSPENDED:
        if name:
            log.warning("xl has left %s suspended: resuming it", name)
            domain.rename(name)
        domain.resume()


class OwnToolstack:
    destroys_source = moves_devices = False
    after_switchover = State.HANDED_OVER

    async def agreed(self) -> None:
        pass

    def begin_copy(self, domain: Domain) -> None:
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

    async def wait_for_end(self) -> None:
        pass

    async def finish(self, domain: Domain) -> None:
        await trio.to_thread.run_sync(domain.destroy)

    def close(self) -> None:
        pass


class XlToolstack:
    """xl, by its helper.  ``helper``: the connection of the helper, after its request; ``None`` for
    the helper of a predecessor.

    ``name``: the domain's name, which xl changes during the migration.  ``keeper``: the path of the
    keeper's socket.  ``xl``: the process that started the helper; 0: the process is not known.
    """

    destroys_source = moves_devices = True
    after_switchover = State.UNDECIDED

    def __init__(
        self, name: str, keeper: Path, helper: ControlConnection | None = None, xl: int = 0
    ):
        self._name, self._keeper = name, keeper
        self._helper = helper
        self._asking = trio.Lock()
        self._answers, self._received = trio.open_memory_channel[int](math.inf)
        self._agreed = self._overruled = False
        self._xl: int | None = None
        """A descriptor of that process (pidfd), so that no later process is taken for it."""
        if xl > 1:  # 1: the process had ended, and init has adopted the helper
            with contextlib.suppress(OSError):
                self._xl = os.pidfd_open(xl)
        self.last_answer = LastAnswer(helper)
        """The helper's last answer, which has the end of the migration."""

    async def listen(self) -> None:
        """Receive the helper's answers until the helper ends."""
        assert self._helper is not None
        with self._answers:
            while (answer := await self._helper.request()) is not None:
                self._answers.send_nowait(int(answer["answer"]))

    async def _ask(self, event: str, **fields: object) -> int:
        if self._helper is None:
            raise MigrationError("xl's helper has ended")
        async with self._asking:
            try:
                await self._helper.answer(event, **fields)
                return await self._received.receive()
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel):
                raise MigrationError("xl, or its helper, has ended") from None

    async def agreed(self) -> None:
        await self._ask("agreed")
        self._agreed = True

    def begin_copy(self, domain: Domain) -> None:
        self._keep(domain)  # later the guest would write, or be suspended, meanwhile
        if trio.from_thread.run(functools.partial(self._ask, "log_dirty", enable=True)):
            raise MigrationError("xl could not have the device model record what it writes")

    def suspend(self, domain: Domain) -> None:
        if trio.from_thread.run(self._ask, "suspend") != 1:
            raise MigrationError("xl could not suspend the guest")

    def hold(self, domain: Domain, missing: PfnMask) -> None:
        source_pages.hold(domain, missing)
        self._keep(domain)

    def _keep(self, domain: Domain) -> None:
        try:
            domain.keep(self._keeper)
        except XenError as error:
            about = "%s: if this sender is killed, pages of the guest may be lost: %s"
            log.error(about, self._name, error)

    def before_decision(
        self, domain: Domain, missing: Callable[[], PfnArray], dirty_log: DirtyLog
    ) -> None:
        domain.hold(missing())  # again, because a written page may have another frame now
        dirty_log.disable()

    async def give_up(self, domain: Domain, reason: str, *, suspended: bool) -> None:
        """Wait until xl resumes a guest that xl has suspended.  If xl does not, the sender does."""
        await self.failed(reason)
        if not suspended:
            return
        with trio.move_on_after(XL_TIMEOUT_S):
            if self._xl is None:
                await self.decision(domain)
            else:
                await first(functools.partial(self.decision, domain), self.wait_for_end)
        await trio.to_thread.run_sync(_resume, domain, self._name)

    async def failed(self, reason: str) -> None:
        """Report that the migration has failed, unless its end was reported already."""
        await self.last_answer.give("error" if self._agreed else "declined", message=reason)

    async def switched_over(self) -> None:
        await self.last_answer.give("result")

    async def decision(self, domain: Domain) -> bool:
        def look() -> bool | None:
            try:
                return None if domain.state() is DomainState.SUSPENDED else False
            except NoSuchDomainError:
                return True
            except XenError as error:  # the error may pass
                log.warning("%s: its state is not known: %s", self._name, error)
                return None

        return await poll_in_thread(look, pauses(LOOK_EVERY_S, LOOK_AT_LAST_EVERY_S))

    def may_decide(self) -> bool:
        """Return whether xl may decide; true also if it is not known whether xl still runs."""
        if self._xl is None:
            return True
        ended = select.poll()
        ended.register(self._xl, select.POLLIN)
        return not ended.poll(0)

    def overrule(self) -> None:
        self._overruled = True

    async def wait_for_end(self) -> None:
        """Wait for the end of xl's process, after which xl does nothing more."""
        if self._overruled:
            return
        with trio.move_on_after(XL_DESTROY_TIMEOUT_S if self._xl is not None else UNKNOWN_XL_S):
            if self._xl is None:
                await trio.sleep_forever()
            else:
                await trio.lowlevel.wait_readable(self._xl)

    def close(self) -> None:
        if self._xl is not None:
            os.close(self._xl)
            self._xl = None

    async def finish(self, domain: Domain) -> None:
        """Destroy the domain if xl has ended and left the domain suspended.  Usually xl has
        destroyed it, and Xen removes it when the last of its pages is released.
        """
        with contextlib.suppress(NoSuchDomainError):
            await trio.to_thread.run_sync(domain.state)
            await self.wait_for_end()
            info = await trio.to_thread.run_sync(domain.info)
            if info.state in (DomainState.RUNNING, DomainState.PAUSED):
                log.error("xl has resumed %s here: it is not destroyed", info.name)
                return
            log.warning(
                "xl has left %s suspended here, and it runs at the destination: destroying it",
                info.name,
            )
            await trio.to_thread.run_sync(domain.destroy)
