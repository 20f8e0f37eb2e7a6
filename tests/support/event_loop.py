# SPDX-License-Identifier: GPL-2.0-or-later
"""A check for all tests: no call that may block is made in the event loop's thread.

A hypervisor may take seconds for a call (the end of a large domain, a busy host), and so may a
disk, a name server or xl.  While the event loop waits for one call, every other guest of the daemon
waits as well.  No clock shows this, because these calls are quick on a test's machine.  So
:func:`install` makes such a call raise :class:`BlockingCallError`.  Methods of the backends, of the
journal and of checkpoints are wrapped; calls about files, names and processes are found by Python's
audit events.

Only calls by the product's own code count.  A test may make any call in its own loop.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import trio

TREE = Path(__file__).parents[2]
PRODUCT = tuple(str(TREE / folder) + os.sep for folder in ("migrate", "sender", "receiver"))
BETWEEN = (
    str(TREE / "xenbackend") + os.sep,
    str(TREE / "migrate/service/journal.py"),
    str(TREE / "migrate/service/history.py"),
    str(TREE / "migrate/service/files.py"),
    os.path.dirname(os.__file__) + os.sep,
    __file__,
)
"""Files whose calls count as calls of their callers."""
NOT_BY_DAEMONS = tuple(
    str(TREE / "migrate" / name) for name in ("cli/", "xl/", "loopback.py", "client.py")
)
AT_START = ("listen_unix", "_serve", "_resume_migration", "__init__")
"""Functions that run before anything is served."""
EVENTS = {
    "open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir",
    "os.truncate", "os.utime", "fcntl.flock", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.gethostbyaddr", "socket.getnameinfo", "subprocess.Popen", "shutil.rmtree", "time.sleep",
}  # fmt: skip
AUDITS = "coverage" not in sys.modules
"""``sys.settrace`` of Python 3.11 refuses to work in two threads at once, and raises an audit event
in the middle of its work.  A hook in Python lets another thread run there, and coverage then cannot
set that thread's tracer.
"""
CODE = (".py", ".pyc", ".so")
"""The suffixes of modules, which may be imported late."""
QUICK = {
    "native_pages", "fileno", "checkpoint", "stopped", "keeper", "history", "check_understood",
    "leave", "try_keep",
}  # fmt: skip
"""Methods that only read the state of this process."""


class BlockingCallError(BaseException):
    """The product made a call that may block in the event loop's thread."""


def _product_frame(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the product's code that has made the call, if there is one."""
    while frame is not None and frame.f_code.co_filename.startswith(BETWEEN):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(PRODUCT):
        return None
    if frame.f_code.co_filename.startswith(NOT_BY_DAEMONS) or frame.f_code.co_name in AT_START:
        return None
    return frame


def in_event_loop() -> bool:
    """Whether this thread runs an event loop.  trio has a function for that from 0.23 on."""
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True


def _check(what: str) -> None:
    if not in_event_loop():
        return
    frame = _product_frame(sys._getframe(2))
    if frame is None:
        return
    code = frame.f_code
    place = f"{code.co_filename}:{frame.f_lineno} ({code.co_name})"
    raise BlockingCallError(f"{what} in the event loop, by {place}")


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        _check(name)
        return function(*arguments, **options)

    return call


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS and not (event == "open" and str(arguments[0]).endswith(CODE)):
        _check(f"{event} {arguments[0]!r}")


def watch(*classes: type) -> None:
    """Make the methods of these classes raise :class:`BlockingCallError` in the event loop's
    thread.
    """
    for cls in classes:
        for name, function in list(vars(cls).items()):
            if (
                callable(function)
                and not name.startswith("_")
                and name not in QUICK
                and not isinstance(function, type)
            ):
                setattr(cls, name, _watched(f"{cls.__name__}.{name}", function))


def install() -> None:
    """Watch the event loop of this process, for as long as it runs."""
    from migrate.service.journal import Journal
    from sender.checkpoints import CheckpointStore
    from sender.ownership import Ownership
    from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor

    watch(SimulatedHypervisor, SimulatedDomain, Journal, CheckpointStore, Ownership)
    if AUDITS:
        sys.addaudithook(_audit)
