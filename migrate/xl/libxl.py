# SPDX-License-Identifier: GPL-2.0-or-later
"""libxl, which starts the helper: its arguments, and the exchange on standard output and input."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple, Never

from migrate.xl import protocol
from migrate.xl.protocol import Level

ARGUMENTS = {"--save-domain": 6, "--restore-domain": 9}
XCFLAGS_LIVE = 1
INPUT, OUTPUT = 0, 1
READ_BYTES = 1 << 20
"""The most bytes that are read in one call."""


class Request(NamedTuple):
    """What libxl asks for."""

    mode: str
    numbers: tuple[int, ...]

    @property
    def io_fd(self) -> int:
        return self.numbers[0]

    @property
    def domid(self) -> int:
        return self.numbers[2]

    @property
    def ports(self) -> dict[str, int]:
        """The event channels of a domain to be restored, and the domains at their other ends."""
        return dict(
            zip(
                ("store", "store_domid", "console", "console_domid"), self.numbers[3:7], strict=True
            )
        )

    @property
    def saves(self) -> bool:
        return self.mode == "--save-domain"

    @property
    def checkpointed(self) -> bool:
        """Whether the stream is one of Remus or COLO, which continues after END."""
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


def send(message: bytes) -> None:
    """Send a message to libxl.  Ends this process if libxl has ended."""
    try:
        write_all(OUTPUT, message)
    except OSError:
        gone()


def ask(message: bytes) -> int:
    """Send a message to libxl, and return libxl's answer.  Ends this process if libxl has ended."""
    send(message)
    try:
        (answer,) = protocol.ANSWER.unpack(read_exactly(INPUT, protocol.ANSWER.size))
    except (EOFError, OSError):
        gone()
    return int(answer)


def gone() -> Never:
    """End this process, because libxl has ended and nothing can be reported to it."""
    sys.exit("xen-postcopy-xl-helper: libxl has ended")


def notice(text: str) -> None:
    send(protocol.log(Level.NOTICE, text))


def fail(reason: str, number: int) -> Never:
    """End as the stock helper ends after an error: report the reason, wait for the answer, and exit
    with status 0.
    """
    send(protocol.log(Level.ERROR, reason, errno=number))
    _complete(-1, number)


def succeed() -> Never:
    _complete(0, 0)


def _complete(result: int, number: int) -> Never:
    """End at once: the guest is suspended and libxl waits for our end, so the interpreter is not
    shut down in order.
    """
    ask(protocol.complete(result, number))
    os._exit(0)


def read_exactly(fd: int, count: int) -> bytes:
    """Raises :class:`EOFError`."""
    data = bytearray()
    while len(data) < count:
        more = os.read(fd, min(count - len(data), READ_BYTES))
        if not more:
            raise EOFError(f"the stream ends after {len(data)} of {count} bytes")
        data += more
    return bytes(data)


def write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
