# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend contract: everything that the daemons ask of a hypervisor.

Calls are synchronous and may take a while, as hypercalls do.  Calls on pages take batches and
release the GIL, so a daemon runs the long ones in a thread.  Page contents are passed as one buffer
of 4096-byte pages; pfns are ``uint64`` arrays.  Errors are :class:`XenError` with Xen's errno.

Names and meanings are Xen's (xen/include/public/memory.h, domctl.h, tools/include/xenctrl.h).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from xenbackend.pages import Buffer, MappedPages, NativePages, PfnArray
from xenbackend.ring import PagingRing

SUSPENDS_LATE_S = 60.0
"""How long a guest that did not suspend in time may still suspend after that."""


class DomainState(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    INCOMING = "incoming"
    """The domain is being restored, and has never run here."""
    SHUT_DOWN = "shut down"
    """The guest has ended itself, or reboots, and its domain is still here."""
    CRASHED = "crashed"


class End(Enum):
    """How a domain ended that is gone.  DESTROYED: also if nothing is known of it any more."""

    DESTROYED = "its domain was destroyed"
    SUSPENDED = "its domain was destroyed after it had been suspended"  # saved, or migrated
    SHUT_DOWN = "it has shut down"
    REBOOTED = "it has rebooted"
    CRASHED = "it has crashed"


@dataclass(frozen=True)
class DomainConfig:
    """What the destination needs to build an empty domain."""

    name: str
    nr_pfns: int
    """One more than the highest pfn that the guest can have."""
    max_pages: int
    """The number of frames that the domain may own."""
    vcpus: int
    platform: bytes
    """The backend's own description; opaque to the daemons."""


@dataclass(frozen=True)
class ToolstackPorts:
    """Event channels that a toolstack has made for a domain which it lets us restore."""

    store: int
    console: int
    store_domid: int = 0
    """The domain in which xenstored runs."""
    console_domid: int = 0


@dataclass(frozen=True)
class DomainId:
    """The identity of a domain, from the moment at which the domain was found."""

    domid: int
    handle: bytes | None
    """``None`` if a release that did not note handles has noted the domain."""
    name: str = dataclass_field(compare=False)
    """The domain's name, for people."""


@dataclass(frozen=True)
class DomainInfo:
    domid: int
    name: str
    state: DomainState
    nr_pfns: int
    tot_pages: int
    vcpus: int
    reason: str = ""
    """Why the domain crashed, or how the guest has ended itself."""
    handle: bytes = bytes(16)
    """The domain's UUID (``xen_domain_handle_t``).  Another domain can have the domid later."""
    paged_pages: int = 0
    """The number of pages whose contents are not at this host."""

    @property
    def id(self) -> DomainId:
        return DomainId(self.domid, self.handle, self.name)


class Reservation(NamedTuple):
    """The numbers of frames that a domain has and may have."""

    tot_pages: int
    """The frames that the domain owns.  A frame that is held and was given away counts until
    nothing refers to the frame.
    """
    max_pages: int
    paged_pages: int
    """The number of paged-out pages, which have no frames."""


@dataclass(frozen=True)
class Preflight:
    """Whether a host can take a domain in.  ``problems``: the reasons, each with what to do."""

    problems: tuple[str, ...]
    populate_evicted: str
    """``native`` (the hypercall), ``fallback`` (populate, nominate, evict) or ``none``."""


class Domain(ABC):
    """A handle to one domain.  Closing the handle does not change the domain."""

    domid: int
    handle: bytes
    """The domain's handle at the time when it was opened.  If another domain has the domid now,
    this domain is gone.
    """
    nr_pfns: int
    has_keeper = False
    """A predecessor's keeper has the held pages."""

    @abstractmethod
    def info(self) -> DomainInfo:
        """Return what is known of the domain.  Raises :class:`NoSuchDomainError` if it is gone."""

    @abstractmethod
    def state(self) -> DomainState:
        """Return the state of :meth:`info`, by a cheap call, which is made many times a second."""

    @abstractmethod
    def config(self) -> DomainConfig: ...

    def devices(self) -> list[str]:
        """Return the kinds of devices, except consoles, that a toolstack has given the domain."""
        return []

    @abstractmethod
    def cpu_policy(self) -> tuple[bytes, bytes]:
        """Return the CPUID leaves and the MSRs of the domain's CPUs, as libxc's stream has them:
        ``xen_cpuid_leaf_t[]`` and ``xen_msr_entry_t[]``.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up mappings and references.  A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @abstractmethod
    def preflight(self) -> Preflight:
        """Check whether this domain could be paged here now.  Changes nothing."""

    @abstractmethod
    def rename(self, name: str) -> None: ...

    @abstractmethod
    def reservation(self) -> Reservation: ...

    @abstractmethod
    def set_max_pages(self, pages: int) -> None:
        """Set the number of frames that the domain may have (XEN_DOMCTL_max_mem).

        A domain that has more frames keeps them and gets no further frame: its own requests for
        memory fail, and so does :meth:`populate` (ENOMEM).  A request that is in progress during
        this call has taken effect when log-dirty is next enabled or read.
        """

    # ---- running ----
    @abstractmethod
    def suspend(self) -> None:
        """Stop the guest where its context can be taken.  Returns when no vCPU runs.

        Raises ``XenError``.  ETIMEDOUT means that the guest was asked to suspend and has not done
        so in time.  It may still suspend, for :data:`SUSPENDS_LATE_S` at most.
        """

    @abstractmethod
    def resume(self) -> None:
        """Resume a guest that was suspended here."""

    @abstractmethod
    def start(self) -> None:
        """Run a restored domain for the first time at this host.

        If a frame that the guest registers by number is paged out, the guest dies.
        """

    @abstractmethod
    def pause(self) -> None:
        """Pause the domain.  Returns when no vCPU runs or is inside the hypervisor.  Pauses are
        counted, and the guest does not notice them.
        """

    @abstractmethod
    def unpause(self) -> None: ...

    @abstractmethod
    def destroy(self) -> None: ...

    @abstractmethod
    def end(self) -> End:
        """Return how the domain, which is gone, ended."""

    @abstractmethod
    def has_run(self) -> bool:
        """Return whether the guest has run in this domain, which may be gone.  False if nothing is
        known of the domain any more.
        """

    @abstractmethod
    def context(self) -> bytes:
        """Return the vCPU and device context of a suspended domain, which is opaque."""

    @abstractmethod
    def set_context(self, context: bytes) -> None:
        """Give the domain a context.  Raises ``XenError`` (EINVAL) for bytes that are no context of
        such a domain.
        """

    @abstractmethod
    def toolstack_gfns(self) -> tuple[int, int]:
        """Return the gfns of the rings of xenstore and of the console, from the context."""

    # ---- log-dirty ----
    @abstractmethod
    def log_dirty_enable(self) -> None:
        """Record every written page from now on.  No page counts as dirty yet.

        EBUSY if log-dirty is on.  The first user would miss the pages that a second user takes out
        of the record.

        Xen 4.17 and 4.18 do not record that a pfn loses or gets a frame.  They do not record writes
        to a new frame until :meth:`log_dirty` cleans the record.
        """

    @abstractmethod
    def log_dirty_disable(self) -> None:
        """Stop the record.  Only the user that has enabled log-dirty may call this."""

    @abstractmethod
    def log_dirty_is_on(self) -> bool:
        """Return whether log-dirty is on.  Changes nothing.

        If log-dirty was off for a while, the record lacks what was written then, and does not show
        that.  Therefore call this method after the record was taken.
        """

    @abstractmethod
    def log_dirty(self, *, clean: bool) -> NDArray[np.uint8]:
        """Return the dirty log, and with ``clean`` begin an empty one (XEN_DOMCTL_SHADOW_OP_PEEK,
        _CLEAN).

        The result is a bitmap of at least ``nr_pfns`` bits, least significant bit first.
        """

    # ---- pages ----
    @abstractmethod
    def map_pages(self, pfns: PfnArray) -> MappedPages:
        """Map pages to read them without a copy.  The reference that a mapping takes ends with the
        mapping.
        """

    @abstractmethod
    def hold(self, pfns: PfnArray) -> None:
        """Keep pages readable, with their contents, by ``map_pages`` of this handle, even if the
        domain is destroyed.

        The domain runs or is suspended, and may continue.  The frame that is at a pfn now is held.
        If the guest may have put another frame there since (the pfn is log-dirty then), the pfn has
        to be held again.  Holes are skipped.  Raises EIO for a page whose contents are not here.
        """

    @abstractmethod
    def release(self, pfns: PfnArray) -> None:
        """Release held pfns, which are not needed any more.  ``close`` releases all others."""

    @abstractmethod
    def keep(self, path: Path) -> None:
        """Start a keeper of the held pages at ``path`` (:mod:`xenbackend.keeper`), also of those
        that are held later.  ``close`` ends the keeper.  A second call does nothing.

        Raises ``XenError`` if the keeper cannot be started.
        """

    def holds_are_lost(self) -> bool:
        """Return whether held pages were lost although :meth:`close` was not called."""
        return False

    @abstractmethod
    def present(self, pfns: PfnArray) -> NDArray[np.bool_]:
        """Return which of the pfns are memory of the domain, present or paged out."""

    @abstractmethod
    def reserve(self, pages: int) -> None:
        """Reserve memory of the host, so that this domain can have ``pages`` pages in all,
        including those that it has.

        The reservation replaces an earlier one; 0 ends it.  Populating and loading use the
        reservation up, and freed memory does not return to it.  Raises ``XenError`` (ENOMEM) if the
        host has too little memory.
        """

    @abstractmethod
    def populate(self, pfns: PfnArray) -> None:
        """Give holes and paged-out pfns a frame of unknown contents.  EINVAL if a pfn has a frame,
        or is beyond the largest possible pfn.
        """

    @abstractmethod
    def depopulate(self, pfns: PfnArray) -> None:
        """Make populated pfns holes (XENMEM_decrease_reservation).  EINVAL for a hole, and for a
        paged-out pfn.
        """

    @abstractmethod
    def write_pages(self, pfns: PfnArray, pages: Buffer | None) -> None:
        """Write to populated pfns; ``None`` writes zeros.  ENOENT for a pfn that is paged out."""

    @abstractmethod
    def pinned(self, pfns: PfnArray) -> PfnArray:
        """Return those of the pfns, which are ascending, that the hypervisor or the toolstack
        accesses by number, and that must be present before the guest runs (invariant 9).

        The result may contain further pfns, but lacks none.  A mapping of a page by a program is no
        reason to be in it.  The domain runs or is suspended.
        """

    @abstractmethod
    def held(self, pfns: PfnArray) -> PfnArray:
        """Return those of the pfns that other programs have mapped, by a grant or as a foreign
        page, possibly with pages of the pinned set.  Empty if the hypervisor does not report them.
        """

    def device_memory(self, pfns: PfnArray) -> PfnArray:
        """Return those of the pfns that are memory of an emulated device, such as video memory.
        The device model maps all of it before the guest runs.
        """
        return pfns[:0]

    # ---- paging ----
    @abstractmethod
    def has_pager(self) -> bool:
        """Return whether the domain has a paging ring, with or without a process that serves it."""

    @abstractmethod
    def paging_enable(self) -> PagingRing:
        """Become the domain's pager.  EBUSY if the domain has one."""

    @abstractmethod
    def paging_attach(self) -> PagingRing:
        """Become the successor of a pager that died.  Requests that it had not answered are
        returned again.

        vCPUs that fault wait until then.  ENODEV if the domain has no pager of ours.  EBUSY if its
        pager lives.
        """

    @abstractmethod
    def paging_disable(self) -> None:
        """Give the ring up.  A guest that touches a paged-out pfn afterwards crashes.

        A vCPU whose request is not answered before this call waits for ever.  Therefore pause the
        domain, answer the requests in the ring, and only then call this.  EBUSY while vCPUs wait
        for a slot in a full ring: answer, and try again.
        """

    @abstractmethod
    def populate_evicted(self, pfns: PfnArray) -> None:
        """Make holes and populated pfns paged out; their contents are discarded.

        Stops at the first pfn that cannot be evicted (EBUSY: extra references, type counts, mmio,
        broken, paged already).  ``XenError.done`` is the number of pfns that were evicted.  ENODEV
        without a ring.
        """

    @abstractmethod
    def paged_out(self) -> PfnArray:
        """Return all pfns whose contents are not here.  Only the pager calls this, while it loads
        no page.
        """

    @abstractmethod
    def load(self, pfns: PfnArray, pages: Buffer | None) -> NDArray[np.int32]:
        """Give paged-out pfns their contents (``None``: zeros).  Returns for each pfn 0,
        ``-ENOENT`` if the pfn is not paged out, or ``-ENOMEM`` while the host has no memory for it.

        The guest sees the page when this method returns.  A page that is present is never
        overwritten.
        """

    def native_pages(self) -> NativePages | None:
        """Return the calls for ``migrate/fastpath/api.py``, or ``None`` if the backend does not
        support the fast path.
        """
        return None


class Hypervisor(ABC):
    """One host's Xen."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def domains(self) -> list[DomainInfo]: ...

    @abstractmethod
    def open(self, domid: int, handle: bytes | None = None) -> Domain:
        """Open a domain by its number.  A number is never looked up as a name: see
        :func:`xenbackend.find.find_domain`.

        ``handle``: the handle that was noted with the number; ``None`` if none was noted.  Raises
        :class:`NoSuchDomainError`, also if another domain has this number now.
        """

    @abstractmethod
    def preflight(self, config: DomainConfig | None, *, paging: bool) -> Preflight:
        """Check whether ``config`` (``None``: any) can be built and paged here; change nothing."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the memory that new domains can have now, in bytes."""

    @abstractmethod
    def create_incoming(self, config: DomainConfig, *, instead_of: Domain | None = None) -> Domain:
        """Make an empty domain, all holes, into which a guest is restored.  EEXIST if its name is
        in use.  ENOMEM if there is not enough memory.

        ``config.max_pages`` are reserved for the domain.

        ``instead_of``: a domain that is about to be destroyed, after its pages have been moved into
        the new one.  Neither its name nor its memory counts.
        """

    @abstractmethod
    def abandoned(self, config: DomainConfig, *, instead_of: Domain | None = None) -> list[Domain]:
        """Return domains that :meth:`create_incoming` has made with these arguments and that never
        ran.

        A process may have died after that call and before it noted the domid.  Call this method
        when no other migration of this guest to this host can be in progress.
        """

    @abstractmethod
    def reopen_incoming(
        self, domid: int, config: DomainConfig, *, lent: bool, handle: bytes | None = None
    ) -> Domain:
        """Open a domain that a process which has died was restoring, or had started.  ``lent``: the
        domain belongs to a toolstack.

        ``handle`` and errors are as in :meth:`open`.
        """

    @abstractmethod
    def bind_incoming(self, domid: int, config: DomainConfig, ports: ToolstackPorts) -> Domain:
        """Open the empty domain that a toolstack made for the restore.  The toolstack starts and
        destroys the domain.

        Raises :class:`NoSuchDomainError`, and ``XenError`` (EINVAL) if the domain is of another
        kind than ``config``.
        """
