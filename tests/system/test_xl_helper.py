# SPDX-License-Identifier: GPL-2.0-or-later
"""The helper under xl, with a stock helper that only records its input.  The lab runs the helper
under the real xl.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import MigrationError
from migrate.xl import image, protocol, stock
from migrate.xl.protocol import Level
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
        sending = threading.Thread(target=_send, args=(writer, stream), daemon=True)
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


def _send(writer: int, stream: bytes) -> None:
    with os.fdopen(writer, "wb") as file:
        file.write(stream)


@pytest.fixture
def xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Xl:
    monkeypatch.delenv("XEN_POSTCOPY", raising=False)
    monkeypatch.setenv("XEN_POSTCOPY_SENDER", "/nowhere")
    monkeypatch.setenv("XEN_POSTCOPY_RECEIVER", "/nowhere")
    return Xl(tmp_path, monkeypatch)


# ----- messages to libxl ----
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (protocol.suspend(), "0200 0300"),
        (protocol.switch_qemu_logdirty(5, True), "0a00 0700 05000000 01000000"),
        (protocol.static_data_done(3), "0600 0800 03000000"),
        (protocol.restore_results(0xFEFFC, 1), "1200 0900 fcef0f0000000000 0100000000000000"),
        (protocol.complete(-1, 5), "0a00 0a00 ffffffff 05000000"),
        (
            protocol.log(Level.ERROR, "no", context="c"),
            "1700 0100 08000000 ffffffff 02000000 6300 03000000 6e6f00",
        ),
        (
            protocol.progress("p", 1, 2, context="c"),
            "1e00 0200 02000000 6300 02000000 7000 0100000000000000 0200000000000000",
        ),
    ],
)
def test_messages_are_packed_as_libxl_reads_them(message: bytes, expected: str) -> None:
    assert message.hex() == expected.replace(" ", "")


def test_a_long_text_fits_a_message() -> None:
    message = protocol.log(Level.INFO, "x" * 100_000 + "\0")
    assert struct.unpack_from("=H", message)[0] == len(message) - 2


# ---- saving ----
def test_without_a_daemon_a_live_migration_is_left_to_the_stock_helper_with_a_line(xl: Xl) -> None:
    status, output = xl.save()
    assert status == 0
    assert xl.stock()[0] == ["--save-domain", *map(str, xl.given)]
    assert b"no daemon at /nowhere" in output and b"using Xen's own live migration" in output
    assert struct.unpack_from("=HHI", output)[1:] == (protocol.Message.LOG, Level.NOTICE)


def test_require_fails_instead(xl: Xl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEN_POSTCOPY", "require")
    status, output = xl.save()
    assert status == 0 and not xl.was_asked
    assert (
        output.endswith(protocol.complete(-1, errno.EOPNOTSUPP))
        and b"XEN_POSTCOPY=require" in output
    )


@pytest.mark.parametrize("why", ["off", "a file", "not live", "Remus"])
def test_what_is_no_live_migration_is_left_to_the_stock_helper_silently(
    xl: Xl, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XEN_POSTCOPY", "off" if why == "off" else "require")
    with (tmp_path / "saved").open("wb") as file:
        io_fd = file.fileno() if why == "a file" else None
        status, output = xl.save(
            io_fd=io_fd, live=why != "not live", stream_type=int(why == "Remus")
        )
    assert (status, output, xl.was_asked) == (0, b"", True)


@pytest.mark.parametrize("live", [True, False])
def test_no_guest_is_saved_while_a_killed_receiver_has_no_successor(
    xl: Xl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    """The guest may lack pages, and an image would have holes instead.  Only the receiver's socket
    is left.
    """
    path = tmp_path / "receiver.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
    monkeypatch.setenv("XEN_POSTCOPY_RECEIVER", str(path))
    status, output = xl.save(live=live)
    assert status == 0 and not xl.was_asked
    assert b"the receiver daemon of this host was killed" in output and output.endswith(
        protocol.complete(-1, errno.EBUSY)
    )
    path.unlink()
    status, _said = xl.save(live=live)
    assert status == 0 and xl.was_asked


def test_a_stock_helper_that_is_missing_is_reported(
    xl: Xl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XEN_POSTCOPY_STOCK_HELPER", "/nowhere/libxl-save-helper")
    _status, output = xl.save()
    assert b"cannot start /nowhere/libxl-save-helper" in output and output.endswith(
        protocol.complete(-1, errno.ENOENT)
    )


@pytest.mark.parametrize("mode", ["--save-domain", "--restore-domain"])
def test_a_libxl_that_was_killed_ends_the_helper_with_one_line(xl: Xl, mode: str) -> None:
    """No process receives the messages any more."""
    for_libxl, output = os.pipe()
    os.close(for_libxl)
    reader, writer = os.pipe()
    os.close(writer)
    numbers = (reader, 11, 3, 1, 136, 0) if mode == "--save-domain" else (reader, *RESTORE)
    helper = zygote.Popen[bytes](
        [sys.executable, "-m", "migrate.xl.helper", mode, *map(str, numbers)],
        stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, pass_fds=[reader],
    )  # fmt: skip
    os.close(output)
    os.close(reader)
    _said, complaints = helper.communicate(timeout=60)
    assert helper.returncode == 1
    assert complaints.decode().splitlines() == ["xen-postcopy-xl-helper: libxl has ended"]


def test_an_error_of_the_helper_itself_is_reported_to_libxl(xl: Xl) -> None:
    command = [
        sys.executable,
        "-m",
        "migrate.xl.helper",
        "--save-domain",
        "99",
        "11",
        "3",
        "1",
        "136",
        "0",
    ]
    done = subprocess.run(command, input=b"\0" * 4, capture_output=True, timeout=60, check=False)
    output = done.stdout
    assert (done.returncode, done.stderr) == (0, b"") and not xl.was_asked
    assert b"an error of xen-postcopy-xl-helper itself" in output and output.endswith(
        protocol.complete(-1, errno.EIO)
    )


# ---- a daemon that does not do what it should ----
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


UNKNOWN = b'{"event": "error", "message": "unknown command \'await-memory\'"}\n'
COMING = b'{"event": "result", "migrations": [{"domain": "web", "phase": "postcopy"}]}\n'
ARRIVED = b'{"event": "result", "migrations": [{"domain": "web", "phase": "completed"}]}\n'


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


def save(tmp_path: Path, *answers: bytes, io_fd: int = -1, **environment: str) -> Libxl:
    reader, writer = os.pipe()
    libxl = converse(
        tmp_path,
        "--save-domain",
        io_fd if io_fd >= 0 else os.dup(writer),
        (-1, 3, 1, 136, 0),
        *answers,
        **environment,
    )
    os.close(reader)
    os.close(writer)
    return libxl


@pytest.mark.parametrize(
    ("answers", "refusal"),
    [
        (
            [b'{"event": "progress", "arrived": 1, "missing": 2}\n'],
            "the receiver daemon has ended, and memory of the",
        ),
        (
            [UNKNOWN, COMING],
            "memory of a guest may have still to come (web): try again when it has",
        ),
        ([UNKNOWN, UNKNOWN], "unknown command"),
        ([UNKNOWN, ARRIVED], ""),
    ],
    ids=["gone", "older, coming", "older, refuses", "older, arrived"],
)
def test_a_guest_is_saved_only_where_its_memory_has_come(
    xl: Xl, tmp_path: Path, answers: list[bytes], refusal: str
) -> None:
    """A receiver of an earlier release answers only which migrations are in progress."""
    libxl = save(tmp_path, *answers, XEN_POSTCOPY="off")
    assert refusal in libxl.log and xl.was_asked == (not refusal)
    assert [message.numbers for message in libxl.of(protocol.Message.COMPLETE)] == (
        [(-1, errno.EBUSY)] if refusal else []
    )


OFFER = (
    b'{"event": "offer", "session": "s", "address": ["h", 1], "token": "00", '
    b'"cpu_policy": ["", ""]}\n'
)
DECLINED = b'{"event": "declined", "message": "no"}\n'
NOTHING_MISSING = b'{"event": "result"}\n'


def test_a_sender_that_goes_before_its_offer_leaves_it_to_the_stock_helper(
    xl: Xl, tmp_path: Path
) -> None:
    libxl = save(tmp_path, NOTHING_MISSING, b"")
    assert xl.was_asked and "the daemon has ended: using Xen's own live migration" in libxl.log


def test_a_sender_that_goes_after_its_offer_fails_the_migration(xl: Xl, tmp_path: Path) -> None:
    libxl = save(tmp_path, NOTHING_MISSING, OFFER)
    assert (
        not xl.was_asked
        and "the sender daemon has ended" in libxl.log
        and libxl.result == (-1, errno.EIO)
    )


LOG_DIRTY = b'{"event": "log_dirty", "enable": true}\n'


def test_the_device_model_s_log_ends_also_with_a_migration_that_fails(
    xl: Xl, tmp_path: Path
) -> None:
    libxl = save(tmp_path, NOTHING_MISSING, OFFER + LOG_DIRTY)
    switched = libxl.of(protocol.Message.SWITCH_QEMU_LOGDIRTY)
    assert [message.numbers for message in switched] == [(3, 1), (3, 0)]
    assert libxl.messages[-1].numbers == (-1, errno.EIO)


def test_a_stream_that_nobody_reads_fails_the_migration(xl: Xl, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    libxl = save(tmp_path, NOTHING_MISSING, OFFER, io_fd=writer)
    assert "the migration's stream: Broken pipe" in libxl.log and libxl.result == (-1, errno.EPIPE)


def test_a_stock_helper_that_is_missing_after_the_headers_is_reported(
    xl: Xl, tmp_path: Path
) -> None:
    libxl = save(
        tmp_path,
        NOTHING_MISSING,
        OFFER + DECLINED,
        XEN_POSTCOPY_STOCK_HELPER="/nowhere/libxl-save-helper",
    )
    assert "cannot start /nowhere/libxl-save-helper" in libxl.log and libxl.result == (
        -1,
        errno.ENOENT,
    )


def offered(session: bytes, behind: bytes) -> bytes:
    """Return the stream of a sender that has agreed on this session."""
    offer = b'{"session": "s", "address": ["h", 1], "token": "00"}'
    beginning = HEADERS + image.record(image.REC_TYPE_POSTCOPY_OFFER, offer) + STATIC_END
    return beginning + image.record(image.REC_TYPE_POSTCOPY, session) + behind


@pytest.mark.parametrize(
    ("stream", "complaint", "number"),
    [
        (offered(b"s", END), "the receiver daemon has ended", errno.EIO),
        (offered(b"s", image.record(1, b"page")), "records after the session's", errno.EINVAL),
        (offered(b"t", END), "the sender wants postcopy", errno.EOPNOTSUPP),
    ],
    ids=["gone", "more records", "another session"],
)
def test_a_postcopy_stream_that_cannot_be_taken_in_fails(
    xl: Xl, tmp_path: Path, stream: bytes, complaint: str, number: int
) -> None:
    reader, writer = os.pipe()
    _send(writer, stream)
    libxl = converse(tmp_path, "--restore-domain", reader, RESTORE, b"")
    assert not xl.was_asked and complaint in libxl.log and libxl.result == (-1, number)


# ---- restoring ----
@pytest.mark.parametrize(
    "static", [b"", STATIC_END, CPU_POLICY + image.record(0x80000001, b"optional") + STATIC_END]
)
def test_an_ordinary_stream_reaches_the_stock_helper_whole_and_no_further(
    xl: Xl, static: bytes
) -> None:
    stream = HEADERS + static + PAGES + image.record(9, b"context") + END
    status, output, left = xl.run(
        "--restore-domain", *RESTORE, stream=stream + b"libxl's own records"
    )
    assert (status, output) == (0, b"")
    arguments, got = xl.stock()
    assert got == stream
    assert left == b"libxl's own records"
    assert arguments[0] == "--restore-domain" and arguments[2:] == [
        str(number) for number in RESTORE
    ]


def test_the_stock_helper_s_status_is_ours(xl: Xl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCK_STATUS", "3")
    assert xl.run("--restore-domain", *RESTORE, stream=HEADERS + PAGES + END)[0] == 3


def test_the_stock_helper_s_death_is_ours(xl: Xl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCK_STATUS", str(-signal.SIGTERM))
    assert xl.run("--restore-domain", *RESTORE, stream=HEADERS + PAGES + END)[0] == -signal.SIGTERM


def test_the_stock_helper_of_the_xen_that_runs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XEN_POSTCOPY_STOCK_HELPER", raising=False)
    monkeypatch.setattr(stock, "VERSION", str(tmp_path))
    monkeypatch.setattr(stock, "PLACES", (f"{tmp_path}/none", f"{tmp_path}/xen-{{version}}/bin"))
    assert stock.xen_version() == (0, 0) and stock.program() == "libxl-save-helper"
    (tmp_path / "major").write_text("4\n")
    (tmp_path / "minor").write_text("17\n")
    helper = tmp_path / "xen-4.17/bin/libxl-save-helper"
    helper.parent.mkdir(parents=True)
    helper.touch()
    assert stock.program() == str(helper)


def test_a_stream_that_breaks_off_reaches_it_as_far_as_it_came(xl: Xl) -> None:
    stream = HEADERS + STATIC_END + PAGES[:1000]
    assert xl.run("--restore-domain", *RESTORE, stream=stream)[0] == 0
    assert xl.stock()[1] == stream


def test_a_stream_that_ends_before_it_is_anyone_s_is_an_error(xl: Xl) -> None:
    status, output, _left = xl.run("--restore-domain", *RESTORE, stream=HEADERS[:30])
    assert status == 0 and not xl.was_asked
    assert b"the stream ends after 30 of 40 bytes" in output and output.endswith(
        protocol.complete(-1, errno.EPIPE)
    )


def test_what_is_no_image_is_the_stock_helper_s_to_refuse(xl: Xl) -> None:
    xl.run("--restore-domain", *RESTORE, stream=b"x" * 100)
    assert xl.stock()[1] == b"x" * image.HEADER_BYTES


def test_a_postcopy_stream_is_never_restored_as_an_ordinary_one(xl: Xl) -> None:
    stream = HEADERS + STATIC_END + image.record(image.REC_TYPE_POSTCOPY, b"session") + END
    status, output, _left = xl.run("--restore-domain", *RESTORE, stream=stream)
    assert status == 0 and not xl.was_asked
    assert b"the sender wants postcopy, but it made no offer" in output and output.endswith(
        protocol.complete(-1, errno.EOPNOTSUPP)
    )


def test_require_refuses_an_ordinary_stream(xl: Xl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEN_POSTCOPY", "require")
    _status, output, _left = xl.run("--restore-domain", *RESTORE, stream=HEADERS + PAGES + END)
    assert not xl.was_asked and output.endswith(protocol.complete(-1, errno.EOPNOTSUPP))


def test_a_libxl_that_goes_instead_of_answering_ends_the_helper(xl: Xl) -> None:
    assert xl.run("--restore-domain", *RESTORE, stream=HEADERS[:30], answers=b"")[0] == 1


@pytest.mark.parametrize(
    "body", [b"{", b"{}", b"[]", b'{"session": "s", "address": ["h", "1"], "token": "00"}']
)
def test_an_offer_of_another_version_is_named(body: bytes) -> None:
    with pytest.raises(MigrationError, match="another version of xen-postcopy"):
        image.parse_offer(body)


def test_an_image_of_another_version_is_no_image_of_ours() -> None:
    other = bytearray(HEADERS)
    struct.pack_into(">I", other, 12, 9)
    with pytest.raises(image.ImageError, match="version 9"):
        image.check_headers(bytes(other))


# ---- by hand ----
def test_a_stream_does_not_go_to_a_terminal(xl: Xl) -> None:
    ours, terminal = pty.openpty()
    assert xl.save(io_fd=terminal) == (1, b"")
    os.close(ours)
    os.close(terminal)


def test_it_explains_itself() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "migrate.xl.helper", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert "LIBXL_SAVE_HELPER" in run("--help").stdout
    wrong = run("--save-domain", "3")
    assert wrong.returncode == 1 and "not the arguments that libxl gives" in wrong.stderr
