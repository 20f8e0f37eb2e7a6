# SPDX-License-Identifier: GPL-2.0-or-later
"""What the conformance suite needs of a backend besides the contract: guests, and a process that
holds their pages.

:class:`SimulatedLab` is here; the real Xen's lab is ``tests/xenlab/dom0/lab.py``.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from migrate.cli.world import World
from migrate.protocol.pfns import NO_PFNS
from tests.conftest import MIB, clear
from tests.support import waiting
from xenbackend.contract import Domain, DomainConfig, Hypervisor
from xenbackend.pages import PAGE_SIZE, PfnArray
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.guest import GuestSpec


class Lab(ABC):
    """One host.  Everything that a test makes is removed when the test ends, except a guest that
    can be used again.
    """

    hypervisor: Hypervisor
    beyond: int
    """A pfn that no domain can have."""
    attach: list[str]
    """Arguments for ``tests/support/pager_process.py`` to find the host."""
    enough: int
    """The amount of work that shows that a guest runs."""
    still_s: float
    """A guest that does no work for this time is stopped."""
    requests_pinned = False
    """Whether Xen requests a missing page that a guest registers by its number, as from 4.18 on."""

    @abstractmethod
    def guest(self, *, kernel: bool = False) -> Domain:
        """Return a guest without a ring, which runs, writes its memory, and checks what it reads.

        ``kernel``: a guest with the kernel of an operating system, which registers some of its
        pages with the hypervisor, and registers them again when it resumes.  Tests of the pinned
        set, and of how a kernel suspends, use such a guest; any other test gets the smallest guest.
        """

    @abstractmethod
    def config(self, nr_pfns: int = 1024) -> DomainConfig:
        """Return the configuration of an empty domain."""

    def incoming(self, nr_pfns: int = 1024) -> Domain:
        return self.hypervisor.create_incoming(self.config(nr_pfns))

    @abstractmethod
    def config_beside(self, source: Domain) -> DomainConfig:
        """Return the source's configuration with another name, to restore the guest on the same
        host.
        """

    @abstractmethod
    def another(self) -> Hypervisor:
        """Return a handle of the same host as another process has it.  What the handle holds is
        released when it is closed.
        """

    @abstractmethod
    def work(self, domain: Domain) -> int:
        """Return how much the guest has done so far: the work of the vCPU that has done least."""

    def wait_for_work(self, domain: Domain, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until the guest has done some more work."""
        before = self.work(domain)

        def worked() -> bool:
            meanwhile()
            return self.work(domain) >= before + self.enough

        until(worked, "the guest does nothing")

    def stands_still(self, domain: Domain) -> bool:
        """Whether the guest does no work for a moment."""
        time.sleep(self.still_s / 3)
        before = self.work(domain)
        time.sleep(self.still_s)
        return self.work(domain) == before

    @abstractmethod
    def errors(self, domain: Domain) -> int:
        """Return how often the guest has read other contents than it had written."""

    @abstractmethod
    def toolstack_pages(self, domain: Domain) -> PfnArray:
        """Return the pages that are pinned because dom0 uses them (xenstore's and the console's
        rings).
        """

    @abstractmethod
    def close(self) -> None:
        """Remove what a test has made; called after each test."""

    @abstractmethod
    def hold(self, domain: Domain, pfn: int) -> contextlib.AbstractContextManager[None]:
        """Hold a reference to the page, as another program would."""


class SimulatedLab(Lab):
    beyond = 2**40
    enough, still_s = 100, 0.3

    def __init__(self, world: World, name: str):
        self._world, self._name, self._count = world, name, 0
        self.simulated: SimulatedHypervisor = world.source
        self.hypervisor = self.simulated
        self.attach = ["--simulated", str(world.directory / "source.sock")]

    def close(self) -> None:
        clear(self._world)

    def boot(self, memory: int = 4 * MIB, vcpus: int = 2, **options: object) -> SimulatedDomain:
        """Boot a guest for a test of the simulated host itself."""
        spec = GuestSpec(self._name, memory, vcpus, **options)  # type: ignore[arg-type]
        return self.simulated.create_guest(spec.to_bytes())

    def empty(self) -> SimulatedDomain:
        return self.simulated.create_incoming(self.config())

    def guest(self, *, kernel: bool = False) -> Domain:
        return self.boot(workload="random", write_permille=500, working_set_bytes=2 * MIB)

    def config(self, nr_pfns: int = 1024, vcpus: int = 1) -> DomainConfig:
        self._count += 1
        return GuestSpec(
            f"{self._name}-in{self._count}", nr_pfns * PAGE_SIZE, vcpus
        ).domain_config()

    def config_beside(self, source: Domain) -> DomainConfig:
        spec = GuestSpec.from_bytes(source.config().platform)
        self._count += 1
        return GuestSpec(
            **{**spec.__dict__, "name": f"{spec.name}-in{self._count}"}
        ).domain_config()

    def another(self) -> Hypervisor:
        return SimulatedHypervisor(self._world.directory / "source.sock")

    def work(self, domain: Domain) -> int:
        assert isinstance(domain, SimulatedDomain)
        return int(min(vcpu["count"] for vcpu in domain.report()["vcpu"]))

    def errors(self, domain: Domain) -> int:
        assert isinstance(domain, SimulatedDomain)
        return sum(vcpu["errors"] for vcpu in domain.report()["vcpu"])

    def toolstack_pages(self, domain: Domain) -> PfnArray:
        return NO_PFNS

    @contextlib.contextmanager
    def hold(self, domain: Domain, pfn: int) -> Iterator[None]:
        assert isinstance(domain, SimulatedDomain)
        domain.set_page(pfn, refs=1)
        yield
        domain.set_page(pfn, refs=0)


LAB_WAIT_S = 240.0


def until(condition: Callable[[], object], what: str, timeout_s: float = LAB_WAIT_S) -> None:
    """Wait as :func:`tests.support.waiting.until` does, for a hypervisor that may be emulated."""
    waiting.until(condition, what, timeout_s)
