# SPDX-License-Identifier: GPL-2.0-or-later
"""libxl's own helper: where it is, and three ways to leave a domain to it.

Before a byte of the stream has been written or read, this process executes the stock helper.
Afterwards the stock helper works on a pipe of ours.  A saving helper's stream begins with headers
that have been sent already.  A restoring helper is given the bytes that have been read already.
Records are passed on up to and including END; what follows in the stream is libxl's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from typing import TYPE_CHECKING, Never

from migrate.xl import image, libxl
from migrate.xl.libxl import Request, read_exactly, write_all

if TYPE_CHECKING:
    import subprocess

SPLICE_BYTES = 1 << 20
PLACES = (
    "/usr/lib/xen-{version}/bin",
    "/usr/libexec/xen/bin",
    "/usr/lib/xen/bin",
    "/usr/local/lib/xen/bin",
)
VERSION = "/sys/hypervisor/version"


def xen_version() -> tuple[int, int]:
    """Of the hypervisor that runs; 0.0 where there is none."""
    try:
        major, minor = (int(_read(f"{VERSION}/{part}")) for part in ("major", "minor"))
    except (OSError, ValueError):
        return 0, 0
    return major, minor


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def program() -> str:
    """Of the Xen that runs."""
    if chosen := os.environ.get("XEN_POSTCOPY_STOCK_HELPER"):
        return chosen
    version = "{}.{}".format(*xen_version())
    for place in PLACES:
        path = f"{place.format(version=version)}/libxl-save-helper"
        if os.path.exists(path):
            return path
    return "libxl-save-helper"


def require(reason: str | None) -> None:
    """Fail if XEN_POSTCOPY=require forbids the stock helper.  Otherwise log ``reason``, if there is
    one.
    """
    if reason is None:
        return
    if os.environ.get("XEN_POSTCOPY") == "require":
        libxl.fail(f"XEN_POSTCOPY=require, and {reason}", errno.EOPNOTSUPP)
    libxl.notice(f"{reason}: using Xen's own live migration")


def become(request: Request, reason: str | None) -> Never:
    """``reason``: why it is not ours, where it might be."""
    require(reason)
    helper = program()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and that would be inherited
    try:
        os.execvp(helper, [helper, *request.arguments(request.io_fd)])
    except OSError as error:
        libxl.fail(f"cannot start {helper}: {error.strerror}", error.errno or 0)


def save_after_headers(request: Request) -> Never:
    """The headers are in the stream already."""
    reader, writer = os.pipe()
    child = _start(request, writer)
    with contextlib.suppress(BrokenPipeError, EOFError):
        read_exactly(reader, image.HEADER_BYTES)
        _pass_records(reader, request.io_fd)
    os.close(reader)
    _end_with(child)


def restore_rest(request: Request, before: bytes, record: image.RecordHeader | None) -> Never:
    """Leave the rest of the stream to the stock helper.  ``before``: the bytes that have been read,
    up to the header of ``record``; ``None``: no record follows.
    """
    reader, writer = os.pipe()
    child = _start(request, reader)
    # It may end early, or the stream may: it knows what to say of that.
    with contextlib.suppress(BrokenPipeError, EOFError):
        write_all(writer, before)
        if record is not None:
            _pump(request.io_fd, writer, record.padded)
            if record.type != image.REC_TYPE_END:
                _pass_records(request.io_fd, writer)
    os.close(writer)
    _end_with(child)


def _start(request: Request, io_fd: int) -> subprocess.Popen[bytes]:
    """With ``io_fd`` for the stream, which is not ours any more."""
    import subprocess

    helper = program()
    try:
        child = subprocess.Popen(
            [helper, *request.arguments(io_fd)],
            pass_fds=[fd for fd in (io_fd, request.numbers[1]) if fd >= 0],
        )
    except OSError as error:
        libxl.fail(f"cannot start {helper}: {error.strerror}", error.errno or 0)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    os.close(io_fd)
    return child


def _end_with(child: subprocess.Popen[bytes]) -> Never:
    """As it does."""
    status = child.wait()
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _pass_records(source: int, to: int) -> None:
    while True:
        header = read_exactly(source, image.RECORD_HEADER.size)
        write_all(to, header)
        record = image.read_record_header(header)
        _pump(source, to, record.padded)
        if record.type == image.REC_TYPE_END:
            return


def _pump(source: int, to: int, count: int) -> None:
    while count:
        moved = os.splice(source, to, min(count, SPLICE_BYTES))
        if not moved:
            raise EOFError
        count -= moved
