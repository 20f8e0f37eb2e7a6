# SPDX-License-Identifier: GPL-2.0-or-later
"""One trial under xl: from the beginning on daemons, keepers, helpers and the halves of xl are
killed, the lanes are lost, and the guest is paused.

The guest must be where xl has put it, or where docs/xl.md has it if xl was killed: in one place,
with every byte.  Pages may be lost only if the sender and its keeper were both killed, and then the
receiver must show that.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from migrate.cli.world import wait_for_steps
from migrate.errors import MigrationError
from migrate.outcomes import ENDED
from migrate.xl.protocol import Message
from tests.campaigns.chaos.toolstack import AWAY, Pauses, XlMigrate
from tests.campaigns.chaos.trial import END_S, MIB
from tests.campaigns.chaos.world import ChaosWorld, LostError
from tests.support.keepers import keepers, keepers_of, sockets_of_keepers
from tests.support.links import Link
from tests.support.xl import Xl
from xenbackend.contract import DomainState
from xenbackend.errors import NoSuchDomainError, XenError
from xenbackend.simulated.client import SimulatedDomain
from xenbackend.simulated.guest import GuestSpec
from xenbackend.simulated.verify import verify

WINDOW_S = {"begun": 0.8, "suspended": 0.1, "restored": 0.6, "decided": 0.6}
"""The time in which a fault happens, after xl has reached a point."""
ADMINISTRATOR_S = 7.0
"""After this time an administrator acts on what xl has left.  The sender resumes a guest before
that, if the receiver has reported that the guest never ran there.
"""
BALLOON, LEAVES_PAUSED = 0.5, 0.1
"""The shares of guests with a balloon, which moves both ways, and of ``xl migrate -p``."""
GUEST = {DomainState.RUNNING, DomainState.PAUSED}
SUSPENDED, INCOMING = DomainState.SUSPENDED, DomainState.INCOMING


@dataclass(frozen=True)
class Step:
    """A fault that happens ``after_s`` after xl has reached ``point``."""

    name: str
    point: str
    after_s: float

    def __str__(self) -> str:
        return f"{self.name} {self.after_s:.3f} s after {self.point}"


class XlTrial:
    """``lanes``: the link from the receiver to the sender."""

    def __init__(self, seed: int, world: ChaosWorld, lanes: Link):
        self._world, self._lanes = world, lanes
        r = self._random = random.Random(seed)
        memory = r.choice([4, 8, 16, 32]) * MIB
        self.spec = GuestSpec(
            f"xl{seed}", memory, r.choice([1, 2, 4]), workload="random",
            write_permille=r.choice([0, 300, 1000]), rate=r.choice([500, 5000]), seed=seed,
        )  # fmt: skip
        if r.random() < BALLOON:
            self.spec = replace(
                self.spec, working_set_bytes=memory // 2, balloon_pages=200,
                balloon_every=r.choice([5, 50]), balloon_back=True,
            )  # fmt: skip
        self.strategy = r.choice(["hybrid", "postcopy", "postcopy"])
        self.pauses = Pauses(
            start=r.choice([0.0, r.uniform(0, 0.6), r.uniform(0, 0.6), r.uniform(2, 4)]),
            destroy=r.choice([0.0, r.uniform(0, 0.6), r.uniform(2, 4)]),
            leaves_paused=r.random() < LEAVES_PAUSED,
        )
        steps = [self._step() for _ in range(r.choice([0, 1, 1, 2, 2, 3]))]
        self._steps = sorted(steps, key=lambda step: [*WINDOW_S].index(step.point))
        self._killing = threading.RLock()
        """Held while processes are killed and started, so that these follow each other."""
        self._unpauses_when_whole = r.random() < 0.5
        """An administrator lets a guest that xl has left paused run when its memory is there."""
        self._points = {"begun": threading.Event(), "suspended": threading.Event()}
        self._id = ""
        """The migration's, from the suspension on."""
        self._paused_at = ""
        """The end at which an administrator has paused the guest."""
        self._both_killed = False
        """The sender and its keeper were killed, so that pages may be lost."""
        self._receiver_killed = False

    def _step(self) -> Step:
        r = self._random
        point = r.choice([*WINDOW_S])
        return Step(r.choice([*FAULTS]), point, r.uniform(0, WINDOW_S[point]))

    def __str__(self) -> str:
        spec, xl = self.spec, self.pauses
        return (
            f"{spec.name}: {spec.memory_bytes // MIB} MiB, {spec.vcpus} vCPUs, {self.strategy}, "
            f"balloon of {spec.balloon_pages} pages; xl starts it after {xl.start:.3f} s"
            f"{', paused' if xl.leaves_paused else ''}, destroys the source after "
            f"{xl.destroy:.3f} s; {', '.join(map(str, self._steps)) or 'no fault'}"
        )

    @property
    def happened(self) -> Counter[str]:
        return Counter(f"{step.name} under xl" for step in self._steps) + Counter(["under xl"])

    # ---- the order of things ----
    def run(self) -> str:
        """Run the trial, in a thread of trio's.  Returns where the guest was in the end.  Raises
        :class:`LostError`.
        """
        self._token = trio.from_thread.run_sync(trio.lowlevel.current_trio_token)
        self._lead_to_sender()
        with self._world.source.create_guest(self.spec.to_bytes()) as guest:
            wait_for_steps(guest, 50)
        with (
            TemporaryDirectory() as folder,
            contextlib.closing(Xl(self._world, self.spec, Path(folder))) as self.xl,
        ):
            for half in (self.xl.save, self.xl.restore):
                half.status_file = Path(folder, half.mode)
                # The stock helper of the tests does not carry a guest.
                half.environment["XEN_POSTCOPY"] = "require"
            self.xl.save.environment["XEN_POSTCOPY_STRATEGY"] = self.strategy
            self.xl.save.answers[Message.SUSPEND] = self._suspend
            self.migrate = XlMigrate(self.xl, self.pauses)
            restored, decided = self.migrate.restored, self.migrate.decided
            self._points |= {"restored": restored, "decided": decided}
            try:
                where = self._run()
            finally:
                self.migrate.end()
        self._world.check_remnants()
        self._world.check()
        return where

    def _run(self) -> str:
        failures: list[BaseException] = []

        def fault(step: Step) -> None:
            try:
                if self._reach(step):
                    FAULTS[step.name](self)
            except BaseException as error:
                failures.append(error)

        faults = [threading.Thread(target=fault, args=(step,)) for step in self._steps]
        self.migrate.begin()
        self._points["begun"].set()
        for thread in faults:
            thread.start()
        try:
            self._wait_for(lambda: self.migrate.is_over, "xl does not end")
        finally:
            for thread in faults:
                thread.join()
            self.on_link(Link.restore)
        if failures:
            raise failures[0]
        return self._settle()

    def _reach(self, step: Step) -> bool:
        """Wait until the fault is due.  Returns false if xl has ended before that point."""
        while not self._points[step.point].wait(0.02):
            if self.migrate.is_over:
                return False
        time.sleep(step.after_s)
        return True

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + END_S
        while not condition():
            if time.monotonic() > deadline:
                raise LostError(f"{what}: {self._lines()}")
            time.sleep(0.02)

    def _lines(self) -> str:
        shown = [f"{which} {self._line(which)}" for which in ("sender", "receiver")]
        return f"source {self._source}, destination {self._destination}, {', '.join(shown)}"

    def _line(self, which: str) -> dict[str, Any]:
        return self.xl.line(which)

    # ---- xl ----
    def _suspend(self) -> int:
        with contextlib.suppress(MigrationError):  # the sender is being killed
            self._id = self._line("sender").get("id", "")
        self._points["suspended"].set()
        try:
            return self.xl.suspend()
        except XenError:  # an administrator has paused the guest
            return 0

    @property
    def _source(self) -> DomainState | None:
        return state_of(self.xl.source)

    @property
    def _destination(self) -> DomainState | None:
        return state_of(self.xl.destination)

    # ---- the faults ----
    def on_link(self, call: Callable[[Link], None]) -> None:
        trio.from_thread.run_sync(call, self._lanes, trio_token=self._token)

    def kill(self, *which: str) -> None:
        with self._killing:
            for name in which:
                if name == "keeper":
                    self._kill_keepers()
                else:
                    self._note_death(name)
                    self._world.kill(name)
            time.sleep(self._random.choice([0, 0, 0.1, 0.3]))
            for name in which:
                if name != "keeper":
                    self._world.start_anew(name)
            self._lead_to_sender()

    def _lead_to_sender(self) -> None:
        port = self._world.ask("sender", command="status")["port"]
        self.on_link(lambda link: setattr(link, "to", ("127.0.0.1", port)))

    def _note_death(self, name: str) -> None:
        if name == "receiver":
            self._receiver_killed = True
        elif not self._keepers() and self._points["suspended"].is_set():
            self._both_killed = True

    def _keepers(self) -> list[int]:
        """Return the keepers of the sender and of its predecessors."""
        return keepers_of(self._id)

    def _kill_keepers(self) -> None:
        sender = self._world.processes.get("sender")
        for pid in self._keepers():
            of_sender = sender is not None and pid in keepers(sender.popen.pid)
            self._both_killed |= not of_sender
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def down(self) -> None:
        self.on_link(Link.down)
        time.sleep(self._random.uniform(0.1, 1))
        self.on_link(Link.restore)

    def silence(self) -> None:
        self.on_link(Link.stop)
        time.sleep(self._random.uniform(0.1, 1))
        if self._random.random() < 0.5:
            self.on_link(Link.cut)
        self.on_link(Link.restore)

    def pause(self) -> None:
        """Pause the guest, wherever it runs, and leave it paused in half of the cases."""
        for where, domain in [("source", self.xl.source), ("destination", self.xl.destination)]:
            with contextlib.suppress(XenError):
                if domain.state() is DomainState.RUNNING:
                    domain.pause()
                    self._paused_at = where
                    if self._random.random() < 0.5:
                        time.sleep(self._random.uniform(0, 1))
                        self._paused_at = ""
                        domain.unpause()
                    return

    def pause_copying(self) -> None:
        """Pause copying and resume it, also if the sender is killed meanwhile."""
        with contextlib.suppress(MigrationError):  # it may be too late
            self._world.ask("sender", command="pause", migration=self.spec.name)
        time.sleep(self._random.choice([0, self._random.uniform(0, 1)]))
        with self._killing:
            self._resume_copying()

    def _resume_copying(self) -> None:
        with contextlib.suppress(MigrationError):
            self._world.ask("sender", command="resume", migration=self.spec.name)

    def set_memory(self) -> None:
        """The balloon, which is held during a migration, moves until the sender notices."""
        for _ in range(self._random.choice([1, 5])):
            with contextlib.suppress(XenError):
                self.xl.source.set_max_pages(self.xl.source.nr_pfns)
            time.sleep(self._random.uniform(0, 0.05))

    # ---- the end ----
    def _settle(self) -> str:
        """Wait until nothing of the migration is left to do, and verify the guest.  An
        administrator does what xl would have done.
        """
        began = time.monotonic()
        while True:
            source, destination = self._source, self._destination
            if destination is not None and self._line("receiver")["phase"] == "lost":
                return self._lost()
            if where := self._ended_at(source, destination):
                break
            if time.monotonic() > began + END_S:
                raise LostError(f"it does not end: {self._lines()}")
            if source is SUSPENDED and time.monotonic() > began + ADMINISTRATOR_S:
                self._administer(destination)
            elif source is None and destination is INCOMING:
                if not (self._unpauses_when_whole and len(self.xl.destination.paged_out())):
                    self.xl.destination.start()
            elif source in GUEST and destination is INCOMING and self._may_be_left():
                self.xl.destination.destroy()
            time.sleep(0.05)
        if self.migrate.put not in ("", where):
            raise LostError(f"xl has put it at the {self.migrate.put}, and it is at the {where}")
        return self._verify(where)

    def _may_be_left(self) -> bool:
        """Whether nothing but xl, which was killed, would destroy the incoming domain."""
        return self._line("receiver")["phase"] in ("none", *ENDED)

    def _administer(self, destination: DomainState | None) -> None:
        """Decide what xl has not decided, or clean up after xl."""
        if destination is INCOMING:
            if self._random.random() < 0.5:
                self.xl.destination.start()
            else:
                self.xl.destination.destroy()
        elif destination in GUEST:
            self.xl.source.destroy()
        elif self._receiver_killed:  # the receiver cannot report whether the guest ran there
            with contextlib.suppress(MigrationError):
                self._world.ask(
                    "sender", command="decide", migration=self.spec.name, here=True, force=True
                )

    def _ended_at(self, source: DomainState | None, destination: DomainState | None) -> str:
        """Return where the guest is if nothing is left to do; empty otherwise."""
        if source in GUEST and destination in GUEST:
            raise LostError(f"the guest runs at both ends: {self._lines()}")
        if source is None and destination is None:
            raise LostError(f"the guest is nowhere: {self._lines()}")
        if sockets_of_keepers(self._world) or self._keepers():
            return ""
        if source in GUEST and destination is None:
            return "source"
        if source is None and destination in GUEST:
            noted = any(
                (self._world.state(which) / f"{self._id}.json").exists()
                for which in ("sender", "receiver")
            )
            if not noted and not len(self.xl.destination.paged_out()):
                return "destination"
        return ""

    def _lost(self) -> str:
        if not self._both_killed:
            raise LostError(f"pages are lost: {self._lines()}")
        self.xl.destination.destroy()
        self._wait_for(lambda: self._line("receiver")["phase"] in ENDED, "its end is not noticed")
        return "destroyed"

    def _verify(self, where: str) -> str:
        domain = self.xl.source if where == "source" else self.xl.destination
        paused = domain.state() is DomainState.PAUSED
        if paused != (self._paused_at == where):
            raise LostError(f"the guest is {domain.state().value}, paused at {self._paused_at!r}")
        if paused:
            domain.unpause()
        wait_for_steps(domain, 50)
        domain.suspend()
        names = (self.spec.name, self.spec.name + AWAY)
        gone = [report for report in self._world.source.history() if report["name"] in names]
        positions = [vcpu["count"] for vcpu in gone[-1]["vcpu"]] if gone else None
        if problems := verify(domain, self.spec, source_positions=positions).problems:
            raise LostError(f"at the {where}: {'; '.join(problems)}")
        domain.destroy()
        for host in (self._world.source, self._world.destination):
            if left := [info.name for info in host.domains() if info.name in names]:
                raise LostError(f"left over: {left}")
        return where


def state_of(domain: SimulatedDomain) -> DomainState | None:
    try:
        return domain.state()
    except NoSuchDomainError:
        return None


FAULTS: dict[str, Callable[[XlTrial], object]] = {
    "sender killed": lambda trial: trial.kill("sender"),
    "receiver killed": lambda trial: trial.kill("receiver"),
    "both killed": lambda trial: trial.kill("sender", "receiver"),
    "keeper killed": lambda trial: trial.kill("keeper"),
    "sender and keeper killed": lambda trial: trial.kill("sender", "keeper"),
    "source's helper killed": lambda trial: trial.xl.save.kill_helper(),
    "destination's helper killed": lambda trial: trial.xl.restore.kill_helper(),
    "xl killed at the source": lambda trial: trial.migrate.source.kill(),
    "xl killed at the destination": lambda trial: trial.migrate.destination.kill(),
    "xl's stream cut": lambda trial: trial.migrate.stream.cut(),
    "link cut": lambda trial: trial.on_link(Link.cut),
    "one end cut": lambda trial: trial.on_link(Link.cut_left),
    "link down": XlTrial.down,
    "link silent": XlTrial.silence,
    "paused": XlTrial.pause,
    "memory set": XlTrial.set_memory,
    "copying paused": XlTrial.pause_copying,
}
