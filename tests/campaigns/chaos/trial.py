# SPDX-License-Identifier: GPL-2.0-or-later
"""One trial: a guest, its migration, what happens to them, and the end that the guest must have."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import trio

from migrate.cli.world import verify_migrated, wait_for_steps
from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from migrate.outcomes import ENDED
from migrate.tasks import in_abandoned_thread, task_group
from tests.campaigns.chaos.world import ChaosWorld, LostError
from tests.support.daemons import listed
from tests.support.links import Link
from xenbackend.contract import DomainState
from xenbackend.errors import NoSuchDomainError
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.guest import WORKLOADS, GuestSpec
from xenbackend.simulated.verify import verify

MIB = 2**20
WINDOW_S = 0.7
"""The time in which faults happen."""
END_S = 90.0
ANSWER_S = 40.0
"""How long a daemon that is not stopped may take to answer, on a busy machine."""
DESTROYED_S = 3.0
"""After this time an operator destroys what is left of a guest that was destroyed at one end."""
WATCH_EVERY_S = 0.03
NO_WAY_BACK = "cannot continue here"
"""A part of the answer to a decision for a source whose checkpoint is damaged."""
ARRIVED = ("completing", "completed")
WITH_HOLE = 0.3
"""The share of trials whose guest has memory on both sides of a hole for devices."""
BESIDE = 0.3
"""The share of trials in which another guest is migrated at the same time and must not notice."""
PROTECTED = 0.4
"""The share of trials with checkpoints in which one fault is of the kind that needs them."""

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
    faults: list[str] = field(default_factory=list)
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

    # ---- the order of the steps ----
    async def run(self, faults: list[Fault]) -> str:
        """Run the trial.  Returns where the guest was in the end.  Raises :class:`LostError`."""
        possible = [
            f
            for f in faults
            if (self.world.tls or not f.tls)
            and (self.checkpoint_every_s is not None or not f.protected)
            and not (self.beside is not None and f.notices == "all")
        ]
        count = self.random.choice([1, 1, 2, 3]) if possible else 0
        self.chosen = [self.random.choice(possible) for _ in range(count)]
        protected = [fault for fault in possible if fault.protected]
        if protected and self.random.random() < PROTECTED:
            self.chosen[0] = self.random.choice(protected)
        beside = await in_thread(self._begin_beside)
        await in_thread(self._begin)
        async with task_group() as watching:
            watching.start_soon(self._watch)
            async with task_group() as tasks:
                if self.strategy == "hybrid":
                    tasks.start_soon(self._end_precopy)
                for fault in self.chosen:
                    tasks.start_soon(self.happen, fault, self.random.uniform(0, WINDOW_S))
            self.link.to = ("127.0.0.1", self.world.port)
            self.link.restore()
            await self._settle()
            watching.cancel_scope.cancel()
        where: str = await in_thread(self._verify)
        await in_thread(self._check_outcome, where)
        if beside is not None:
            await in_thread(self._verify_beside, beside)
        await in_thread(self.world.end_hang_ups)
        self.world.check()
        return where

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

    def _begin(self) -> None:
        guest = self.world.source.create_guest(self.spec.to_bytes())
        wait_for_steps(guest, 5 if self.spec.workload == "idle" else 50)
        guest.close()
        with self.world.control("sender") as client:
            client.send(**self.migration(self.spec.name, self.link.port))
            answer = client.answer()
        assert answer is not None
        self.id = answer["id"]

    def _begin_beside(self) -> ControlClient | None:
        if self.beside is None:
            return None
        self.world.source.create_guest(self.beside.to_bytes()).close()
        client = self.world.control("sender")
        client.send(
            command="migrate", domain=self.beside.name, destination=f"127.0.0.1:{self.world.port}",
            strategy=self.random.choice(["hybrid", "postcopy"]), bandwidth=8 * MIB,
            policy={"max_rounds": 2},
        )  # fmt: skip
        return client

    async def happen(self, fault: Fault, after_s: float) -> None:
        self.faults.append(f"{fault.name} after {after_s:.3f} s")
        await trio.sleep(after_s)
        await fault.happen(self)

    async def answered(self, call: Callable[..., T], *arguments: Any) -> T:
        """Return the answer of a daemon.  Raises :class:`LostError` if there is none."""
        with trio.move_on_after(ANSWER_S):
            return await in_abandoned_thread(call, *arguments)
        raise LostError(
            f"no answer within {ANSWER_S:g} s: {getattr(call, '__name__', call)} {arguments}"
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

    # ---- meanwhile ----
    async def _end_precopy(self) -> None:
        """Have pages missing after precopy in most trials with ``hybrid``.  Otherwise the sender
        would send the few pages of these guests before the handover.
        """
        await trio.sleep(self.seed % 8 / 20)
        request = {"command": "postcopy-now", "migration": self.id}
        async with self.killing:
            with contextlib.suppress(MigrationError):
                await self.answered(functools.partial(self.world.ask, "sender", **request))

    async def _watch(self) -> None:
        """Raises :class:`LostError` if the guest runs at both ends and no operator may have caused
        that.
        """
        while not self.may_run_twice:
            if await in_thread(self._runs_twice) and not self.may_run_twice:
                raise LostError("the guest runs at both ends")
            await trio.sleep(WATCH_EVERY_S)

    def _runs_twice(self) -> bool:
        """Whether the same domain runs at the source before and after a domain runs at the
        destination.
        """

        def running(host: SimulatedHypervisor) -> set[int]:
            return {
                info.domid
                for info in host.domains()
                if info.name == self.spec.name and info.state is DomainState.RUNNING
            }

        before = running(self.world.source)
        return bool(before and running(self.world.destination)) and bool(
            before & running(self.world.source)
        )

    # ---- the end ----
    async def _settle(self) -> None:
        began = time.monotonic()
        while True:
            mine = {which: await self.answered(self.lines, which) for which in self.world.daemons}
            if all(line["phase"] in ENDED for lines in mine.values() for line in lines):
                return
            waited_s = time.monotonic() - began
            if waited_s > END_S:
                raise LostError(f"it does not end: {mine}")
            if self.destroyed and waited_s > DESTROYED_S and self._loss_is_known(mine):
                for host in (self.world.source, self.world.destination):
                    await in_thread(destroy, host, self.spec.name)
            if self.decisions and waited_s > DESTROYED_S:
                await self.answered(self._clean_up, mine)
            for which, lines in mine.items():
                for line in lines:
                    if line.get("paused"):
                        await self.answered(self._resume, which, line["id"])
                    with contextlib.suppress(MigrationError):
                        decided = await self.answered(self._encourage, which, line["id"])
                        if decided and self.kill_decided:
                            self.kill_decided = False
                            await trio.sleep(self.random.uniform(0, 0.06))
                            self.faults.append("sender killed after the decision")
                            await self.kill("sender")
            await trio.sleep(0.05)

    def _resume(self, which: str, migration: str) -> None:
        with contextlib.suppress(MigrationError):  # the migration may have ended meanwhile
            self.world.ask(which, command="resume", migration=migration)

    def _loss_is_known(self, mine: dict[str, list[Line]]) -> bool:
        """Whether the sender has reported to the receiver that pages are lost."""
        return not self.source_lost or all(
            line["phase"] in ("lost", *ENDED) for line in mine["receiver"] if line["id"] == self.id
        )

    def _clean_up(self, mine: dict[str, list[Line]]) -> None:
        """After a wrong decision an operator decides again, or destroys a guest that cannot
        continue.
        """
        for which, line in [(w, line) for w in ("sender", "receiver") for line in mine[w]]:
            if line["id"] != self.id or line["phase"] in ENDED:
                continue
            with contextlib.suppress(MigrationError):  # the migration may have ended meanwhile
                match which, line["phase"]:
                    case "receiver", "held":
                        self._check_held(line)
                        self._decide(Decision("receiver", here=False, force=False))
                    case "receiver", "lost" | "interrupted" | "in doubt" if (
                        self.abandoned
                        or Decision("receiver", here=True, force=True) in self.decisions
                    ):
                        destroy(self.world.destination, self.spec.name)
                    case "sender", "interrupted" if (
                        Decision("receiver", here=False, force=False) in self.decisions
                        or Decision("receiver", here=False, force=True) in self.decisions
                    ):
                        self._decide(Decision("sender", here=True, force=True))

    def _check_held(self, line: Line) -> None:
        """Check that a guest that is shown as ``held`` does not run."""
        running = [
            info
            for info in self.world.destination.domains()
            if info.name == self.spec.name and info.state is DomainState.RUNNING
        ]
        if running and "is paused here" in line["problem"]:
            raise LostError(
                f"the guest runs at the destination, and is shown as: {line['problem']}"
            )

    def _decide(self, decision: Decision) -> None:
        """Make a decision.  Raises :class:`MigrationError` if the daemon refuses."""
        self.may_run_twice |= decision.here
        self.world.ask(
            decision.at, command="decide", migration=self.id, here=decision.here,
            force=decision.force,
        )  # fmt: skip
        self.decisions.append(decision)

    def _encourage(self, which: str, migration: str) -> bool:
        """Do what an operator would do.  Returns whether a decision was needed, and accepted."""
        if migration in self.lost_there and which == "sender":
            for force in (False, True):  # without a checkpoint only --force lets the guest continue
                try:
                    self.world.ask(
                        which, command="decide", migration=migration, here=True, force=force
                    )
                    return True
                except MigrationError as error:  # the daemon has not noticed the loss yet
                    if force and self.checkpoint_damaged and NO_WAY_BACK in str(error):
                        self._decide(Decision("sender", here=False, force=False))
                        return True
        if self.destroyed and which == "sender":
            with contextlib.suppress(MigrationError):  # what is destroyed here may be missing there
                self.world.ask(which, command="decide", migration=migration, here=False)
        self.world.ask(which, command="reconnect", migration=migration)
        return False

    async def kill(self, *which: str) -> None:
        async with self.killing:
            for name in which:
                await in_thread(self.world.kill, name)
            await trio.sleep(self.random.choice([0, 0.1, 0.5]))
            for name in which:
                await in_thread(self.world.start_anew, name)

    def _places(self) -> list[tuple[str, SimulatedHypervisor, DomainState]]:
        hosts = {"source": self.world.source, "destination": self.world.destination}
        return [
            (w, h, i.state)
            for w, h in hosts.items()
            for i in h.domains()
            if i.name == self.spec.name
        ]

    def _verify(self) -> str:
        deadline = time.monotonic() + 10  # the successor of a killed sender destroys what was left
        while True:
            places = self._places()
            if [state for _where, _host, state in places] == [DomainState.RUNNING]:
                break
            if not places and (self.destroyed or self.abandoned):
                return "destroyed"
            if not places and self.lost_there and self.has_arrived():
                return "gone with its host"  # the host was lost when all pages had arrived
            if self.decisions:
                self._end_paused(places)
            if time.monotonic() > deadline:
                raise LostError(
                    f"it runs at {[(where, state.value) for where, _h, state in places]}"
                )
            time.sleep(0.02)
        ((where, host, _state),) = places
        with host.open(self.spec.name) as domain:
            problems = self._verified(domain, where)
            domain.destroy()
        if problems:
            raise LostError(f"at the {where}: {'; '.join(problems)}")
        return where

    def _end_paused(self, places: list[tuple[str, SimulatedHypervisor, DomainState]]) -> None:
        """Check a guest that was complete when it was recalled, and is paused at the
        destination.
        """
        states = [(where, state) for where, _host, state in places]
        if states == [("source", DomainState.RUNNING), ("destination", DomainState.PAUSED)]:
            destroy(self.world.destination, self.spec.name)

    def _verified(self, domain: SimulatedDomain, where: str) -> list[str]:
        wait_for_steps(domain, 5 if self.spec.workload == "idle" else 50)
        domain.suspend()
        gone = [
            report for report in self.world.source.history() if report["name"] == self.spec.name
        ]
        came = where == "destination" and "onward" not in self.again
        positions = [vcpu["count"] for vcpu in gone[-1]["vcpu"]] if gone and came else None
        return verify(domain, self.spec, source_positions=positions).problems

    def _check_outcome(self, where: str) -> None:
        """Check that what was answered was done, and that other guests noticed nothing."""
        lines = {which: self.line(which) for which in ("sender", "receiver")}
        for which, line in lines.items():
            if line is not None and line["phase"] == "completed" and self.id in self.cancelled:
                raise LostError(f"it was cancelled, and is completed at the {which}")
        if self.id in self.cancelled and not self.again and where not in ("source", "destroyed"):
            raise LostError(f"it was cancelled, and the guest is at the {where}")
        at_source = [d.here for d in self.decisions if d.at == "sender"]
        if at_source and not (self.destroyed or self.again):
            (here, *_earlier) = reversed(at_source)
            if where == ("destination" if here else "source"):
                raise LostError(f"the guest is at the {where}, but {self.decisions}")
        may_end_early = self.policy.get("on_timeout") == "cancel"
        if not self.nobody_may_notice or self.cancelled or self.again or may_end_early:
            return
        if where != "destination":
            raise LostError(f"what must not be noticed kept it at the {where}")
        for which, line in lines.items():
            if line is not None and line["unprotected"]:
                raise LostError(
                    f"what must not be noticed ended its protection at the {which}: "
                    f"{line['unprotected']}"
                )

    def _verify_beside(self, client: ControlClient) -> None:
        """Check that the other guest has arrived undamaged, over the lanes with which it began."""
        assert self.beside is not None
        with client:
            try:
                *_progress, last = client.answers()
            except MigrationError as error:
                raise LostError(f"the other guest did not arrive: {error}") from error
        if last["result"]["rejoins"]:
            raise LostError(f"the other guest lost its lanes {last['result']['rejoins']} times")
        verification, _view = verify_migrated(self.world, self.beside)
        if verification.problems:
            raise LostError(f"the other guest: {'; '.join(verification.problems)}")
        destroy(self.world.destination, self.beside.name)


async def in_thread(call: Callable[..., T], *arguments: Any) -> T:
    return await trio.to_thread.run_sync(call, *arguments)


def destroy(host: SimulatedHypervisor, name: str) -> None:
    """Destroy the domain, if it exists."""
    with contextlib.suppress(NoSuchDomainError), host.open(name) as domain:
        domain.destroy()
