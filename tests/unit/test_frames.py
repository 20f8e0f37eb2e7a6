# SPDX-License-Identifier: GPL-2.0-or-later
"""The codec: what is encoded is decoded unchanged, and what is not a frame is refused before memory
is allocated.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import LocalProtocolError, RemoteProtocolError
from migrate.protocol import frames
from migrate.protocol.frames import FrameDecoder


def feed(
    decoder: FrameDecoder, data: bytes, piece: int = 2**30
) -> list[tuple[dict[str, Any], bytes]]:
    """Give bytes to a decoder, at most ``piece`` at a time."""
    out = []
    view = memoryview(data)
    while view:
        wanted = decoder.wanted()
        assert len(wanted) > 0
        n = min(len(wanted), len(view), piece)
        wanted[:n] = view[:n]
        decoder.filled(n)
        view = view[n:]
        while (frame := decoder.next_frame()) is not None:
            out.append((frame.header, bytes(frame.payload)))
    return out


def frame(header: bytes, payload_bytes: int = 0, header_bytes: int | None = None) -> bytes:
    """Return a frame with correct checksums, whatever else is wrong with it."""
    prefix = frames.PREFIX.pack(
        frames.MAGIC,
        len(header) if header_bytes is None else header_bytes,
        payload_bytes,
        zlib.crc32(header),
    )
    return prefix + struct.pack("!I", zlib.crc32(prefix)) + header


headers = st.dictionaries(
    st.text(max_size=10),
    st.one_of(st.integers(0, 2**63), st.text(max_size=20), st.binary(max_size=99)),
    max_size=9,
)
pages = st.integers(0, 3).map(lambda n: bytes(range(1, n + 1)) * 4096)


def encoded(sent: list[tuple[dict[str, Any], bytes]], *, checked: bool) -> bytes:
    return b"".join(
        frames.encode(header, [memoryview(payload)], checked=checked) + payload
        for header, payload in sent
    )


@given(
    st.lists(st.tuples(headers, pages), min_size=1, max_size=5), st.integers(1, 9000), st.booleans()
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    sent: list[tuple[dict[str, Any], bytes]], piece: int, checked: bool
) -> None:
    data = encoded(sent, checked=checked)
    decoder = FrameDecoder()
    decoder.checked = checked
    assert feed(decoder, data, piece) == sent
    assert decoder.at_boundary()


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("piece", [7, 5000, 2**30])
def test_payloads_and_large_headers_follow_each_other_in_any_pieces(
    piece: int, checked: bool
) -> None:
    sent: list[tuple[dict[str, Any], bytes]] = [
        ({"type": "pages"}, b"\x01" * 4096),
        ({"type": "alive"}, b""),
        ({"type": "context", "data": bytes(frames.MAX_HEADER_BYTES - 100)}, b""),
        ({"type": "pages"}, b"\x02" * 8192),
        *(({"type": "context", "data": bytes(50_000 + n)}, b"") for n in range(9)),
        ({"type": "pages"}, b"\x03" * 4096),
    ]
    decoder = FrameDecoder()
    decoder.checked = checked
    assert feed(decoder, encoded(sent, checked=checked), piece) == sent
    assert decoder.at_boundary()


def test_the_decoder_reports_that_it_is_within_a_frame() -> None:
    data = frames.encode({}, [memoryview(bytes(4096))]) + bytes(4096)
    header_bytes = len(data) - 4096
    decoder = FrameDecoder()
    assert decoder.at_boundary() and not decoder.in_payload()
    feed(decoder, data[:5])
    assert not decoder.at_boundary() and not decoder.in_payload()
    feed(decoder, data[5:header_bytes])
    assert not decoder.at_boundary() and decoder.in_payload()
    assert len(feed(decoder, data[header_bytes:])) == 1
    assert decoder.at_boundary() and not decoder.in_payload()


@pytest.mark.parametrize(
    ("at", "checked"), [(5, True), (19, True), (25, True), (-1, True), (25, False)]
)
def test_a_damaged_byte_is_named_as_damage(at: int, checked: bool) -> None:
    """The byte is in a length, in a checksum, in the header, or in the payload if its checksum is
    agreed on.
    """
    data = bytearray(encoded([({"type": "pages"}, bytes(4096))], checked=checked))
    data[at] ^= 0x40
    decoder = FrameDecoder()
    decoder.checked = checked
    with pytest.raises(RemoteProtocolError, match="damaged"):
        feed(decoder, bytes(data))


@given(st.lists(st.tuples(headers, pages), min_size=1, max_size=3), st.data())
def test_no_frame_comes_out_of_a_damaged_one(
    sent: list[tuple[dict[str, Any], bytes]], data: st.DataObject
) -> None:
    """Any bit of it is flipped; the frames before it are whole."""
    stream = bytearray(encoded(sent, checked=True))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[bit // 8] ^= 1 << bit % 8
    decoder = FrameDecoder()
    decoder.checked = True
    came: list[tuple[dict[str, Any], bytes]] = []

    def feed_bytes() -> None:
        for at in range(len(stream)):
            came.extend(feed(decoder, bytes(stream[at : at + 1])))

    with pytest.raises(RemoteProtocolError):  # the decoder does not wait for it
        feed_bytes()
    assert came == sent[: len(came)] and len(came) < len(sent)


@given(st.binary(min_size=1, max_size=500))
def test_any_bytes_give_frames_or_a_protocol_error(data: bytes) -> None:
    decoder = FrameDecoder()
    try:
        for header, _payload in feed(decoder, data):
            assert isinstance(header, dict)
    except RemoteProtocolError as error:
        assert str(error)


@given(st.binary(min_size=1, max_size=200))
def test_any_header_bytes_give_a_map_or_a_protocol_error(header: bytes) -> None:
    try:
        feed(FrameDecoder(), frame(header))
    except RemoteProtocolError as error:
        assert "header" in str(error)


def test_garbage_is_refused_at_its_first_bytes() -> None:
    with pytest.raises(RemoteProtocolError, match="right port"):
        feed(FrameDecoder(), b"HT")
    with pytest.raises(RemoteProtocolError, match="right port"):
        feed(FrameDecoder(), b"XPC2" + bytes(100))


@pytest.mark.parametrize("first", [b"\x15", b"\x16\x03\x01"])
def test_a_peer_that_begins_with_tls_is_recognised(first: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"\[tls\] section"):
        feed(FrameDecoder(), first)


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes", "what"),
    [
        (0, 0, "header of 0"),
        (frames.MAX_HEADER_BYTES + 1, 0, "header of"),
        (2**32 - 1, 0, "header of"),
        (5, frames.MAX_PAYLOAD_BYTES + 4096, "payload of"),
        (5, 2**32 - 4096, "payload of"),
        (5, 100, "payload of 100"),
    ],
)
def test_lengths_are_checked_before_memory_is_taken(
    header_bytes: int, payload_bytes: int, what: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=what):
        feed(FrameDecoder(), frame(b"", payload_bytes, header_bytes))


def test_deep_nesting_is_refused() -> None:
    header = b"\x91" * 60_000
    with pytest.raises(RemoteProtocolError, match="not msgpack"):
        feed(FrameDecoder(), frame(header))


def test_what_the_decoder_would_refuse_is_not_encoded() -> None:
    with pytest.raises(LocalProtocolError):
        frames.encode({"x": bytes(frames.MAX_HEADER_BYTES)})
    with pytest.raises(LocalProtocolError):
        frames.encode({}, [memoryview(bytes(100))])


def test_a_payload_stays_while_the_next_frame_is_read() -> None:
    """The receiver loads one batch while the next arrives."""
    decoder = FrameDecoder()
    first, second = b"a" * 4096, b"b" * 4096
    for payload in (first, second):
        data = frames.encode({}, [memoryview(payload)]) + payload
        while data:
            wanted = decoder.wanted()
            n = min(len(wanted), len(data))
            wanted[:n] = data[:n]
            decoder.filled(n)
            data = data[n:]
        frame = decoder.next_frame()
        assert frame is not None
        if payload is first:
            kept = frame.payload
    assert bytes(kept) == first


def test_a_header_must_be_a_map() -> None:
    header = msgpack.packb([1, 2])
    with pytest.raises(RemoteProtocolError, match="not a map"):
        feed(FrameDecoder(), frame(header))
