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
    """Return the version of the running Xen, or 0.0 if there is none."""
    try:
        major, minor = (int(_read(f"{VERSION}/{part}")) for part in ("major", "minor"))
    except (OSError, ValueError):
        return 0, 0
    return major, minor


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def program() -> str:
    """Return the path of the stock helper that belongs to the running Xen."""
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
    """Execute the stock helper in this process.  ``reason``: why the daemons do not do the work;
    ``None`` if they never do it.
    """
    require(reason)
    helper = program()
    # Python ignores SIGPIPE, and the stock helper would inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(helper, [helper, *request.arguments(request.io_fd)])
    except OSError as error:
        libxl.fail(f"cannot start {helper}: {error.strerror}", error.errno or 0)


def save_after_headers(request: Request) -> Never:
    """Leave the saving to the stock helper, when the headers have been written already."""
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
    # If the helper or the stream ends early, the helper reports the reason.
    with contextlib.suppress(BrokenPipeError, EOFError):
        write_all(writer, before)
        if record is not None:
            _pump(request.io_fd, writer, record.padded)
            if record.type != image.REC_TYPE_END:
                _pass_records(request.io_fd, writer)
    os.close(writer)
    _end_with(child)


def _start(request: Request, io_fd: int) -> subprocess.Popen[bytes]:
    """Start the stock helper with ``io_fd`` for the stream, and close ``io_fd`` here."""
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
    """End as the stock helper ends: with the same exit status, or by the same signal."""
    status = child.wait()
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL's action cannot be set
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
