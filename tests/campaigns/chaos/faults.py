# SPDX-License-Identifier: GPL-2.0-or-later
"""The faults of daemons, hosts, links and peers; the requests of operators are in
``operators.py``.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable

import numpy as np
import trio

from migrate.errors import MigrationError
from migrate.lanes.accept import AwaitedLanes, Reception
from migrate.lanes.connection import LaneConnection, connect
from migrate.lanes.dial import DialledLanes
from migrate.outcomes import ENDED
from migrate.protocol import messages as m
from migrate.protocol.messages import Hello, Lane
from migrate.protocol.session import hello, new_id, new_token
from tests.campaigns.chaos.trial import MIB, Fault, Trial, destroy, in_thread
from tests.support.links import PIECE, no_look
from xenbackend.contract import DomainState
from xenbackend.errors import XenError
from xenbackend.simulated.guest import GuestSpec

AT_DESTINATION = ("receiver", "second", "onward")
"""The daemons at the destination's host."""


# ---- daemons and hosts ----
async def lose_destination(trial: Trial) -> None:
    """Lose the destination with its host's state, if the guest is protected against that; otherwise
    kill the receiver.
    """
    if trial.checkpoint_every_s is None:
        await trial.kill("receiver")
        return

    async with trial.killing:
        await in_thread(lambda: lose(trial, trial.migrations(), trial.has_arrived))


def lose(trial: Trial, migrations: set[str], has_arrived: Callable[[], bool]) -> None:
    """``migrations``: those that the sender has, which may be down at this moment.
    ``has_arrived``: returns whether the guest needs no protection any more.
    """
    world = trial.world
    there = [which for which in AT_DESTINATION if which in world.processes]
    for which in there:
        world.kill(which)
    if not trial.destroyed and not has_arrived():
        destroy(world.destination, trial.spec.name)
        for which in there:
            shutil.rmtree(world.state(which))
        trial.lost_there |= migrations
    for which in there:
        world.start_anew(which)


async def halt(trial: Trial, which: str) -> None:
    async with trial.killing:
        process = trial.world.processes[which]
        process.popen.send_signal(signal.SIGSTOP)
        await trio.sleep(trial.random.uniform(0.05, 1))
        process.popen.send_signal(signal.SIGCONT)


async def hang_up(trial: Trial) -> None:
    """Close a terminal: the daemon serves the guests that need it, and ends."""
    which = trial.random.choice(["sender", "receiver"])
    if trial.random.random() < 0.7:
        await switchover(trial)
    for _ in range(trial.random.choice([1, 2])):  # a second SIGHUP changes nothing
        async with trial.killing:
            await in_thread(trial.world.hang_up, which)
        await trio.sleep(trial.random.uniform(0, 0.3))


# ---- the link ----
async def cut(trial: Trial) -> None:
    trial.link.cut()


async def cut_one_end(trial: Trial) -> None:
    trial.link.cut_left()


async def down(trial: Trial) -> None:
    trial.link.down()
    await trio.sleep(trial.random.uniform(0.1, 1))
    trial.link.is_up = True


async def silence(trial: Trial) -> None:
    """Let the link carry nothing.  It is found to be dead, or continues."""
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
    trial.link.piece, trial.link.delay_s = PIECE, 0.0


async def slow(trial: Trial) -> None:
    """Carry less in the time for which a peer may be silent than one call receives."""
    trial.link.piece, trial.link.delay_s = 4096, 0.1
    await trio.sleep(trial.random.uniform(4, 8))
    trial.link.piece, trial.link.delay_s = PIECE, 0.0


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
    """Fill the disk: files can be read but not written, so writes of the journal fail."""
    process = trial.world.processes.get(trial.random.choice(["sender", "receiver"]))
    if process is None:
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.suppress(ProcessLookupError):  # the process may be killed meanwhile
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (0, hard))
        await trio.sleep(trial.random.uniform(0.05, 0.5))
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (hard, hard))


async def few_descriptors(trial: Trial) -> None:
    """Let a daemon have no more descriptors than it has open."""
    async with trial.killing:  # a daemon that is starting needs more
        process = trial.world.processes.get(trial.random.choice(["sender", "receiver"]))
    if process is None:
        return
    with contextlib.suppress(OSError):  # the process may be killed meanwhile
        pid = process.popen.pid
        _soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(
            pid,
            resource.RLIMIT_NOFILE,
            (len(os.listdir(f"/proc/{pid}/fd")) + trial.random.randrange(4), hard),
        )
        await trio.sleep(trial.random.uniform(0.05, 0.5))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


async def read_only_state(trial: Trial) -> None:
    """In a daemon's state directory no file can be made or removed; open files can be written."""
    directory = trial.world.state(trial.random.choice(["sender", "receiver"]))
    async with trial.killing, trial.world.without_starts():  # a daemon refuses to start then
        directory.chmod(0o500)
        await trio.sleep(trial.random.uniform(0.05, 0.5))
        directory.chmod(0o700)


async def renew_certificates(trial: Trial) -> None:
    """Replace the certificate and the key one after the other; meanwhile they do not fit
    together.
    """
    # A daemon refuses to start with such a pair.
    async with trial.killing, trial.world.without_starts():
        parts = list((await in_thread(trial.world.renewed)).items())
        trial.random.shuffle(parts)
        for path, text in parts:
            await trio.sleep(trial.random.uniform(0, 0.3))
            path.write_bytes(text)


# ---- peers ----
async def hostile_peer(trial: Trial) -> None:
    """Other peers connect to the receiver and send garbage, a hello and garbage, an offer and
    garbage, or a byte from time to time; or they claim to be the source of this guest.
    """
    at = ("127.0.0.1", trial.world.port)
    for _ in range(20):
        with (
            contextlib.suppress(MigrationError, OSError, trio.BrokenResourceError),
            trio.move_on_after(0.3),
        ):
            if trial.random.random() < 0.4:
                async with await trio.open_tcp_stream(*at) as stream:
                    for _ in range(5):
                        await stream.send_all(
                            trial.random.randbytes(trial.random.choice([1, 20, 65536]))
                        )
                        await trio.sleep(trial.random.choice([0, 0.05]))
                continue
            if trial.random.random() < 0.3:
                lane = await connect(*at, trial.world.terms)
                kind = trial.random.choice([Lane.PUSH, Lane.PULL])
                greeting = hello(kind, trial.id, trial.random.choice([b"", new_token()]))
                first: m.Message = m.Rejoin()
            else:
                lane = await DialledLanes(at, new_id(), trial.world.terms).push()
                spec = GuestSpec("hostile", MIB)
                greeting = None
                first = m.Offer(
                    "hostile", spec.nr_pfns, spec.pages, 1, spec.to_bytes(), True, b"key", 0
                )
            try:
                if greeting is not None:
                    await lane.send(greeting)
                if trial.random.random() < 0.5:
                    await lane.send(first)
                lane._socket.sendmsg([memoryview(b"XPC1" + trial.random.randbytes(200))])
                await lane.receive()
            finally:
                lane.close()


WRONG: list[m.Message] = [
    m.Resumed(),
    m.Ready(),
    m.Passed(7),
    m.Rejoined("postcopy", b"token"),
    m.Complete(b"{}"),
    m.Ended(False, "the impostor has ended it"),
    m.Failed("the impostor has failed"),
    m.Accepted("native", b"token"),
]
"""Messages that are no answer to a sender's first message, or not in this form."""


async def impostor(trial: Trial) -> None:
    """For a while an impostor answers in the receiver's place: with a refusal, garbage, a wrong
    message, or not at all.
    """
    kinds = trial.random.sample(["refuse", "garbage", "wrong", "nothing", "end"], 2)

    async def answer(stream: trio.SocketStream) -> None:
        kind = trial.random.choice(kinds)
        with contextlib.suppress(MigrationError, OSError, trio.BrokenResourceError):
            if kind == "refuse":
                await reception.receive(stream)
                return
            lane = await LaneConnection.from_stream(stream, trial.world.terms)
            try:
                theirs = await lane.receive_hello()
                if kind == "end":
                    return
                ours = hello(Lane(theirs.lane), theirs.session)
                await lane.send(ours)
                lane.agree((ours, theirs))
                if kind == "garbage":
                    lane._socket.sendmsg([memoryview(b"XPC1" + trial.random.randbytes(200))])
                elif kind == "wrong":
                    await lane.send(trial.random.choice(WRONG))
                while True:
                    await lane.receive()
            finally:
                lane.close()

    def nobody(_greeting: Hello) -> AwaitedLanes:
        raise MigrationError("this host accepts no migration now")

    reception = Reception(nobody, no_look, trial.world.terms)
    if trial.random.random() < 0.5:
        await switchover(trial)
    async with trio.open_nursery() as tasks:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        tasks.start_soon(trio.serve_listeners, answer, [listener])
        trial.link.to = listener.socket.getsockname()
        trial.link.cut()
        await trio.sleep(trial.random.uniform(0.2, 1.2))
        trial.link.to = ("127.0.0.1", trial.world.port)
        trial.link.cut()
        tasks.cancel_scope.cancel()


async def switchover(trial: Trial) -> None:
    """Wait until the guest's switchover is near, or past."""
    for _ in range(200):
        with contextlib.suppress(MigrationError):
            line = await in_thread(trial.line, "sender")
            if line is None or line["phase"] not in ("connecting", "preflight", "precopy"):
                return
        await trio.sleep(0.002)


# ---- the guest ----
async def destroy_guest(trial: Trial) -> None:
    """Destroy the guest, at one end or at both."""
    trial.destroyed = True
    source, destination = trial.world.source, trial.world.destination
    for host in trial.random.choice([[source], [destination], [destination, source]]):
        await in_thread(destroy, host, trial.spec.name)


async def lose_source(trial: Trial) -> None:
    """Destroy the source while the destination lacks pages."""
    for _ in range(200):
        async with trial.killing:
            line = await trial.answered(trial.line, "sender")
        if line is not None and line["handed_over"] and line["outstanding"]:
            trial.destroyed = trial.source_lost = True
            await in_thread(destroy, trial.world.source, trial.spec.name)
            return
        if line is None or line["phase"] in ENDED:
            return
        await trio.sleep(0.005)


async def busy_pages(trial: Trial) -> None:
    """Hold references to pages of the incoming domain."""

    def hold() -> None:
        with contextlib.suppress(XenError), trial.world.destination.open(trial.spec.name) as domain:
            for pfn in np.random.default_rng(trial.seed).integers(0, domain.nr_pfns, 20).tolist():
                with contextlib.suppress(XenError):
                    if domain.state() is DomainState.INCOMING:
                        domain.set_page(pfn, refs=1)

    await in_thread(hold)


async def set_memory(trial: Trial) -> None:
    """Call ``xl mem-set``: the balloon, which is held, moves until the sender notices."""

    def lift() -> None:
        with contextlib.suppress(XenError), trial.world.source.open(trial.spec.name) as domain:
            domain.set_max_pages(trial.spec.pages)

    for _ in range(trial.random.choice([1, 5])):
        await in_thread(lift)
        await trio.sleep(trial.random.uniform(0, 0.05))


async def use_memory_up(trial: Trial) -> None:
    """Let Xen give the incoming domain no further frame for a while, as if other guests used all
    memory.
    """

    def limit(pages: int | None) -> None:
        with contextlib.suppress(XenError), trial.world.destination.open(trial.spec.name) as domain:
            domain.set_max_pages(domain.reservation().tot_pages if pages is None else pages)

    await in_thread(limit, None)
    await trio.sleep(trial.random.uniform(0.1, 1))
    await in_thread(limit, trial.spec.pages)


REFUSED = (
    "suspend", "resume", "log_dirty", "set_max_pages", "destroy", "start", "pause", "unpause",
    "paging_disable",
)  # fmt: skip
"""Calls of Xen that may fail for a while, as requests of the simulated host."""


async def refuse_calls(trial: Trial) -> None:
    """Let calls of Xen about the guest fail for a while.  Some of these calls follow an error, so
    the link may be cut as well.
    """
    host = trial.random.choice([trial.world.source, trial.world.destination])
    calls = trial.random.sample(REFUSED, trial.random.choice([1, 4, len(REFUSED)]))
    with contextlib.suppress(XenError):  # there may be no such domain, or no more
        domain = await in_thread(host.open, trial.spec.name)
        with domain:
            await in_thread(domain.refuse, *calls)
            if trial.random.random() < 0.5:
                await trio.sleep(trial.random.uniform(0, 0.3))
                trial.link.cut()
            await trio.sleep(trial.random.uniform(0.1, 1))
            await in_thread(domain.refuse)


FAULTS = [
    Fault("sender killed", lambda trial: trial.kill("sender")),
    Fault("receiver killed", lambda trial: trial.kill("receiver")),
    Fault("both killed", lambda trial: trial.kill("sender", "receiver")),
    Fault("destination lost", lose_destination),
    Fault("sender stopped", lambda trial: halt(trial, "sender")),
    Fault("receiver stopped", lambda trial: halt(trial, "receiver")),
    Fault("SIGHUP", hang_up),
    Fault("SIGHUP", hang_up),
    Fault("disk full", full_disk),
    Fault("state read-only", read_only_state),
    Fault("few descriptors", few_descriptors),
    Fault("link cut", cut, "guest"),
    Fault("one end cut", cut_one_end, "guest"),
    Fault("link down", down, "guest"),
    Fault("link silent", silence, "guest"),
    Fault("delay", delay, "guest"),
    Fault("trickle", trickle, "guest"),
    Fault("slow link", slow, "nobody"),
    Fault("bit flipped", flip_a_bit, "guest"),
    Fault("truncated", truncate, "guest"),
    Fault("repeated", repeat, "guest"),
    Fault("reordered", swap, "guest"),
    Fault("pages busy", busy_pages, "guest"),
    Fault("memory used up", use_memory_up, "guest"),
    Fault("memory set", set_memory, "guest"),
    Fault("calls refused", refuse_calls, "guest"),
    Fault("impostor", impostor, "guest"),
    Fault("guest destroyed", destroy_guest, "guest"),
    Fault("source destroyed", lose_source, "guest"),
    Fault("hostile peer", hostile_peer, "nobody"),
    Fault("certificates renewed", renew_certificates, "nobody", tls=True),
    Fault("certificates renewed", renew_certificates, "nobody", tls=True),
]
"""Each trial chooses from these.  A fault that is here twice is chosen twice as often."""
