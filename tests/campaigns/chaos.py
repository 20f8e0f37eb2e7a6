# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations to which something happens at a random instant: ``python -m tests.campaigns.chaos``, or ``make chaos``.

A trial is a random guest, strategy and bandwidth between two pairs of processes, over a relay, and one to three faults: a
daemon killed or stopped, the link cut, silent, slow or damaging, a journal that cannot be written, pages that Xen does not let
be evicted, a destination without memory.  It ends with the guest running in exactly one place, verified byte for byte there.
A trial that fails is printed with its seed; ``--seed`` with ``--trials 1`` plays it again, as far as threads do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import trio

from migrate.cli.world import World, loopback_world, start_receiver, start_sender, wait_for_steps
from migrate.errors import MigrationError
from migrate.lanes.connection import Terms
from migrate.lanes.dial import DialledLanes
from migrate.protocol import messages as m
from migrate.protocol.session import new_id
from tests.support import zygote
from tests.support.links import Link, link
from xenbackend.contract import DomainState
from xenbackend.errors import XenError
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.guest import WORKLOADS, GuestSpec
from xenbackend.simulated.verify import verify

MIB = 2**20
HOST_BYTES = 512 * MIB
TRIALS_OF_A_WORLD = 25
WINDOW_S = 0.7
"""In which faults happen."""
END_S = 90.0
ARRIVED = ("completing", "completed", "")
"""Protected no more, or a sender that was killed after that, whose successor knows nothing of it."""
ENDED = ("completed", "failed", "refused", "")
CONFIG = "[network]\nchecksums = true\nsilence_s = 3\n"


class LostError(Exception):
    """A trial that did not end as it must."""


@dataclass
class Trial:
    """One of them; ``seed`` decides all that we can decide."""

    seed: int
    world: World
    link: Link
    faults: list[str] = field(default_factory=list)
    killing: trio.Lock = field(default_factory=trio.Lock)
    """One of these faults after the other."""

    def __post_init__(self) -> None:
        r = self.random = random.Random(self.seed)
        memory = r.choice([4, 8, 16, 32, 64]) * MIB
        self.spec = GuestSpec(
            f"guest{self.seed}", memory, r.choice([1, 2, 4]), workload=r.choice(sorted(WORKLOADS)),
            working_set_bytes=memory // r.choice([1, 2, 8]), write_permille=r.choice([0, 300, 1000]),
            rate=r.choice([None, None, 2000]), zero_permille=r.choice([0, 250, 900]), seed=self.seed,
        )  # fmt: skip
        self.strategy = r.choice(["hybrid", "hybrid", "postcopy", "postcopy", "precopy"])
        self.bandwidth = r.choice([None, 16 * MIB, 64 * MIB])
        self.checkpoint_every_s = r.choice([None, None, 0.02]) if self.strategy != "precopy" else None
        if r.random() < 0.5:
            pages = min(200, (self.spec.nr_pfns - self.spec.working_pages) // 2)
            every = 1 if self.spec.workload == "idle" else r.choice([5, 50])
            # Of a page that comes back between two checkpoints nobody knows (docs/reliability.md).
            back = self.checkpoint_every_s is None
            self.spec = replace(self.spec, balloon_pages=pages, balloon_every=every, balloon_back=back)
        self.destination_died = False
        self.kill_decided = r.choice([False, True])
        """The sender is killed when it has answered an operator's decision."""

    def __str__(self) -> str:
        spec = self.spec
        return (
            f"seed {self.seed}: {spec.memory_bytes // MIB} MiB, {spec.vcpus} vCPUs, {spec.workload}, {self.strategy}, "
            f"balloon of {spec.balloon_pages} pages, "
            f"bandwidth {self.bandwidth}, checkpoints {self.checkpoint_every_s}; {', '.join(self.faults)}"
        )

    # ---- the order of things ----
    async def run(self) -> str:
        """Where the guest was in the end.  Raises :class:`LostError`."""
        await in_thread(self._begin)
        async with trio.open_nursery() as nursery:
            for _ in range(self.random.choice([1, 1, 2, 3])):
                nursery.start_soon(self._happen, self.random.choice(FAULTS), self.random.uniform(0, WINDOW_S))
        self.link.is_up, self.link.delay_s, self.link.piece = True, 0.0, 65536
        self.link.go()
        await self._settle()
        where: str = await in_thread(self._verify)
        self.world.check_alive()
        if where != "destination" and all(fault.startswith("hostile peer") for fault in self.faults):
            raise LostError(f"a peer of another guest kept it at the {where}")
        return where

    def _begin(self) -> None:
        guest = self.world.source.create_guest(self.spec.to_bytes())
        wait_for_steps(guest, 5 if self.spec.workload == "idle" else 50)
        guest.close()
        client = self.world.control("sender")
        client.say(
            command="migrate", domain=self.spec.name, destination=f"127.0.0.1:{self.link.port}", strategy=self.strategy,
            bandwidth=self.bandwidth, policy={"max_rounds": 2}, checkpoint_every_s=self.checkpoint_every_s,
        )  # fmt: skip
        client.answer()
        client.close()

    async def _happen(self, fault: Fault, after_s: float) -> None:
        name, happen = fault
        self.faults.append(f"{name} after {after_s:.3f} s")
        await trio.sleep(after_s)
        await happen(self)

    async def _settle(self) -> None:
        deadline = time.monotonic() + END_S
        while True:
            lines = [await in_thread(lines_of, self.world, which) for which in ("sender", "receiver")]
            mine = [[line for line in found if line["domain"] == self.spec.name] for found in lines]
            if all(line["phase"] in ENDED for found in mine for line in found):
                return
            if time.monotonic() > deadline:
                raise LostError(f"it does not end: {mine}")
            for which, found in zip(("sender", "receiver"), mine, strict=True):
                for line in found:
                    with contextlib.suppress(MigrationError):
                        decided = await in_thread(self._encourage, which, line["id"])
                        if decided and self.kill_decided:
                            self.kill_decided = False
                            await self._happen(("sender killed", kill_sender), self.random.uniform(0, 0.06))
            await trio.sleep(0.05)

    def _encourage(self, which: str, migration: str) -> bool:
        """Do what an operator does.  Returns whether a decision was asked for, and taken."""
        if self.destination_died and which == "sender":
            with contextlib.suppress(MigrationError):  # it has not noticed yet
                self.world.ask(which, command="decide", migration=migration, here=True)
                return True
        self.world.ask(which, command="reconnect", migration=migration)
        return False

    def phase(self, which: str) -> str:
        mine = [line["phase"] for line in lines_of(self.world, which) if line["domain"] == self.spec.name]
        return str(mine[-1]) if mine else ""

    def _places(self) -> list[tuple[str, SimulatedHypervisor, DomainState]]:
        hosts = {"source": self.world.source, "destination": self.world.destination}
        return [(w, h, i.state) for w, h in hosts.items() for i in h.domains() if i.name == self.spec.name]

    def _verify(self) -> str:
        deadline = time.monotonic() + 10  # what a sender that was killed has left is let go by its successor
        while True:
            places = self._places()
            if [state for _where, _host, state in places] == [DomainState.RUNNING]:
                break
            if not places and self.destination_died and self.phase("sender") == "completed":
                return "gone with its host"  # which died when all had come
            if time.monotonic() > deadline:
                raise LostError(f"it runs at {[(where, state.value) for where, _h, state in places]}")
            time.sleep(0.02)
        ((where, host, _state),) = places
        with host.open(self.spec.name) as domain:
            problems = self._verified(domain, where)
            domain.destroy()
        if problems:
            raise LostError(f"at the {where}: {'; '.join(problems)}")
        return where

    def _verified(self, domain: SimulatedDomain, where: str) -> list[str]:
        wait_for_steps(domain, 5 if self.spec.workload == "idle" else 50)
        domain.suspend()
        gone = [report for report in self.world.source.history() if report["name"] == self.spec.name]
        positions = [vcpu["count"] for vcpu in gone[-1]["vcpu"]] if gone and where == "destination" else None
        return verify(domain, self.spec, source_positions=positions).problems


# ---- what may happen ----
async def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(call, *arguments)


def start_anew(world: World, which: str) -> None:
    if which == "sender":
        start_sender(world)
    else:
        start_receiver(world, world.port)


def lines_of(world: World, which: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = world.ask(which, command="list")["migrations"]
    return lines


async def kill(trial: Trial, *which: str) -> None:
    async with trial.killing:
        for name in which:
            await in_thread(trial.world.stop, name, signal.SIGKILL)
        await trio.sleep(trial.random.choice([0, 0.1, 0.5]))
        for name in which:
            await in_thread(start_anew, trial.world, name)


async def kill_sender(trial: Trial) -> None:
    await kill(trial, "sender")


async def lose_destination(trial: Trial) -> None:
    """With all that its host knew, of a guest that is protected against that; of another a kill."""
    if trial.checkpoint_every_s is None:
        await kill(trial, "receiver")
        return

    def die() -> None:
        trial.world.stop("receiver", signal.SIGKILL)
        if trial.phase("sender") in ARRIVED:
            start_anew(trial.world, "receiver")
            return
        with contextlib.suppress(XenError), trial.world.destination.open(trial.spec.name) as domain:
            domain.destroy()
        for entry in (trial.world.directory / "destination.sock.state/receiver").iterdir():
            entry.unlink()
        start_anew(trial.world, "receiver")
        trial.destination_died = True

    async with trial.killing:
        await in_thread(die)


async def halt(trial: Trial, which: str) -> None:
    process = trial.world.processes.get(which)
    if process is not None:
        process.popen.send_signal(signal.SIGSTOP)
        await trio.sleep(trial.random.uniform(0.05, 1))
        process.popen.send_signal(signal.SIGCONT)


async def cut(trial: Trial) -> None:
    trial.link.cut()


async def cut_one_end(trial: Trial) -> None:
    trial.link.cut_left()


async def down(trial: Trial) -> None:
    trial.link.down()
    await trio.sleep(trial.random.uniform(0.1, 1))
    trial.link.is_up = True


async def silence(trial: Trial) -> None:
    """A link that says nothing any more, and is then found to be dead, or goes on."""
    trial.link.stop()
    await trio.sleep(trial.random.uniform(0.1, 1))
    if trial.random.random() < 0.5:
        trial.link.cut()
    trial.link.go()


async def delay(trial: Trial) -> None:
    trial.link.delay_s = trial.random.uniform(0.001, 0.02)


async def trickle(trial: Trial) -> None:
    trial.link.piece, trial.link.delay_s = 500, 0.01
    await trio.sleep(trial.random.uniform(0.1, 1))
    trial.link.piece, trial.link.delay_s = 65536, 0.0


async def flip_a_bit(trial: Trial) -> None:
    def flip(data: bytes) -> bytes:
        bit = trial.random.randrange(len(data) * 8)
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)

    trial.link.damage(flip)


async def truncate(trial: Trial) -> None:
    trial.link.damage(lambda data: data[: len(data) // 2])
    await trio.sleep(0.02)
    trial.link.cut()


async def repeat(trial: Trial) -> None:
    trial.link.damage(lambda data: data + data)


async def swap(trial: Trial) -> None:
    trial.link.damage(lambda data: data[len(data) // 2 :] + data[: len(data) // 2])


async def full_disk(trial: Trial) -> None:
    """What there is can be read, and nothing more be written: the journal's writes fail."""
    process = trial.world.processes.get(trial.random.choice(["sender", "receiver"]))
    if process is None:
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.suppress(ProcessLookupError):  # it may be killed meanwhile
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (0, hard))
        await trio.sleep(trial.random.uniform(0.05, 0.5))
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (hard, hard))


async def few_descriptors(trial: Trial) -> None:
    """A daemon has no more than it has open."""
    process = trial.world.processes.get(trial.random.choice(["sender", "receiver"]))
    if process is None:
        return
    with contextlib.suppress(OSError):  # it may be killed meanwhile
        pid = process.popen.pid
        _soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(
            pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + trial.random.randrange(4), hard)
        )
        await trio.sleep(trial.random.uniform(0.05, 0.5))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


async def hostile_peer(trial: Trial) -> None:
    """Others connect to the receiver and send garbage, a hello and garbage, an offer and garbage, or bytes now and then."""
    for _ in range(20):
        with contextlib.suppress(MigrationError, OSError, trio.BrokenResourceError), trio.move_on_after(0.3):
            if trial.random.random() < 0.5:
                async with await trio.open_tcp_stream("127.0.0.1", trial.world.port) as stream:
                    for _ in range(5):
                        await stream.send_all(trial.random.randbytes(trial.random.choice([1, 20, 65536])))
                        await trio.sleep(trial.random.choice([0, 0.05]))
                continue
            lane = await DialledLanes(("127.0.0.1", trial.world.port), new_id(), Terms()).push()
            try:
                if trial.random.random() < 0.5:
                    spec = GuestSpec("hostile", MIB)
                    await lane.send(m.Offer("hostile", spec.nr_pfns, spec.nr_pfns, 1, spec.to_bytes(), True, b"key", 0))
                lane._socket.sendmsg([memoryview(b"XPC1" + trial.random.randbytes(200))])
                await lane.receive()
            finally:
                lane.close()


async def busy_pages(trial: Trial) -> None:
    """Somebody has references to pages of the domain that comes into being."""

    def hold() -> None:
        with contextlib.suppress(XenError), trial.world.destination.open(trial.spec.name) as domain:
            for pfn in np.random.default_rng(trial.seed).integers(0, domain.nr_pfns, 20).tolist():
                with contextlib.suppress(XenError):
                    if domain.state() is DomainState.INCOMING:
                        domain.set_page(pfn, refs=1)

    await in_thread(hold)


async def set_memory(trial: Trial) -> None:
    """``xl mem-set``: the balloon, which is held, moves until that is noticed."""

    def lift() -> None:
        with contextlib.suppress(XenError), trial.world.source.open(trial.spec.name) as domain:
            domain.set_max_pages(domain.nr_pfns)

    for _ in range(trial.random.choice([1, 5])):
        await in_thread(lift)
        await trio.sleep(trial.random.uniform(0, 0.05))


async def use_memory_up(trial: Trial) -> None:
    """Xen gives the domain that comes into being no frame more for a while: for other guests there is nothing left."""

    def limit(pages: int | None) -> None:
        with contextlib.suppress(XenError), trial.world.destination.open(trial.spec.name) as domain:
            domain.set_max_pages(domain.reservation().tot_pages if pages is None else pages)

    await in_thread(limit, None)
    await trio.sleep(trial.random.uniform(0.1, 1))
    await in_thread(limit, trial.spec.nr_pfns)


Fault = tuple[str, Callable[[Trial], Awaitable[None]]]
FAULTS: list[Fault] = [
    ("sender killed", kill_sender),
    ("receiver killed", lambda trial: kill(trial, "receiver")),
    ("both killed", lambda trial: kill(trial, "sender", "receiver")),
    ("destination lost", lose_destination),
    ("sender stopped", lambda trial: halt(trial, "sender")),
    ("receiver stopped", lambda trial: halt(trial, "receiver")),
    ("link cut", cut),
    ("one end cut", cut_one_end),
    ("link down", down),
    ("link silent", silence),
    ("delay", delay),
    ("trickle", trickle),
    ("bit flipped", flip_a_bit),
    ("truncated", truncate),
    ("repeated", repeat),
    ("reordered", swap),
    ("disk full", full_disk),
    ("pages busy", busy_pages),
    ("few descriptors", few_descriptors),
    ("hostile peer", hostile_peer),
    ("memory used up", use_memory_up),
    ("memory set", set_memory),
]


# ---- the campaign ----
async def campaign(first: int, trials: int, *, quiet: bool) -> int:
    """Returns how many have failed."""
    places: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    failed: list[int] = []
    start, number = time.monotonic(), 0
    while number < trials:
        with loopback_world(HOST_BYTES, config=CONFIG) as world:
            async with trio.open_nursery() as nursery:
                relay = await link(nursery, ("127.0.0.1", world.port))
                for seed in range(first + number, first + min(number + TRIALS_OF_A_WORLD, trials)):
                    number += 1
                    trial = Trial(seed, world, relay)
                    relay.damage(None)  # nothing may have come by to be damaged in the trial before
                    try:
                        where = await trial.run()
                    except (LostError, MigrationError, XenError) as error:
                        failed.append(seed)
                        print(f"FAILED: {trial}\n  {error}", flush=True)
                        for which in ("sender", "receiver"):
                            if which in world.processes:
                                print(f"--- {which} ---\n{world.processes[which].tail()}", flush=True)
                        break  # what is left of it is not the next one's
                    places[where] += 1
                    happened.update(fault.split(" after ")[0] for fault in trial.faults)
                    if not quiet:
                        print(f"{trial}: {where}", flush=True)
                nursery.cancel_scope.cancel()
        print(
            f"{number} trials in {time.monotonic() - start:.0f} s: {places['destination']} guests arrived, "
            f"{places['source']} stayed, {len(failed)} lost",
            flush=True,
        )
    print("what happened: " + ", ".join(f"{name} {count}" for name, count in sorted(happened.items())))
    if failed:
        print(f"failed seeds: {', '.join(map(str, failed))}")
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, help="of the first; the next ones count on (default: of the clock)")
    parser.add_argument("--quiet", action="store_true", help="only the failures, and a line now and then")
    options = parser.parse_args()
    World.spawn = zygote.Popen  # so that no process outlives this one
    seed = options.seed if options.seed is not None else int(time.time()) % 10**6 * 1000
    print(f"chaos: {options.trials} trials, the first with seed {seed}", flush=True)
    sys.exit(1 if trio.run(lambda: campaign(seed, options.trials, quiet=options.quiet)) else 0)


if __name__ == "__main__":
    main()
