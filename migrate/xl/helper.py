"""``xen-postcopy-xl-helper``: the program that libxl starts to save or restore a domain, when LIBXL_SAVE_HELPER names it.

This version does nothing but to decide whose work it is, and that is always the stock helper's: what it does not do itself it
leaves to that one, which notices nothing.  Saving is handed over before a byte is written.  A restore cannot be: whose
stream it is shows in the stream, and a pipe cannot be read twice.  So the stock helper reads a pipe of our own, which
gets what was read already and then the rest, up to and including END; what follows in the stream is libxl's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from migrate.xl import image, protocol
from migrate.xl.protocol import Level

USAGE = """\
usage: xen-postcopy-xl-helper --save-domain IO_FD RECV_FD DOMID XCFLAGS CBFLAGS STREAM_TYPE
       xen-postcopy-xl-helper --restore-domain IO_FD SEND_BACK_FD DOMID STORE_EVTCHN STORE_DOMID
                              CONSOLE_EVTCHN CONSOLE_DOMID CBFLAGS STREAM_TYPE

libxl starts this program in place of its own libxl-save-helper when the environment of xl names it:

    LIBXL_SAVE_HELPER=/usr/bin/xen-postcopy-xl-helper xl migrate GUEST HOST

XEN_POSTCOPY=off        hand everything to the stock helper, without a word
XEN_POSTCOPY=require    fail where a migration would be handed to it
"""
ARGUMENTS = {"--save-domain": 6, "--restore-domain": 9}
XCFLAGS_LIVE = 1
SPLICE_BYTES = 1 << 20
STOCK_HELPERS = ("/usr/lib/xen-{version}/bin", "/usr/libexec/xen/bin", "/usr/lib/xen/bin", "/usr/local/lib/xen/bin")
NOT_YET = "this version of xen-postcopy leaves guests of xl to precopy"


@dataclass(frozen=True)
class Request:
    """What libxl asks for."""

    mode: str
    numbers: tuple[int, ...]

    @property
    def io_fd(self) -> int:
        return self.numbers[0]

    @property
    def saves(self) -> bool:
        return self.mode == "--save-domain"

    @property
    def checkpointed(self) -> bool:
        """Remus or COLO: streams that go on after END."""
        return self.numbers[-1] != 0

    @property
    def live(self) -> bool:
        return bool(self.numbers[3] & XCFLAGS_LIVE)

    def arguments(self, io_fd: int) -> list[str]:
        return [self.mode, *map(str, (io_fd, *self.numbers[1:]))]

    @classmethod
    def parse(cls, arguments: list[str]) -> Request:
        """Raises :class:`ValueError`."""
        mode, *rest = arguments or [""]
        if len(rest) != ARGUMENTS.get(mode, -1):
            raise ValueError("not the arguments that libxl gives")
        return cls(mode, tuple(map(int, rest)))


def stock_helper() -> str:
    """libxl's own, of the Xen that runs."""
    if chosen := os.environ.get("XEN_POSTCOPY_STOCK_HELPER"):
        return chosen
    version = ".".join(_hypervisor(part) for part in ("major", "minor"))
    for place in STOCK_HELPERS:
        path = Path(place.format(version=version)) / "libxl-save-helper"
        if path.exists():
            return str(path)
    return "libxl-save-helper"


def _hypervisor(part: str) -> str:
    try:
        return Path(f"/sys/hypervisor/version/{part}").read_text().strip()
    except OSError:
        return "?"


def say(message: bytes) -> None:
    os.write(1, message)


def fail(reason: str, number: int) -> Never:
    """As the stock helper ends when something goes wrong: it says so, is answered, and exits with 0."""
    say(protocol.log(Level.ERROR, reason, errno=number))
    say(protocol.complete(-1, number))
    _read_exactly(0, protocol.ANSWER.size)
    sys.exit(0)


def hand_over(request: Request, reason: str | None) -> Never:
    """Become the stock helper.  With a reason it is worth a line, and with XEN_POSTCOPY=require a failure."""
    if reason is not None:
        if os.environ.get("XEN_POSTCOPY") == "require":
            fail(f"XEN_POSTCOPY=require, and {reason}", errno.EOPNOTSUPP)
        say(protocol.log(Level.NOTICE, f"{reason}: using Xen's own live migration"))
    program = stock_helper()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and that would be inherited
    try:
        os.execvp(program, [program, *request.arguments(request.io_fd)])
    except OSError as error:
        fail(f"cannot start {program}: {error.strerror}", error.errno or 0)


def _read_exactly(fd: int, count: int) -> bytes:
    """Raises :class:`EOFError`."""
    data = b""
    while len(data) < count:
        more = os.read(fd, count - len(data))
        if not more:
            raise EOFError(f"the stream ends after {len(data)} of {count} bytes")
        data += more
    return data


class Restore:
    """One incoming stream: read until it shows whose it is."""

    def __init__(self, request: Request):
        self._request = request
        self._read = bytearray()

    def _take(self, count: int) -> bytes:
        data = _read_exactly(self._request.io_fd, count)
        self._read += data
        return data

    def run(self) -> Never:
        try:
            image.check_headers(self._take(image.HEADER_BYTES))
            record = self._next()
            while record.is_static:
                self._take(record.padded)
                record = self._next()
        except image.ImageError:
            self._pass_on(None)  # the stock helper has the better words for it
        except (EOFError, OSError) as error:
            fail(f"the migration's stream: {error}", errno.EPIPE)
        if record.type == image.REC_TYPE_POSTCOPY:
            fail(
                "the sender wants postcopy, and this version of xen-postcopy cannot take xl's guests in by it",
                errno.EOPNOTSUPP,
            )
        if os.environ.get("XEN_POSTCOPY") == "require":
            fail("XEN_POSTCOPY=require, and the sender uses Xen's own live migration", errno.EOPNOTSUPP)
        self._pass_on(record)

    def _next(self) -> image.RecordHeader:
        return image.read_record_header(self._take(image.RECORD_HEADER.size))

    def _pass_on(self, record: image.RecordHeader | None) -> Never:
        """``record``: the one whose header was read last; ``None``: no record is to be expected."""
        ours, theirs = os.pipe()
        program = stock_helper()
        try:
            child = subprocess.Popen(
                [program, *self._request.arguments(ours)],
                pass_fds=[fd for fd in (ours, self._request.numbers[1]) if fd >= 0],
            )
        except OSError as error:
            fail(f"cannot start {program}: {error.strerror}", error.errno or 0)
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        os.close(ours)
        # It may end early, or the stream may: it knows what to say of that.
        with contextlib.suppress(BrokenPipeError, EOFError):
            _write_all(theirs, bytes(self._read))
            while record is not None:
                self._pump(theirs, record.padded)
                if record.type == image.REC_TYPE_END:
                    break
                header = _read_exactly(self._request.io_fd, image.RECORD_HEADER.size)
                record = image.read_record_header(header)
                _write_all(theirs, header)
        os.close(theirs)
        status = child.wait()
        if status < 0:
            os.kill(os.getpid(), -status)
        sys.exit(status)

    def _pump(self, to: int, count: int) -> None:
        while count:
            moved = os.splice(self._request.io_fd, to, min(count, SPLICE_BYTES))
            if not moved:
                raise EOFError
            count -= moved


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def main() -> None:
    """The entry point."""
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        print(USAGE, end="")
        return
    try:
        request = Request.parse(arguments)
    except ValueError as error:
        sys.exit(f"xen-postcopy-xl-helper: {error}\n{USAGE}")
    to_file = stat.S_ISREG(os.fstat(request.io_fd).st_mode)
    if os.environ.get("XEN_POSTCOPY") == "off" or to_file or request.checkpointed:
        hand_over(request, None)
    if not request.saves:
        Restore(request).run()
    hand_over(request, NOT_YET if request.live else None)


if __name__ == "__main__":
    main()
