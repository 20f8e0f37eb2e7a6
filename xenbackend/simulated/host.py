# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated host: the process that stands for the hypervisor and its guests.

The process owns the domains (``hosted.py``) and answers control requests on a Unix socket.  Page
operations do not pass through it.  When a client ends, the p2m entries that it held are repaired,
as the real Xen finishes or undoes a hypercall of a dying process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import trio

from xenbackend.contract import DomainConfig
from xenbackend.errors import LOG_DIRTY, GuestOptionError, XenError, no_such_domain
from xenbackend.pages import PAGE_SIZE
from xenbackend.simulated._sim import ffi, lib
from xenbackend.simulated.guest import GuestSpec, available_bytes
from xenbackend.simulated.hosted import HostedDomain
from xenbackend.simulated.rpc import MAX_FDS, MAX_MESSAGE, pack, unpack

MAX_CLIENTS: int = lib.SIM_HOST_OWNER - 1
Reply = tuple[Any, list[int]]


class SimulatedHost:
    """A host with its domains, which share ``memory_bytes``.

    Each client has a thread, as each process in dom0 executes its hypercalls itself.  A guest is
    stopped during some of these requests, and a turn of an event loop takes longer than they do.
    The handlers (``op_``, one for each request) run under one lock.  A handler that takes a while
    returns the rest of its work, which is done without the lock.
    """

    def __init__(
        self,
        memory_bytes: int,
        *,
        populate_evicted: bool = True,
        paging: bool = True,
        drop_requests: bool = False,
        track_physmap: bool = False,
    ):
        self.memory_bytes = memory_bytes
        self.populate_evicted = populate_evicted
        self.paging = paging
        self.drop_requests = drop_requests
        self.track_physmap = track_physmap
        self.domains: dict[int, HostedDomain] = {}
        self.gone: list[dict[str, Any]] = []
        self._next_domid = 1
        self._claimed: dict[int, int] = {}
        """The number of bytes that each domain may have, even if it has fewer."""
        self._clients: set[int] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the guests.  Called while no client is served."""
        for domain in self.domains.values():
            domain.close()
        self.domains.clear()

    # ---- clients ----
    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Serve clients until cancelled.  ``listener``: a SOCK_SEQPACKET socket."""
        connections: set[socket.socket] = set()

        async def serve_client(connection: socket.socket) -> None:
            connections.add(connection)
            with connection:
                await trio.to_thread.run_sync(
                    self._serve_client, connection, limiter=trio.CapacityLimiter(1)
                )
                connections.discard(connection)

        async with trio.open_nursery() as nursery:
            try:
                while True:
                    accepted, _address = await listener.accept()
                    connection = socket.socket(fileno=accepted.detach())
                    connection.setblocking(True)
                    nursery.start_soon(serve_client, connection)
            finally:
                for connection in connections:
                    with contextlib.suppress(OSError):  # the client may have gone
                        connection.shutdown(socket.SHUT_RDWR)  # this ends its thread

    def _serve_client(self, connection: socket.socket) -> None:
        with self._lock:
            free = set(range(1, MAX_CLIENTS + 1)) - self._clients
            client = min(free) if free else 0
            self._clients.add(client)
        try:
            while data := connection.recv(MAX_MESSAGE):
                answer, fds = self._answer(client, data)
                socket.send_fds(connection, [pack(answer)], fds)
        except OSError:
            pass  # the client is gone, which several errors of the socket can show
        finally:
            with self._lock:
                for domain in self.domains.values():
                    lib.sim_repair(domain.map, client)
                    domain.drop_hold_map(client)
                    if domain.pager == client:
                        domain.pager = 0
                self._clients.discard(client)

    def _answer(self, client: int, data: bytes) -> tuple[dict[str, Any], list[int]]:
        operation = "request"
        try:
            request = unpack(data)
            operation = str(request.pop("op"))
            if operation == "hello":
                if not client:
                    raise XenError("hello", errno.EUSERS, why="too many clients")
                return {"ok": {"client": client}}, []
            handler: Callable[..., Any] = getattr(self, f"op_{operation}")
            with self._lock:
                self._check_refused(client, operation, request)
                result = handler(**request)
            if callable(result):
                result = result()
            result, fds = result if isinstance(result, tuple) else (result, [])
            assert len(fds) <= MAX_FDS
            return {"ok": result}, fds
        except XenError as error:
            return {"operation": error.operation, "errno": error.errno, "error": error.why}, []
        except GuestOptionError as error:
            return {"operation": operation, "errno": errno.EINVAL, "error": str(error)}, []
        except OSError as error:
            number = error.errno or errno.EIO
            return {"operation": operation, "errno": number, "error": os.strerror(number)}, []
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            return {
                "operation": operation,
                "errno": errno.ENOSYS,
                "error": f"bad request: {error!r}",
            }, []

    def _check_refused(self, client: int, operation: str, request: dict[str, Any]) -> None:
        domain = self.domains.get(request.get("domid", -1))
        if domain is not None and operation in domain.refused[1] and client != domain.refused[0]:
            raise XenError(operation, errno.EBUSY)

    def _domain(self, domid: int) -> HostedDomain:
        domain = self.domains.get(domid)
        if domain is None:
            raise no_such_domain(domid)
        return domain

    # ---- making and ending domains ----
    def _free(self, leaving: int | None = None) -> int:
        """Return the number of bytes that no domain has or has reserved."""
        taken = 0
        for domid, claimed in self._claimed.items():
            domain = self.domains.get(domid)  # ``None`` while the domain is being made or ended
            has = domain.dom.tot_pages * PAGE_SIZE if domain is not None else 0
            taken += max(claimed, has) if domid != leaving else 0
        return self.memory_bytes - taken

    def _problems(
        self, config: DomainConfig, paging: bool, leaving: int | None = None
    ) -> list[tuple[int, str]]:
        """Return the reasons why this domain cannot be built here: errno, and the remedy.
        ``leaving``: a domid that does not count.
        """
        problems = []
        if any(
            domain.config.name == config.name
            for domid, domain in self.domains.items()
            if domid != leaving
        ):
            text = f"a domain named {config.name!r} is there already: rename or destroy it first"
            problems.append((errno.EEXIST, text))
        free = self._free(leaving)
        if config.max_pages * PAGE_SIZE > free:
            text = (
                f"not enough memory: the guest needs {config.max_pages * PAGE_SIZE >> 20} MiB and "
                f"{max(free, 0) >> 20} MiB are free: make room or choose another host"
            )
            problems.append((errno.ENOMEM, text))
        return problems + self._paging_problems(paging)

    def _paging_problems(self, paging: bool) -> list[tuple[int, str]]:
        why = "this hypervisor is built without memory paging"
        remedy = "use --strategy precopy or another hypervisor"
        return [(errno.ENOSYS, f"{why}: {remedy}")] if paging and not self.paging else []

    def _build(
        self, config: DomainConfig, leaving: int | None = None, wanted_domid: int | None = None
    ) -> HostedDomain:
        spec = GuestSpec.from_bytes(config.platform)
        if not spec.handle:
            spec = dataclasses.replace(spec, handle=os.urandom(16))
            config = dataclasses.replace(config, platform=spec.to_bytes())
        if (config.nr_pfns, config.vcpus) != (
            spec.nr_pfns,
            spec.vcpus,
        ) or config.max_pages > config.nr_pfns:
            raise XenError("create", errno.EINVAL, why="the configuration contradicts itself")
        problems = self._problems(config, False, leaving)
        if problems:
            number, text = problems[0]
            raise XenError("create", number, why=text)
        domid = self._next_domid if wanted_domid is None else wanted_domid
        if domid in self.domains:
            raise XenError("create", errno.EEXIST, why=f"there is a domain {domid} already")
        self._next_domid = max(self._next_domid, domid + 1)
        self._claimed[domid] = config.max_pages * PAGE_SIZE
        try:
            domain = HostedDomain(domid, spec, config)
        except BaseException:
            del self._claimed[domid]
            raise
        domain.dom.drops = self.drop_requests
        domain.dom.tracks_physmap = self.track_physmap
        self.domains[domid] = domain
        return domain

    def op_create(self, spec: bytes, domid: int | None = None) -> Callable[[], int]:
        guest = GuestSpec.from_bytes(spec)
        guest.check_image()
        available = available_bytes()
        most = guest.content_bytes
        if most > available:
            why = f"the guest takes up to {most >> 20} MiB, and this machine has "
            why += f"{available >> 20} MiB available: make it smaller"
            raise XenError("create", errno.ENOMEM, why=why)
        domain = self._build(guest.domain_config(), wanted_domid=domid)

        def boot() -> int:
            domain.boot()
            return domain.domid

        return boot

    def op_create_incoming(self, config: dict[str, Any], leaving: int | None) -> int:
        return self._build(DomainConfig(**config), leaving).domid

    def op_destroy(self, domid: int) -> Callable[[], None]:
        """Destroy a domain.  No client finds the domain any more at once; its memory is freed
        later, by the function that is returned.
        """
        domain = self._domain(domid)
        domain.dom.ended_suspended = domain.suspended
        del self.domains[domid]

        def end() -> None:
            if not domain.suspended:
                lib.sim_host_pause(domain.native)
            report = domain.report()
            with self._lock:
                self.gone = [*self.gone[-99:], report]
            domain.close()
            with self._lock:
                del self._claimed[domid]

        return end

    # ---- the other requests, each with one method ----
    def op_list(self) -> list[dict[str, Any]]:
        return [domain.info() for domain in self.domains.values()]

    def op_history(self) -> list[dict[str, Any]]:
        return [
            {**report, "vcpu": [{"count": v["count"]} for v in report["vcpu"]]}
            for report in self.gone
        ]

    def op_preflight(self, config: dict[str, Any] | None, paging: bool) -> dict[str, Any]:
        problems = (
            self._problems(DomainConfig(**config), paging)
            if config
            else self._paging_problems(paging)
        )
        return {"problems": [text for _number, text in problems], "populate_evicted": self._way}

    def op_free(self) -> int:
        return max(self._free(), 0)

    def op_domain_preflight(self, domid: int, client: int) -> dict[str, Any]:
        domain = self._domain(domid)
        problems = self._paging_problems(True)
        if domain.ring_fds and domain.pager != client:
            problems.append(
                (errno.EBUSY, "its paging ring is in use by another pager: end that one first")
            )
        return {"problems": [text for _number, text in problems], "populate_evicted": self._way}

    @property
    def _way(self) -> str:
        return "none" if not self.paging else "native" if self.populate_evicted else "fallback"

    def op_attach(self, domid: int) -> Reply:
        domain = self._domain(domid)
        return {"populate_evicted": self.populate_evicted}, [domain.control_fd, domain.memory_fd]

    def op_hold_map(self, domid: int, client: int) -> Reply:
        return None, [self._domain(domid).hold_map(client)]

    def op_info(self, domid: int) -> dict[str, Any]:
        return self._domain(domid).info()

    def op_config(self, domid: int) -> dict[str, Any]:
        return self._domain(domid).config.__dict__

    def op_report(self, domid: int) -> dict[str, Any]:
        return self._domain(domid).report()

    def op_rename(self, domid: int, name: str) -> None:
        domain = self._domain(domid)
        domain.config = dataclasses.replace(domain.config, name=name)

    def op_refuse(self, domid: int, client: int, operations: list[str]) -> None:
        self._domain(domid).refused = client, frozenset(operations)

    def op_suspend(self, domid: int) -> None:
        self._domain(domid).suspend()

    def op_resume(self, domid: int) -> None:
        self._domain(domid).resume()

    def op_pause(self, domid: int) -> None:
        domain = self._domain(domid)
        lib.sim_host_pause(domain.native)
        domain.paused += 1

    def op_shut_down(self, domid: int, reboot: bool) -> None:
        """The guest's kernel ends the guest.  A toolstack is to destroy the domain."""
        self._domain(domid).shut_down(reboot=reboot)

    def op_unpause(self, domid: int) -> None:
        domain = self._domain(domid)
        if not domain.paused:
            raise XenError("unpause", errno.EINVAL, why="the domain is not paused")
        domain.paused -= 1
        lib.sim_host_unpause(domain.native)

    def op_start(self, domid: int) -> None:
        self._domain(domid).start()

    def op_context(self, domid: int) -> bytes:
        return self._domain(domid).context()

    def op_set_context(self, domid: int, context: bytes) -> None:
        self._domain(domid).set_context(context)

    def op_log_dirty(self, domid: int, enable: bool) -> None:
        """Enable or disable log-dirty.  The domain is stopped for the change, so that no write is
        in progress between off and on.
        """
        domain = self._domain(domid)
        if enable and domain.dom.log_dirty:
            raise XenError("enable_logdirty", errno.EBUSY, why=LOG_DIRTY)
        lib.sim_host_pause(domain.native)
        domain.dom.log_dirty = enable
        bitmap_bytes = (domain.dom.nr_pfns + 63) // 64 * 8
        for bitmap in (domain.map.dirty, domain.map.untracked):
            ffi.memmove(bitmap, bytes(bitmap_bytes), bitmap_bytes)
        lib.sim_host_unpause(domain.native)

    def op_set_max_pages(self, domid: int, pages: int) -> None:
        """Set the limit of frames.  The vCPUs are stopped meanwhile, so that no frame is being
        added.
        """
        domain = self._domain(domid)
        lib.sim_host_pause(domain.native)
        domain.dom.max_pages = pages
        lib.sim_host_unpause(domain.native)

    def op_has_pager(self, domid: int) -> bool:
        return bool(self._domain(domid).ring_fds)

    def op_reserve(self, domid: int, pages: int) -> None:
        domain = self._domain(domid)
        more = max(pages - domain.dom.tot_pages, 0) * PAGE_SIZE
        if more > self._free(leaving=domid) - domain.dom.tot_pages * PAGE_SIZE:
            raise XenError("claim_pages", errno.ENOMEM, why="not enough memory")
        self._claimed[domid] = pages * PAGE_SIZE

    def op_paging_enable(self, domid: int, client: int) -> Reply:
        if not self.paging:
            raise XenError(
                "mem_paging_enable",
                errno.ENOSYS,
                why="this hypervisor is built without memory paging",
            )
        domain = self._domain(domid)
        fds = domain.paging_enable()
        domain.pager = client
        return None, fds

    def op_paging_attach(self, domid: int, client: int) -> Reply:
        domain = self._domain(domid)
        if not domain.ring_fds:
            raise XenError("paging_attach", errno.ENODEV, why="the domain has no paging ring")
        if domain.pager:
            raise XenError("paging_attach", errno.EBUSY, why="the domain's pager lives")
        domain.pager = client
        return None, domain.ring_fds

    def op_paging_disable(self, domid: int) -> None:
        self._domain(domid).paging_disable()
