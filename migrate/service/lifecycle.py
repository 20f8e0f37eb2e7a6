# SPDX-License-Identifier: GPL-2.0-or-later
"""What both daemons do in the same way: start, report their state to systemd or to the process that
started them, and stop.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import trio

from migrate.errors import MigrationError, UnknownMigrationError
from migrate.logs import Complaint
from migrate.outcomes import outcome
from migrate.service.journal import Kept
from migrate.tasks import isolated
from migrate.units import command

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 50e-6
OWNED = "XEN_POSTCOPY_OWNED"
"""The environment variable of a process that ends when the process that started it ends."""
LISTEN_FDS_START = 3
"""The first descriptor that systemd passes on (sd-daemon(3))."""
ACCEPT_AGAIN_S = 0.1
DRAIN_EVERY_S = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A terminal that closes sends SIGHUP, perhaps more than once.  No terminal may end the pager of a
guest, so a further SIGHUP does not cut the draining short.
"""
STOPPING = (
    "this daemon is being stopped, and serves only the guests that need it: try again when it was "
    "restarted"
)
"""The answer to a request for a new migration."""
STRANGERS_SHARE = 0.75
"""The share of the descriptors that strangers may use.  The rest is for migrations that run, their
journals, and requests at the control socket.
"""


@functools.cache
def _notify_socket() -> socket.socket:
    """One socket for the life of the process.  Later there may be no free descriptor, and systemd
    ends a daemon that does not feed its watchdog.
    """
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def notify(state: str) -> None:
    """Send our state to the process that started us (systemd, ``loopback``), by sd_notify(3).  Does
    nothing if that process did not ask for it.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError):  # the other process has ended, or is too slow
        path = "\0" + address[1:] if address.startswith("@") else address
        _notify_socket().sendto(state.encode(), socket.MSG_DONTWAIT, path)


def end_with_owner() -> None:
    """End this process when its owner ends, if the process has an owner.  Standard input is then a
    pipe whose other end only the owner has.

    ``PR_SET_PDEATHSIG`` does not serve here: the kernel sends that signal when the thread ends that
    started this process.
    """

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.pop(OWNED, None):
        threading.Thread(target=wait, daemon=True, name="owner").start()


def inherited_socket() -> socket.socket | None:
    """Return the listening socket that systemd has made, or ``None``: sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return socket.socket(fileno=LISTEN_FDS_START)


async def _feed_watchdog() -> None:
    """Feed systemd's watchdog from the event loop, so that systemd notices a loop that hangs:
    sd_watchdog_enabled(3).
    """
    interval_us = os.environ.get("WATCHDOG_USEC")
    if not interval_us or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(int(interval_us) / 1e6 / 3)


async def until_stopped(
    serve: Callable[[], Awaitable[None]], drain: Callable[[], Awaitable[bool]]
) -> None:
    """Run ``serve`` until one of :data:`STOP_SIGNALS`, and then for as long as ``drain`` returns
    that guests need this daemon.  A second signal other than SIGHUP ends ``serve`` at once.
    """
    # The longest time for which a thread that serves a fault waits for a thread that computes
    # (default: 5 ms).
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # No limit for the threads: many guests that wait for a slow peer must not keep other guests
    # from getting a thread.
    trio.to_thread.current_default_thread_limiter().total_tokens = math.inf
    # As many descriptors as the system allows, because many strangers may connect.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The objects loaded so far stay loaded.  The garbage collector, for which every thread waits,
    # need not examine them again.
    gc.freeze()
    # A signal that nohup(1) has set to be ignored stays ignored.
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    # After the block below the process ends, and a further SIGHUP must still do nothing.
    if signal.SIGHUP in heeded:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with trio.open_signal_receiver(*heeded) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_feed_watchdog)
            nursery.start_soon(serve)
            await anext(aiter(signals))
            notify("STOPPING=1")
            async with trio.open_nursery() as draining:
                draining.start_soon(_second_signal, signals, draining)
                while await _is_needed(drain):
                    await trio.sleep(DRAIN_EVERY_S)
                draining.cancel_scope.cancel()
            nursery.cancel_scope.cancel()


async def _is_needed(drain: Callable[[], Awaitable[bool]]) -> bool:
    """Whether guests need this daemon.  After an error the answer is yes, because they may."""
    try:
        return await drain()
    except Exception:
        log.exception("internal error in stopping: this daemon stays, because guests may need it")
        return True


async def _second_signal(signals: AsyncIterator[int], draining: trio.Nursery) -> None:
    async for number in signals:
        if number != signal.SIGHUP:
            break
    log.warning("stopped for the second time: not waiting any longer")
    draining.cancel_scope.cancel()


async def serve_connections(
    what: str,
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    listeners: list[trio.SocketListener],
    *,
    from_strangers: bool = False,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Handle each connection in a task of its own, until cancelled.  Neither an error of a
    connection nor a failure to accept one ends this function.

    ``what`` names a connection in the log.  Connections ``from_strangers`` get at most
    :data:`STRANGERS_SHARE` of the descriptors.
    """
    exhausted = Complaint(log.error)
    share = STRANGERS_SHARE if from_strangers else 1.0

    async def accept(listener: trio.SocketListener) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except Exception as error:
                    exhausted.log(
                        "%s cannot be accepted: %s; trying again until it can", what, error
                    )
                    await trio.sleep(ACCEPT_AGAIN_S)
                    continue
                # The kernel gives the lowest number that is free.
                if stream.socket.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] * share:
                    exhausted.log(
                        "%s is refused: the descriptors that are left are for migrations that run",
                        what,
                    )
                    stream.socket.close()
                    continue
                tasks.start_soon(isolated, what, handle_and_close, stream)

    async def handle_and_close(stream: trio.SocketStream) -> None:
        try:
            await handle(stream)
        finally:
            stream.socket.close()

    async with trio.open_nursery() as tasks:
        for listener in listeners:
            tasks.start_soon(accept, listener)
        task_status.started(listeners)


LEAST_OF_AN_ID = 8
"""The least number of an id's characters that name a migration; ``list`` shows so many."""


class Named(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def domain_name(self) -> str: ...

    @property
    def has_ended(self) -> bool:
        """Whether the migration has ended."""


RESUMING = "the migration of a killed daemon is being resumed"
"""The problem that a resumed migration shows at first."""


def ended(name: str, phase: str, problem: str, asked: str) -> str:
    """Return the answer to a request that came after the end of its migration."""
    how = outcome(phase, problem) or phase
    if problem:
        how = problem if problem.startswith(how) else f"{how}: {problem}"
    return f"the migration of {name} has ended ({how}): there is nothing to {asked}"


def decide_commands(name: str) -> str:
    """Return the two commands by which an operator decides where the guest runs."""
    return f"{command('decide', name, 'here')} or {command('decide', name, 'elsewhere')}"


M = TypeVar("M", bound=Named)


def find_migration(migrations: Iterable[M], name: str, kept: Iterable[Kept] = ()) -> M:
    """Return a migration by its domain's name, its id, or the first characters of its id.  Eight
    characters are needed, so that no name of a guest is taken for an id.  If one domain has several
    migrations, the one that has not ended is returned, or else the newest.

    Raises :class:`MigrationError`; for an entry of the journal that was ``kept``, with what to do.
    A guest may wait for that entry, so it precedes the migrations that have ended.
    """
    is_id = len(name) >= LEAST_OF_AN_ID
    known = list(migrations)
    waiting = [
        entry
        for entry in kept
        if (name and entry.domain == name) or (is_id and entry.session.startswith(name))
    ]
    named = [m for m in known if m.domain_name == name and name]
    found = [m for m in named if not m.has_ended] or named[-1:]
    found += [m for m in known if is_id and m.id.startswith(name) and m not in found]
    if waiting:
        found = [m for m in found if not m.has_ended]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(m.id[:LEAST_OF_AN_ID] for m in found)
        raise MigrationError(
            f"there is more than one migration {name!r} here: name it by one of these ids: {ids}"
        )
    if waiting:
        raise MigrationError(waiting[0].problem)
    why = ""
    if name and any(m.id.startswith(name) for m in known):
        why = f" (of an id the first {LEAST_OF_AN_ID} characters are needed)"
    raise UnknownMigrationError(
        f"there is no migration {name!r} here{why}: see `xen-postcopy list`"
    )
