# SPDX-License-Identifier: GPL-2.0-or-later
"""libxl that starts the helper beside a stock helper which only records its input, and daemons with
scripted answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.xl import image
from tests.support import zygote
from tests.support.libxl import Libxl

STOCK = """#!{python}
import json, os, sys
fd, stream = int(sys.argv[2]), b""
while sys.argv[1] == "--restore-domain" and (more := os.read(fd, 65536)):
    stream += more
json.dump({{"arguments": sys.argv[1:], "stream": stream.hex()}}, open({note!r}, "w"))
status = int(os.environ.get("STOCK_STATUS", 0))
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
HEADERS = image.headers(4, 17)
CPU_POLICY = image.record(image.REC_TYPE_X86_CPUID_POLICY, b"leaves " * 7)
STATIC_END = image.record(image.REC_TYPE_STATIC_DATA_END)
PAGES = image.record(1, os.urandom(300_001))
END = image.record(image.REC_TYPE_END)
RESTORE = (-1, 4, 1, 0, 2, 0, 768, 0)


class Xl:
    """The side of libxl, which starts the helper with its pipes."""

    given: tuple[int, ...]

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.note = directory / "note"
        program = directory / "libxl-save-helper"
        program.write_text(STOCK.format(python=sys.executable, note=str(self.note)))
        program.chmod(0o755)
        monkeypatch.setenv("XEN_POSTCOPY_STOCK_HELPER", str(program))

    def run(
        self, mode: str, *numbers: int, stream: bytes = b"", answers: bytes = b"\0" * 4
    ) -> tuple[int, bytes, bytes]:
        """Run the helper.  Returns the status, its output to libxl, and the rest of the stream."""
        reader, writer = os.pipe()
        if mode == "--restore-domain":
            numbers = (reader, *numbers)
        helper = zygote.Popen[bytes](
            [sys.executable, "-m", "migrate.xl.helper", mode, *map(str, numbers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=[reader, *numbers[:1]],
        )  # fmt: skip
        if not stream:
            os.close(reader)
        sending = threading.Thread(target=send, args=(writer, stream), daemon=True)
        sending.start()
        output, complaints = helper.communicate(answers, timeout=60)
        assert b"Traceback" not in complaints, complaints.decode()
        left = b""
        while stream and (more := os.read(reader, 65536)):
            left += more
        if stream:
            os.close(reader)
        return helper.returncode, output, left

    def save(
        self, *, io_fd: int | None = None, live: bool = True, stream_type: int = 0
    ) -> tuple[int, bytes]:
        """Save a guest, by default into a pipe.  Returns the status and the output to libxl."""
        reader, writer = os.pipe()
        numbers = (writer if io_fd is None else io_fd, 11, 3, int(live), 136, stream_type)
        self.given = numbers
        status, output, _left = self.run("--save-domain", *numbers)
        os.close(reader)
        os.close(writer)
        return status, output

    def stock(self) -> tuple[list[str], bytes]:
        """Return what the stock helper has received: arguments and stream."""
        noted = json.loads(self.note.read_text())
        return noted["arguments"], bytes.fromhex(noted["stream"])

    @property
    def was_asked(self) -> bool:
        return self.note.exists()


def send(writer: int, stream: bytes) -> None:
    with os.fdopen(writer, "wb") as file:
        file.write(stream)


@pytest.fixture
def xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Xl:
    monkeypatch.delenv("XEN_POSTCOPY", raising=False)
    monkeypatch.setenv("XEN_POSTCOPY_SENDER", "/nowhere")
    monkeypatch.setenv("XEN_POSTCOPY_RECEIVER", "/nowhere")
    return Xl(tmp_path, monkeypatch)


@contextlib.contextmanager
def daemon(path: Path, *answers: bytes) -> Iterator[list[bytes]]:
    """A daemon that gives each connection its answer, in turn, and ends.  Yields the requests that
    it has received.
    """
    asked: list[bytes] = []

    def serve() -> None:
        for answer in answers:
            connection, _address = listener.accept()
            with connection:
                asked.append(connection.recv(65536))
                with contextlib.suppress(BrokenPipeError):  # the helper may have given up already
                    connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(60)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        thread.join(60)
        assert not thread.is_alive()


def converse(
    tmp_path: Path,
    mode: str,
    io_fd: int,
    numbers: tuple[int, ...],
    *answers: bytes,
    **environment: str,
) -> Libxl:
    """Return the messages of the helper, and of a libxl that answers it, with such a daemon."""
    sockets = dict.fromkeys(
        ("XEN_POSTCOPY_SENDER", "XEN_POSTCOPY_RECEIVER"), str(tmp_path / "daemon")
    )
    stock = {"XEN_POSTCOPY_STOCK_HELPER": os.environ["XEN_POSTCOPY_STOCK_HELPER"]}
    libxl = Libxl(mode, io_fd, numbers, {}, {**sockets, **stock, **environment})
    with daemon(tmp_path / "daemon", *answers):
        libxl.start()
        assert libxl.wait() == 0
    return libxl
