# SPDX-License-Identifier: GPL-2.0-or-later
"""One trial: a guest, its migration, and what has happened to them."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import trio

from migrate.tasks import in_abandoned_thread
from tests.campaigns.chaos.world import ChaosWorld, LostError
from tests.support.daemons import listed
from tests.support.links import Link
from xenbackend.errors import NoSuchDomainError
from xenbackend.simulated.client import SimulatedHypervisor
from xenbackend.simulated.guest import WORKLOADS, GuestSpec

MIB = 2**20
END_S = 90.0
ANSWER_S = 40.0
"""How long a daemon that is not stopped may take to answer, on a busy machine."""
ARRIVED = ("completing", "completed")
WITH_HOLE = 0.3
"""The share of trials whose guest has memory on both sides of a hole for devices."""
BESIDE = 0.3
"""The share of trials in which another guest is migrated at the same time and must not notice."""
NAMES = "guest", 'gäst "☃" }'
"""The beginnings of a guest's name: one that JSON has as it is, and one that JSON escapes."""

T = TypeVar("T")
Line = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A fault that may happen."""

    name: str
    happen: Callable[[Trial], Awaitable[None]]
    notices: str = "all"
    """Which guests may notice the fault: ``all`` guests of a daemon, this ``guest``, or
    ``nobody``.
    """
    tls: bool = False
    """The fault can happen only if the link is encrypted."""
    protected: bool = False
    """The fault can happen only to a protected guest."""


@dataclass(frozen=True)
class Decision:
    """The decision of an operator about where the guest runs."""

    at: str
    here: bool
    force: bool

    def __str__(self) -> str:
        where, force = "here" if self.here else "elsewhere", " --force" if self.force else ""
        return f"{self.at}: decide {where}{force}"


def time_limit(r: random.Random, strategy: str) -> dict[str, Any]:
    """Return the time limit of a migration, or of most migrations none."""
    if r.random() < 0.7:
        return {}
    actions = ["cancel", "suspend", *(["postcopy"] if strategy != "precopy" else [])]
    return {"timeout_s": r.choice([0.001, r.uniform(0.01, 0.5)]), "on_timeout": r.choice(actions)}


@dataclass
class Trial:
    """One trial.  ``seed`` determines everything that the trial can determine."""

    seed: int
    world: ChaosWorld
    link: Link
    chosen: list[Fault] = field(default_factory=list)
    """The faults that happen."""
    faults: list[str] = field(default_factory=list)
    """What has happened, and when."""
    killing: trio.Lock = field(default_factory=trio.Lock)
    """Held while a daemon is killed, stopped, or sent a request, so that these follow each
    other.
    """
    lost_there: set[str] = field(default_factory=set)
    """The migrations that the sender had when the destination was lost with its state."""
    destroyed: bool = False
    """The guest was destroyed, at one end at least."""
    cancelled: set[str] = field(default_factory=set)
    """The migrations that a daemon has agreed to cancel."""
    again: list[str] = field(default_factory=list)
    """The daemons that have begun another migration of the guest."""
    checkpoint_damaged: bool = False
    """A checkpoint of the guest was damaged or removed."""
    older_entries: set[str] = field(default_factory=set)
    """The daemons that have found an entry of an older migration of the guest."""
    source_lost: bool = False
    """The source was destroyed while the destination lacked pages."""
    decisions: list[Decision] = field(default_factory=list)
    """The decisions that daemons have carried out."""
    may_run_twice: bool = False
    """An operator may have let the guest run at one end while it runs at the other end."""

    def __post_init__(self) -> None:
        r = self.random = random.Random(self.seed)
        memory = r.choice([4, 8, 16, 32, 64]) * MIB
        self.spec = GuestSpec(
            f"guest{self.seed}", memory, r.choice([1, 2, 4]), workload=r.choice(sorted(WORKLOADS)),
            working_set_bytes=memory // r.choice([1, 2, 8]),
            write_permille=r.choice([0, 300, 1000]), rate=r.choice([None, None, 2000]),
            zero_permille=r.choice([0, 250, 900]), seed=self.seed,
        )  # fmt: skip
        self.strategy = r.choice(["hybrid", "hybrid", "postcopy", "postcopy", "precopy"])
        self.bandwidth = r.choice([None, 16 * MIB, 64 * MIB])
        self.checkpoint_every_s = (
            r.choice([None, None, 0.02]) if self.strategy != "precopy" else None
        )
        if r.random() < 0.5:
            pages = min(200, (self.spec.pages - self.spec.working_pages) // 2)
            every = 1 if self.spec.workload == "idle" else r.choice([5, 50])
            # A page that is taken back between two checkpoints is not noticed (docs/recovery.md).
            back = self.checkpoint_every_s is None
            self.spec = replace(
                self.spec, balloon_pages=pages, balloon_every=every, balloon_back=back
            )
        self.kill_decided = r.choice([False, True])
        """Whether the sender is killed when it has answered an operator's decision."""
        self.beside = None
        if r.random() < BESIDE:
            self.beside = GuestSpec(
                f"beside{self.seed}", 8 * MIB, workload="random", seed=self.seed
            )
        if r.random() < WITH_HOLE:
            self.spec = replace(self.spec, mmio_hole_bytes=r.choice([memory, 1024 * MIB]))
        self.postcopy_bandwidth = r.choice([None, None, 0, 32 * MIB])
        self.policy = {"max_rounds": 2, **time_limit(r, self.strategy)}
        self.spec = replace(self.spec, name=f"{r.choice(NAMES)}{self.seed}")
        self.id = ""
        """The identifier of the first migration."""

    def __str__(self) -> str:
        spec = self.spec
        return (
            f"seed {self.seed}: {spec.memory_bytes // MIB} MiB, a hole of "
            f"{spec.mmio_hole_bytes // MIB} MiB, {spec.vcpus} vCPUs, "
            f"{spec.workload}, {self.strategy}, balloon of {spec.balloon_pages} pages, bandwidth "
            f"{self.bandwidth} and {self.postcopy_bandwidth}, {self.policy}, checkpoints "
            f"{self.checkpoint_every_s}, "
            f"{'TLS' if self.world.tls else 'no TLS'}, "
            f"{'another guest beside' if self.beside else 'alone'}; {', '.join(self.faults)}"
        )

    @property
    def happened(self) -> Counter[str]:
        """How often each kind of fault has happened."""
        besides = {"another guest beside": self.beside is not None}
        again = {"carried out again": len(self.again)}
        return Counter(fault.name for fault in self.chosen) + Counter(besides) + Counter(again)

    @property
    def abandoned(self) -> bool:
        """An operator has decided at the source that nothing of the guest is needed there."""
        return any(d.at == "sender" and not d.here for d in self.decisions)

    @property
    def nobody_may_notice(self) -> bool:
        return all(fault.notices == "nobody" for fault in self.chosen)

    def migration(self, domain: str, port: int) -> dict[str, Any]:
        """Return the request by which this trial migrates the guest ``domain`` to the receiver at
        ``port``.
        """
        return {
            "command": "migrate", "domain": domain, "destination": f"127.0.0.1:{port}",
            "strategy": self.strategy, "bandwidth": self.bandwidth, "policy": self.policy,
            "checkpoint_every_s": self.checkpoint_every_s,
            "postcopy_bandwidth": self.postcopy_bandwidth,
        }  # fmt: skip

    async def happen(self, fault: Fault, after_s: float) -> None:
        self.faults.append(f"{fault.name} after {after_s:.3f} s")
        await trio.sleep(after_s)
        await fault.happen(self)

    async def answered(self, call: Callable[..., T], *arguments: Any) -> T:
        """Return the answer of a daemon.  Raises :class:`LostError` if there is none."""
        with trio.move_on_after(ANSWER_S):
            return await in_abandoned_thread(call, *arguments)
        others = [argument for argument in arguments if argument is not self]
        raise LostError(
            f"no answer within {ANSWER_S:g} s: {getattr(call, '__name__', call)} {others}"
        )

    # ---- what the daemons show ----
    def lines(self, which: str) -> list[Line]:
        """Return the lines of this guest's migrations at a daemon."""
        return listed(self.world, which, self.spec.name)

    def migrations(self) -> set[str]:
        """Return the identifiers of this guest's migrations at the sender."""
        return {line["id"] for line in self.lines("sender")}

    def line(self, which: str) -> Line | None:
        """Return the line of the first migration."""
        return next((line for line in self.lines(which) if line["id"] == self.id), None)

    def has_arrived(self) -> bool:
        """Whether the guest is not protected any more, or its sender was killed after that, so that
        the successor has no migration.
        """
        lines = self.lines("sender")
        return not lines or any(line["phase"] in ARRIVED for line in lines)

    async def kill(self, *which: str) -> None:
        async with self.killing:
            for name in which:
                await in_thread(self.world.kill, name)
            await trio.sleep(self.random.choice([0, 0.1, 0.5]))
            for name in which:
                await in_thread(self.world.start_anew, name)


async def in_thread(call: Callable[..., T], *arguments: Any) -> T:
    return await trio.to_thread.run_sync(call, *arguments)


def destroy(host: SimulatedHypervisor, name: str) -> None:
    """Destroy the domain, if it exists."""
    with contextlib.suppress(NoSuchDomainError), host.open(name) as domain:
        domain.destroy()
