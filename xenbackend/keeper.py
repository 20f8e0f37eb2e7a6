# SPDX-License-Identifier: GPL-2.0-or-later
"""The keeper: a process that keeps held pages when the process that holds them is killed, and sends
them to its successor.

A page of a destroyed domain cannot be mapped again.  Therefore the keeper shares the memory of the
process that has mapped the pages (``native/keeper.c``), so that no page is mapped twice.  The
successor reads the pages over a Unix socket.  The keeper ends with :meth:`Domain.close` of either
process.  A keeper that is killed alone is replaced.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import functools
import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xenbackend._keeper import ffi, lib
from xenbackend.contract import Domain, Hypervisor
from xenbackend.errors import NoSuchDomainError, XenError, no_such_domain
from xenbackend.pages import PAGE_SIZE, MappedPages, NativePages, PageStatus, PfnArray
from xenbackend.unix import address_of

log = logging.getLogger(__name__)

MOST_PAGES: int = lib.KEEPER_MOST_PAGES
ANSWER_S = 30.0
"""How long a keeper may take to answer."""
AGAIN_S = 5.0
"""The pause after a keeper could not be replaced."""
ENDED = (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError)
"""The errors that show that there is no keeper.  After any other error there may be one."""


class Keeper:
    """A keeper as its parent has it.  The keeper listens at ``path``.  If the keeper is killed, a
    thread starts another one.

    ``pages``: as ``struct keeper_setup`` wants them; ``pages.domain`` has ``domain_bytes`` bytes.
    ``alive``: a descriptor that hangs up when there is nothing to keep any more.

    Raises ``XenError`` if the keeper cannot be started.
    """

    def __init__(
        self, path: Path, nr_pfns: int, pages: NativePages, domain_bytes: int, alive: int = -1
    ):
        self._path, self._memory, self._pid = path, ffi.new("void **"), 0
        setup = self._setup = ffi.new("struct keeper_setup *")
        setup.nr_pfns, setup.domain_bytes, setup.alive = nr_pfns, domain_bytes, alive
        setup.domain, setup.look, setup.looked = pages.domain, pages.look, pages.looked
        self._lock = threading.Lock()
        """Held while the keeper is started, killed, or reaped."""
        self._not_needed = threading.Event()
        replace = functools.partial(contextvars.copy_context().run, self._replace)
        self._thread = threading.Thread(target=replace, name="keeper", daemon=True)
        try:
            self._start()
        except OSError as error:
            raise XenError("keeper", error.errno or errno.EIO, why=str(error)) from error
        try:
            self._thread.start()
        except RuntimeError as error:
            self._kill()
            self._bury()
            raise XenError("keeper", errno.EAGAIN, why=str(error)) from error

    def _start(self) -> None:
        """Start a keeper, and wait until it answers.  Raises ``OSError``."""
        with socket.socket(socket.AF_UNIX) as listener:
            self._path.unlink(missing_ok=True)  # of a keeper that has ended
            with address_of(self._path) as address:
                listener.bind(address)
            self._path.chmod(0o600)
            listener.listen()
            self._setup.listener = listener.fileno()
            pid = lib.keeper_start(self._setup, self._memory)
        if pid < 0:
            _remove(self._path)
            raise OSError(-pid, os.strerror(-pid))
        self._pid = pid
        try:
            KeptPages(self._path).close()
        except BaseException:
            self._kill()
            self._bury()
            raise

    def _kill(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _bury(self) -> int:
        """Release what is left of a keeper that ends.  Returns its status."""
        status = 0
        with contextlib.suppress(ChildProcessError):
            _pid, status = os.waitpid(self._pid, 0)
        self._pid = 0
        lib.keeper_free(self._memory[0])
        _remove(self._path)
        return status

    def _replace(self) -> None:
        """Start another keeper whenever one is killed, until none is needed.  A keeper that ends by
        itself has nothing to keep any more.
        """
        while pid := self._pid:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                status = self._bury()
            if self._not_needed.is_set() or not os.WIFSIGNALED(status):
                return
            about = "the keeper at %s was killed by signal %d: starting another one"
            log.warning(about, self._path, os.WTERMSIG(status))
            while not self._is_replaced():
                self._not_needed.wait(AGAIN_S)

    def _is_replaced(self) -> bool:
        """Start a keeper, if one is needed.  Returns false if the attempt is to be repeated."""
        with self._lock:
            if self._not_needed.is_set():
                return True
            try:
                self._start()
            except OSError as error:
                about = "no keeper at %s: if this process is killed, a guest's pages are lost: %s"
                log.error(about, self._path, error)
                return False
            return True

    def end(self) -> None:
        """End the keeper.  The pages are kept only for as long as this process maps them."""
        self._not_needed.set()
        with self._lock:
            self._kill()
        self._thread.join()


class KeptPages:
    """The pages that the keeper at ``path`` has.  Raises ``OSError``; see :data:`ENDED`.

    Several threads may use the object.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(ANSWER_S)
            with address_of(self._path) as address:
                self._socket.connect(address)
            self.nr_pfns = int.from_bytes(self._receive(8), "little")
        except BaseException:
            self._socket.close()
            raise

    def _receive(self, size: int) -> bytearray:
        into = bytearray(size)
        left = memoryview(into)
        while left:
            got = self._socket.recv_into(left)
            if not got:
                raise ConnectionResetError(errno.ECONNRESET, "the keeper has closed the connection")
            left = left[got:]
        return into

    def read(self, pfns: PfnArray) -> MappedPages:
        """Return copies of pages.  A page that is not kept is a hole.  Raises ``OSError``; the call
        can be repeated then.
        """
        status, data = np.empty(len(pfns), dtype=np.uint8), []
        with self._lock:
            if self._socket.fileno() < 0:
                self._connect()
            try:
                for at in range(0, len(pfns), MOST_PAGES):
                    found, contents = self._ask(pfns[at : at + MOST_PAGES])
                    status[at : at + len(found)] = found
                    data.append(contents)
            except BaseException:
                self._socket.close()  # a late answer would be taken for another one
                raise
        status[status >= PageStatus.PAGED] = PageStatus.HOLE
        return MappedPages(status, [contents for contents in data if contents])

    def _ask(self, pfns: PfnArray) -> tuple[NDArray[np.uint8], memoryview]:
        numbers = np.ascontiguousarray(pfns, dtype=np.uint64)
        self._socket.sendall(len(numbers).to_bytes(8, "little") + numbers.tobytes())
        status = np.frombuffer(self._receive(len(numbers)), dtype=np.uint8)
        count = int(np.count_nonzero(status == PageStatus.DATA))
        return status, memoryview(self._receive(count * PAGE_SIZE)).toreadonly()

    def has_ended(self) -> bool:
        """Return whether the keeper has ended."""
        with self._lock:
            self._socket.close()  # the keeper serves one connection at a time
            try:
                self._connect()
            except OSError as error:
                return isinstance(error, ENDED)
        return False

    def close(self) -> None:
        self._socket.close()

    def end(self) -> None:
        """End the keeper.  Raises ``OSError`` if the keeper does not end."""
        with self._socket:
            self._socket.sendall(bytes(8))
            while self._socket.recv(4096):
                pass


def end_keeper(path: Path) -> None:
    """End the keeper that a predecessor has left at ``path``, if there is one.  An error is
    logged, because nothing depends on the keeper.
    """
    try:
        with contextlib.suppress(*ENDED):
            KeptPages(path).end()
    except OSError as error:
        log.error("the keeper at %s does not end: %s", path, error)
    else:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove the socket of a keeper that has ended."""
    with contextlib.suppress(OSError):  # a read-only file system may have no such file either
        path.unlink()


def _of_domain(name: str) -> Any:
    """Return the method of that name of the domain itself.  Raises :class:`NoSuchDomainError` if
    the domain is gone.
    """

    def call(self: KeptDomain, *arguments: Any, **options: Any) -> Any:
        return getattr(self.existing, name)(*arguments, **options)

    return call


class KeptDomain(Domain):
    """A domain whose held pages a predecessor's keeper has, also when the domain is gone.

    ``domain``: the domain itself, or ``None`` if it is gone.
    """

    has_keeper = True

    def __init__(
        self, path: Path, domid: int, handle: bytes, domain: Domain | None, kept: KeptPages
    ):
        self.domid, self.handle, self.nr_pfns = domid, handle, kept.nr_pfns
        self._path, self._domain, self._kept = path, domain, kept
        self._closed = False

    @property
    def existing(self) -> Domain:
        if self._domain is None:
            raise no_such_domain(self.domid)
        return self._domain

    # ---- pages ----
    def map_pages(self, pfns: PfnArray) -> MappedPages:
        """Read pages.  Raises ``XenError`` if neither the keeper nor the domain has them."""
        try:
            return self._kept.read(pfns)
        except OSError as error:
            if self._domain is not None:
                return self._domain.map_pages(pfns)
            raise XenError("map", errno.EIO, why=f"the keeper of the pages: {error}") from error

    def hold(self, pfns: PfnArray) -> None:
        pass

    def release(self, pfns: PfnArray) -> None:
        pass

    def keep(self, path: Path) -> None:
        pass

    def holds_are_lost(self) -> bool:
        return self._kept.has_ended()

    def close(self) -> None:
        """End the keeper as well."""
        if not self._closed:
            self._closed = True
            self._kept.close()
            end_keeper(self._path)
        if self._domain is not None:
            self._domain.close()

    def destroy(self) -> None:
        domain = self.existing
        domain.info()
        self.close()
        domain.destroy()

    # ---- what the domain itself is asked ----
    info = _of_domain("info")
    state = _of_domain("state")
    config = _of_domain("config")
    cpu_policy = _of_domain("cpu_policy")
    preflight = _of_domain("preflight")
    rename = _of_domain("rename")
    reservation = _of_domain("reservation")
    set_max_pages = _of_domain("set_max_pages")
    suspend = _of_domain("suspend")
    resume = _of_domain("resume")
    start = _of_domain("start")
    pause = _of_domain("pause")
    unpause = _of_domain("unpause")
    end = _of_domain("end")
    has_run = _of_domain("has_run")
    context = _of_domain("context")
    set_context = _of_domain("set_context")
    toolstack_gfns = _of_domain("toolstack_gfns")
    log_dirty_enable = _of_domain("log_dirty_enable")
    log_dirty_disable = _of_domain("log_dirty_disable")
    log_dirty_is_on = _of_domain("log_dirty_is_on")
    log_dirty = _of_domain("log_dirty")
    present = _of_domain("present")
    reserve = _of_domain("reserve")
    populate = _of_domain("populate")
    depopulate = _of_domain("depopulate")
    write_pages = _of_domain("write_pages")
    pinned = _of_domain("pinned")
    held = _of_domain("held")
    device_memory = _of_domain("device_memory")
    devices = _of_domain("devices")
    has_pager = _of_domain("has_pager")
    paging_enable = _of_domain("paging_enable")
    paging_attach = _of_domain("paging_attach")
    paging_disable = _of_domain("paging_disable")
    populate_evicted = _of_domain("populate_evicted")
    paged_out = _of_domain("paged_out")
    load = _of_domain("load")


def open_with_keeper(
    path: Path, hypervisor: Hypervisor, domid: int, handle: bytes | None
) -> Domain:
    """Open a domain as :meth:`Hypervisor.open` does, with the pages that a keeper at ``path`` has.
    If there is a keeper, the domain may be gone.

    Raises as :meth:`Hypervisor.open`, and ``XenError`` if the keeper does not answer.
    """
    try:
        kept = KeptPages(path)
    except ENDED:
        _remove(path)
        return hypervisor.open(domid, handle)
    except OSError as error:
        raise XenError("keeper", error.errno or errno.EIO, why=str(error)) from error
    try:
        domain = hypervisor.open(domid, handle)
    except NoSuchDomainError:
        return KeptDomain(path, domid, handle or b"", None, kept)
    except BaseException:
        kept.close()
        raise
    return KeptDomain(path, domid, domain.handle, domain, kept)
