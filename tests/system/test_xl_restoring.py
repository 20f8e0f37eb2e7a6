# SPDX-License-Identifier: GPL-2.0-or-later
"""The helper under xl restores a guest, with a stock helper that only records its input."""

from __future__ import annotations

import errno
import os
import signal
import struct
from pathlib import Path

import pytest

from migrate.errors import MigrationError
from migrate.xl import image, protocol, stock
from tests.support.xl_helper import (
    CPU_POLICY,
    END,
    HEADERS,
    PAGES,
    RESTORE,
    STATIC_END,
    Xl,
    converse,
    send,
    xl,
)

__all__ = ["xl"]


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
    send(writer, stream)
    libxl = converse(tmp_path, "--restore-domain", reader, RESTORE, b"")
    assert not xl.was_asked and complaint in libxl.log and libxl.result == (-1, number)


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


@pytest.mark.parametrize("kind", [image.REC_TYPE_POSTCOPY_OFFER, image.REC_TYPE_POSTCOPY])
def test_a_record_that_is_too_long_is_the_stock_helper_s_to_refuse(xl: Xl, kind: int) -> None:
    """The stock helper refuses the record at its header."""
    stream = HEADERS + image.RECORD_HEADER.pack(kind, 0xFFFFFFF8) + b"body" * 1000
    assert xl.run("--restore-domain", *RESTORE, stream=stream)[0] == 0
    assert xl.stock()[1] == stream


def test_long_records_are_kept_for_the_stock_helper(xl: Xl) -> None:
    long = image.record(0x80000001, os.urandom(3 << 20))
    stream = HEADERS + long + long + STATIC_END + PAGES + END
    assert xl.run("--restore-domain", *RESTORE, stream=stream)[0] == 0
    assert xl.stock()[1] == stream


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"{", b"{}", b"[]", b'{"session": "s", "address": ["h", "1"], "token": "00"}'],
)
def test_an_offer_of_another_version_is_named(body: bytes) -> None:
    with pytest.raises(MigrationError, match="another version of xen-postcopy"):
        image.parse_offer(body)


def test_an_image_of_another_version_is_no_image_of_ours() -> None:
    other = bytearray(HEADERS)
    struct.pack_into(">I", other, 12, 9)
    with pytest.raises(image.ImageError, match="version 9"):
        image.check_headers(bytes(other))
