# SPDX-License-Identifier: GPL-2.0-or-later
"""What an estimate is made of, measured without a migration: the guest's writes, the link to the
destination, and whether the destination would take the guest in.

Log-dirty is on during the measurement of the guest.  However the measurement ends, log-dirty is
switched off then, unless another program uses it.  If the sender is killed meanwhile, its successor
switches log-dirty off.  The record is read and not emptied, so that a page counts once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import trio

from migrate.errors import MigrationError, PeerClosedError
from migrate.lanes.connection import LaneConnection, Terms, connect, step_timeout
from migrate.lanes.ends import RECEIVER
from migrate.lanes.latency import round_trip_s
from migrate.lanes.probe import OlderPeerError, greet, host_of
from migrate.lanes.scheduling import run_in_thread
from migrate.lanes.trial import TRIAL_S
from migrate.options import MigrationOptions
from migrate.protocol import messages as m
from migrate.protocol.pfns import PfnMask, mask_from_bitmap, pfn_array, sparseness
from sender.bandwidth import BandwidthCap
from sender.preflight import check_devices, check_free, check_state, log_dirty_is_used
from sender.push import BATCH_PAGES
from xenbackend.contract import Domain, DomainConfig, DomainId, Hypervisor
from xenbackend.errors import XenError
from xenbackend.pages import PAGE_SIZE, PageStatus

LOOKS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""When log-dirty is read, as shares of the time of the measurement."""
SAMPLE_PAGES = 4096
"""The number of pages in the sample from which the share of zero pages is taken."""
FIRST_CHUNK, LAST_CHUNK = 16 * PAGE_SIZE, 256 * 2**20
"""The bytes that are sent before the first confirmation, and the most between two of them."""
CHUNK_S = 0.5
"""A chunk that takes so long is the last one."""
PAGES_ALONE = 15


# ---- the guest ----
Noted = Callable[[], AbstractContextManager[None]]
"""Returns a context in which a note for a successor exists: log-dirty is on for the guest."""


@dataclass
class GuestMeasure:
    """The measurement of one guest, for ``seconds``.  :meth:`run` is called in a thread."""

    hypervisor: Hypervisor
    target: DomainId
    seconds: float
    noted: Noted
    take_log_dirty: bool = False
    """See :class:`MigrationOptions`."""
    config: DomainConfig = field(init=False)
    memory_pages: int = 0
    content_share: float = 1.0
    dirtied: list[tuple[float, int]] = field(default_factory=list)
    devices: str = ""
    """Why only a toolstack can move the guest; empty if a migration needs none."""

    def __post_init__(self) -> None:
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Have :meth:`run` return soon."""
        self._stopping.set()

    def check(self) -> None:
        """Raises as :func:`check_free`, and :class:`MigrationError` for a guest that cannot be
        migrated at all.
        """
        with self._opened() as domain:
            check_free(domain, MigrationOptions(take_log_dirty=self.take_log_dirty))
            self.config = domain.config()
            self.memory_pages = domain.info().tot_pages
            if problem := sparseness(self.config.nr_pfns, self.config.max_pages):
                raise MigrationError(problem)
            try:
                check_devices(domain, self.config.name)
            except MigrationError as error:
                self.devices = str(error)

    def run(self) -> None:
        """Measure.  Raises :class:`OccupiedError` or ``XenError``, and :class:`MigrationError` if
        another program has used log-dirty meanwhile.
        """
        with self._opened() as domain:
            check_state(domain)
            self.content_share = _content_share(domain)
            with _log_dirty(domain, self.noted):
                began = time.monotonic()
                before = np.zeros(domain.nr_pfns, dtype=bool)
                for share in LOOKS:
                    if self._stopping.wait(began + share * self.seconds - time.monotonic()):
                        return
                    written = mask_from_bitmap(domain.log_dirty(clean=False), domain.nr_pfns)
                    _check_kept(before, written)
                    before = written
                    at_s = time.monotonic() - began
                    self.dirtied.append((at_s, int(np.count_nonzero(written))))
                if not domain.log_dirty_is_on():
                    raise _TakenError

    def _opened(self) -> Domain:
        return self.hypervisor.open(self.target.domid, self.target.handle)


@contextlib.contextmanager
def _log_dirty(domain: Domain, noted: Noted) -> Iterator[None]:
    """Switch log-dirty on, and off at the end, unless another program uses it by then."""
    if domain.log_dirty_is_on():  # before it is noted as that of this sender
        raise log_dirty_is_used(domain.info().name)
    with noted():
        try:
            domain.log_dirty_enable()
        except XenError as error:
            if error.errno == errno.EBUSY:
                raise log_dirty_is_used(domain.info().name) from error
            domain.log_dirty_disable()  # log-dirty may be partly on
            raise
        try:
            yield
        except _TakenError:
            raise
        except BaseException:
            domain.log_dirty_disable()
            raise
        domain.log_dirty_disable()


class _TakenError(MigrationError):
    """Another program uses log-dirty, and loses what the guest writes if it is switched off."""

    def __init__(self) -> None:
        super().__init__(
            "another program has switched log-dirty off or emptied its record, so that the pages "
            "that the guest has written are unknown: end what else migrates or saves this guest"
        )


def _check_kept(before: PfnMask, written: PfnMask) -> None:
    """Raises :class:`_TakenError` if the record was emptied between two looks.  libxc switches
    log-dirty off and on again if it is on, and then reads and empties the record.
    """
    lost = np.count_nonzero(before & ~written)
    if lost > np.count_nonzero(before) // 2:  # a page that the guest gives away may be lost too
        raise _TakenError


def _content_share(domain: Domain) -> float:
    """Return which share of some pages is not zero."""
    count = min(domain.nr_pfns, SAMPLE_PAGES)
    chosen = np.sort(pfn_array(random.sample(range(domain.nr_pfns), count)))
    contents = zeros = 0
    for at in range(0, count, BATCH_PAGES):
        with domain.map_pages(chosen[at : at + BATCH_PAGES]) as mapped:
            contents += int(np.count_nonzero(mapped.status == PageStatus.DATA))
            zeros += int(np.count_nonzero(mapped.status == PageStatus.ZERO))
    return contents / (contents + zeros) if contents + zeros else 1.0


# ---- the destination ----
@dataclass
class Link:
    """What was measured of the link to a destination."""

    bytes_per_s: float = 0.0
    fault_s: float = 0.0
    round_trip_s: float = 0.0


@dataclass
class Found:
    """What is found out at the destination."""

    host: m.Host
    refusals: dict[bool, str]
    """Why the guest would be refused, with paging and without; empty if it would not."""
    is_encrypted: bool
    link: Link


@contextlib.asynccontextmanager
async def _connected(address: tuple[str, int], terms: Terms) -> AsyncIterator[LaneConnection]:
    lane = await connect(*address, terms)
    try:
        yield lane
    finally:
        lane.close()


async def try_destination(
    address: tuple[str, int],
    terms: Terms,
    config: DomainConfig,
    cap: float | None,
    known: Link | None,
) -> Found:
    """Ask the destination whether it would take the guest in, and measure the link, unless it is
    ``known``.  Nothing is made there.  ``cap``: the most bytes a second that are sent on average,
    or ``None``.

    Raises :class:`MigrationError`, also if the destination is of a release that cannot be tried.
    """
    where = "{}:{}".format(*address)
    async with _connected(address, terms) as lane:
        try:
            await greet(lane, terms, m.TRIAL)
        except OlderPeerError as error:
            raise MigrationError(
                f"{where} is of an older release, to which the way cannot be measured: install the "
                "same release there; a migration itself needs no measurement"
            ) from error
        host = await host_of(lane, RECEIVER)
        refusals = {paging: await _offered(lane, config, paging=paging) for paging in (True, False)}
        found = Found(host, refusals, terms.tls is not None, known or Link())
        if known is not None:
            return found
        stopping = threading.Event()

        def stop() -> None:
            stopping.set()
            lane.shut()

        measure = functools.partial(_measure_link, lane, found.link, cap, stopping)
        with trio.move_on_after(TRIAL_S) as limit:
            try:
                await run_in_thread(measure, stop)
            except PeerClosedError:
                if not limit.cancel_called:
                    raise
        if limit.cancel_called:
            raise PeerClosedError(
                f"{where} did not confirm what was sent to measure the link within {TRIAL_S:g} s"
            )
        return found


async def _offered(lane: LaneConnection, config: DomainConfig, *, paging: bool) -> str:
    """Return why the destination would refuse the guest; empty if it would not."""
    await lane.send(
        m.Offer(
            config.name, config.nr_pfns, config.max_pages, config.vcpus, config.platform, paging,
            b"", 0,
        )
    )  # fmt: skip
    with step_timeout("the destination did not answer the preflight"):
        answer, _pages = await lane.receive()
    return answer.reason if isinstance(answer, m.Refused) else ""


def _measure_link(
    lane: LaneConnection, link: Link, cap: float | None, stopping: threading.Event
) -> None:
    """Measure the rate at which the destination takes pages in, and the time of a page alone.

    The destination confirms that nothing was sent when it is this end's turn to measure.

    Each chunk is twice as large as the one before it, and the last one counts: by then neither the
    beginning of a connection nor the confirmation matters.
    """
    data = memoryview(random.randbytes(BATCH_PAGES * PAGE_SIZE))
    throttle, chunk, seconds = BandwidthCap(cap), FIRST_CHUNK, 0.0
    most = LAST_CHUNK if cap is None else min(LAST_CHUNK, max(cap * CHUNK_S, FIRST_CHUNK))
    _confirm(lane)
    while True:
        began = time.monotonic()
        for at in range(0, chunk, len(data)):
            _send(lane, data[: chunk - at])
        _confirm(lane)
        now = time.monotonic()
        seconds = now - began
        if seconds >= CHUNK_S or chunk * 2 > most:
            break
        if stopping.wait(throttle.spend(chunk, now)):
            return
        chunk *= 2
    alone = []
    for _number in range(PAGES_ALONE):
        began = time.monotonic()
        _send(lane, data[:PAGE_SIZE])
        _confirm(lane)
        alone.append(time.monotonic() - began)
    link.fault_s = statistics.median(alone)
    link.round_trip_s = round_trip_s(lane.fileno())
    link.bytes_per_s = chunk / max(seconds - link.fault_s, seconds / 2)


def _send(lane: LaneConnection, pages: memoryview) -> None:
    pfns = np.arange(len(pages) // PAGE_SIZE, dtype=np.uint64)
    lane.send_blocking(m.Pages(pfns), [pages])


def _confirm(lane: LaneConnection) -> None:
    """Wait until the destination has done all that was sent.  Raises :class:`MigrationError`."""
    lane.send_blocking(m.Barrier(0))
    answer, _pages = lane.receive_blocking()
    if isinstance(answer, m.Refused):
        raise PeerClosedError(f"the destination ended the measurement: {answer.reason}")
    if not isinstance(answer, m.Passed):
        raise MigrationError(f"the destination answered with {answer.type} instead of passed")
