"""The fault server: a thread that waits for faults on the pull lane and answers each at once.

It shares nothing with the event loop but the backlog, so that a fault never queues behind the push.
"""

from __future__ import annotations

from migrate.errors import PeerClosedError
from migrate.messages import Fault, Lane
from migrate.session import Phase, Session
from migrate.statistics import SenderStatistics
from migrate.transport import LaneConnection, run_in_thread
from sender.backlog import Backlog
from sender.reader import announce_missing
from xenbackend.contract import Domain, PfnArray


class FaultServer:
    def __init__(
        self,
        domain: Domain,
        pull: LaneConnection,
        session: Session,
        backlog: Backlog,
        statistics: SenderStatistics,
    ):
        self._pull = pull
        self._session = session
        self._backlog = backlog
        self._statistics = statistics
        self._domain = domain
        self._stopping = False

    async def serve(self) -> None:
        """Until cancelled, or until the receiver, being done, has closed the lane."""
        await run_in_thread(self._serve, self._stop, urgent=True)

    def _stop(self) -> None:
        self._stopping = True
        self._pull.shut()

    def _serve(self) -> None:
        while True:
            try:
                self._pull.fill()
            except PeerClosedError:
                if self._stopping or self._session.phase is Phase.CLOSED:
                    return
                raise
            while (received := self._pull.pending()) is not None:
                message, _pages = received
                self._session.received(message, Lane.PULL)
                assert isinstance(message, Fault)
                wanted = self._backlog.fault(message.pfns)
                if len(wanted):
                    self._answer(wanted)

    def _answer(self, wanted: PfnArray) -> None:
        with self._domain.map_pages(wanted) as mapped:
            pages = announce_missing(wanted, mapped, self._backlog)
            if pages is None:
                return
            self._session.sent(pages, Lane.PULL)
            self._pull.send_blocking(pages, mapped.data)
        self._statistics.pull_pages += len(wanted)
        self._statistics.pull_zero_pages += len(pages.zeros)
