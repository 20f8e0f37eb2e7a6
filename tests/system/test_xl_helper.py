# SPDX-License-Identifier: GPL-2.0-or-later
"""The helper under xl, with a stock helper that only records its input.  The lab runs the helper
under the real xl.
"""

from __future__ import annotations

import errno
import os
import pty
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.xl import protocol
from migrate.xl.protocol import Level
from tests.support import zygote
from tests.support.commands import COMMAND_S
from tests.support.libxl import Libxl
from tests.support.xl_helper import RESTORE, Xl, converse, xl

__all__ = ["xl"]


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


@pytest.mark.parametrize("variable", ["XEN_POSTCOPY_SENDER", "XEN_POSTCOPY_SOCKETS"])
def test_a_path_that_is_not_utf_8_is_named_like_any_other(
    xl: Xl, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("XEN_POSTCOPY_SENDER")
    monkeypatch.setenv(variable, os.fsdecode(b"/nowhere/\xff"))
    status, output = xl.save()
    assert status == 0 and xl.was_asked
    assert b"no daemon at /nowhere/\\udcff" in output
    assert b"using Xen's own live migration" in output


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
    _said, complaints = helper.communicate(timeout=COMMAND_S)
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
    done = subprocess.run(
        command, input=b"\0" * 4, capture_output=True, timeout=COMMAND_S, check=False
    )
    output = done.stdout
    assert (done.returncode, done.stderr) == (0, b"") and not xl.was_asked
    assert b"an error of xen-postcopy-xl-helper itself" in output and output.endswith(
        protocol.complete(-1, errno.EIO)
    )


# ---- a daemon that does not do what it should ----
UNKNOWN = b'{"event": "error", "message": "unknown command \'await-memory\'"}\n'
COMING = b'{"event": "result", "migrations": [{"domain": "web", "phase": "postcopy"}]}\n'
ARRIVED = b'{"event": "result", "migrations": [{"domain": "web", "phase": "completed"}]}\n'


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


# ---- by hand ----
def test_a_stream_does_not_go_to_a_terminal(xl: Xl) -> None:
    ours, terminal = pty.openpty()
    assert xl.save(io_fd=terminal) == (1, b"")
    os.close(ours)
    os.close(terminal)


def test_it_explains_itself() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "migrate.xl.helper", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )

    assert "LIBXL_SAVE_HELPER" in run("--help").stdout
    wrong = run("--save-domain", "3")
    assert wrong.returncode == 1 and "not the arguments that libxl gives" in wrong.stderr
