# SPDX-License-Identifier: GPL-2.0-or-later
"""libxl as a helper sees it, and the part of xl that follows.  The script behaves as the real
programs do.

:class:`Libxl` is one side: it starts the helper, answers it, and records its messages.  In the lab
the real programs are used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from migrate.xl.protocol import ANSWER, Message
from tests.support import zygote

HELPER = [sys.executable, "-m", "migrate.xl.helper"]
TIMEOUT_S = 60.0
FIELDS = {
    Message.LOG: "=II", Message.PROGRESS: "", Message.SUSPEND: "=",
    Message.SWITCH_QEMU_LOGDIRTY: "=II", Message.STATIC_DATA_DONE: "=I",
    Message.RESTORE_RESULTS: "=QQ", Message.COMPLETE: "=ii",
}  # fmt: skip
"""The numbers at the beginning of each message."""
OUTLIVES_HELPER = '"$@"; echo $? >"$0"; exec cat >/dev/null 2>&1'
"""A script in the place of xl, which ends with its standard input."""
NOT_ANSWERED = (Message.LOG, Message.PROGRESS, Message.RESTORE_RESULTS)


@dataclass
class HelperMessage:
    kind: Message
    numbers: tuple[int, ...]
    texts: list[str]


def parse(body: bytes) -> HelperMessage:
    kind = Message(struct.unpack_from("=H", body)[0])
    form = FIELDS[kind]
    at = 2 + struct.calcsize(form)
    numbers, texts = struct.unpack_from(form, body, 2), []
    if kind in (Message.LOG, Message.PROGRESS):
        for _ in range(2):
            (length,) = struct.unpack_from("=I", body, at)
            texts.append(body[at + 4 : at + 4 + length - 1].decode())
            at += 4 + length
    return HelperMessage(kind, numbers, texts)


@dataclass
class Libxl:
    """One side of libxl.  ``answers``: for a message, the function that acts and returns the
    answer; other messages are answered with 0.
    """

    mode: str
    io_fd: int
    numbers: tuple[int, ...]
    """The helper's arguments after ``io_fd``."""
    answers: dict[Message, Callable[[], int]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    messages: list[HelperMessage] = field(default_factory=list)
    status: int | None = None
    ends_with_helper: bool = False
    """If true, the process in the place of xl ends when the helper has ended.  If false, that
    process is the test's, which continues.
    """
    silent_at: Message | None = None
    """The message that is not answered, as if libxl hung there, until :meth:`kill`."""
    status_file: Path | None = None
    """If given, the process in the place of xl is one that lives until :meth:`kill`, and writes the
    helper's status into this file.
    """

    def start(self) -> None:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("XEN_POSTCOPY")
        }
        xl = []
        if self.status_file is not None:
            xl = ["sh", "-c", OUTLIVES_HELPER, str(self.status_file)]
        elif self.ends_with_helper:
            xl = ["sh", "-c", '"$@"; exit $?', "xl"]
        self.process = zygote.Popen[bytes](
            [*xl, *HELPER, self.mode, str(self.io_fd), *map(str, self.numbers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=[self.io_fd], env={**environment, **self.environment},
            start_new_session=self.status_file is not None,
        )  # fmt: skip
        os.close(self.io_fd)
        self._thread = threading.Thread(target=self._converse, daemon=True)
        self._thread.start()

    def _converse(self) -> None:
        assert self.process.stdout is not None and self.process.stdin is not None
        while head := self.process.stdout.read(2):
            message = parse(self.process.stdout.read(struct.unpack("=H", head)[0]))
            self.messages.append(message)
            if message.kind in NOT_ANSWERED:
                continue
            if message.kind is self.silent_at:
                return
            answer = self.answers.get(message.kind, lambda: 0)()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(ANSWER.pack(answer))
                self.process.stdin.flush()

    def wait(self) -> int:
        """Wait for the helper's end and return its status.  Errors in the helper itself are
        raised.
        """
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the helper does not end"
        if self.status_file is None:
            self.status = self.process.wait(TIMEOUT_S)
        else:
            text = self.status_file.read_text() if self.status_file.exists() else ""
            self.status = int(text or -signal.SIGKILL)
        assert self.process.stderr is not None
        complaints = self.process.stderr.read().decode()
        assert "Traceback" not in complaints, complaints
        if self.status_file is None:
            self.close()
        return self.status

    def kill(self) -> None:
        """End the helper as after the death of xl, whatever state the helper is in."""
        if not hasattr(self, "process"):
            os.close(self.io_fd)
            return
        self.kill_xl()
        self.process.wait(TIMEOUT_S)
        self.close()

    def kill_xl(self) -> None:
        """Kill the helper, and the process in the place of xl if there is one."""
        if self.status_file is None:
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill_helper(self) -> None:
        """Kill the helper, if the helper runs, and leave xl alone."""
        pid = self.process.pid
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)

    def close(self) -> None:
        self._thread.join(TIMEOUT_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    # ---- the recorded messages ----
    def of(self, kind: Message) -> list[HelperMessage]:
        return [message for message in self.messages if message.kind is kind]

    @property
    def result(self) -> tuple[int, ...]:
        """Return the numbers of ``complete``: 0 or -1, and errno."""
        (complete,) = self.of(Message.COMPLETE)
        return complete.numbers

    @property
    def log(self) -> str:
        return "\n".join(message.texts[1] for message in self.of(Message.LOG))


STOCK = """#!{python}
import os, sys
sys.path.insert(0, {tree!r})
from migrate.xl import image, libxl, protocol, stock
mode, io_fd = sys.argv[1], int(sys.argv[2])
pages = image.record(1, bytes(range(256)) * 2000)
stream = image.headers(*stock.xen_version()) + image.record(image.REC_TYPE_STATIC_DATA_END)
stream += pages + image.record(image.REC_TYPE_END)
if mode == "--save-domain":
    libxl.write_all(io_fd, stream)
else:
    got, record = os.read(io_fd, image.HEADER_BYTES), None
    while record is None or record.type != image.REC_TYPE_END:
        head = libxl.read_exactly(io_fd, 8)
        record = image.read_record_header(head)
        body = libxl.read_exactly(io_fd, record.padded)
        if not record.type & image.REC_TYPE_OPTIONAL:
            got += head + body
    libxl.send(protocol.restore_results(1, 2))
    if got != stream:
        libxl.fail("another stream", 5)
libxl.ask(protocol.complete(0, 0))
"""


def write_stock_helper(path: Path) -> Path:
    """Write a stock helper whose stream has contents of its own, which it checks in a restore."""
    path.write_text(STOCK.format(python=sys.executable, tree=str(Path(__file__).parents[2])))
    path.chmod(0o755)
    return path
