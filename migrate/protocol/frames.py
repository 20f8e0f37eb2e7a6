# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames: the codec of a lane.  Bytes in, frames out; no sockets, no clock.

A frame is a prefix of 20 bytes, a msgpack map, and an optional payload of whole pages.  The prefix
has ``XPC1``, the length of the header, the length of the payload, a checksum of what follows the
prefix, and a checksum of the prefix so far; all are big-endian.

The checksums are CRC-32, because TCP's own checksum lets one damaged segment in 65,536 pass.  The
checksum of the prefix prevents a wait for a damaged length.  The other checksum covers the payload
only if both ends have agreed on it (:attr:`FrameDecoder.checked`), because it costs a microsecond a
page.

Page bytes are never inside msgpack.  They go from the socket to the buffer from which they are
loaded, without another copy.  The decoder therefore provides the buffer: the caller fills
:meth:`FrameDecoder.wanted` and reports the bytes by :meth:`FrameDecoder.filled`.

Every length is checked before memory is allocated for it (invariant 7).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from migrate.errors import LocalProtocolError, RemoteProtocolError
from xenbackend.pages import PAGE_SIZE, Buffer

MAGIC = b"XPC1"
PREFIX = struct.Struct("!4sIII")
PREFIX_CHECKSUM = struct.Struct("!I")
PREFIX_BYTES = PREFIX.size + PREFIX_CHECKSUM.size
TLS_BEGINNINGS = (b"\x15", b"\x16")
"""The first bytes of a TLS alert and of a TLS handshake (RFC 8446, 5.1)."""
MAX_HEADER_BYTES = 256 * 1024
MAX_PAYLOAD_PAGES = 1024
MAX_PAYLOAD_BYTES = MAX_PAYLOAD_PAGES * PAGE_SIZE
READ_AHEAD_BYTES = 16 * 1024
"""Prefix and header are read together with up to so many of the bytes that follow."""

EMPTY = memoryview(b"")


class Frame(NamedTuple):
    header: dict[str, Any]
    payload: memoryview
    """Whole pages.  They stay valid while the next frame is received, until the frame after that
    one begins.
    """


def encode(
    header: dict[str, Any], payload: Sequence[memoryview] = (), *, checked: bool = False
) -> bytes:
    """Return the bytes that go before the payload; the payload itself is sent unchanged.

    If the payload is ``checked``, it must not change before it has been sent.
    """
    packed: bytes = msgpack.packb(header)
    payload_bytes = sum(map(len, payload))
    if len(packed) > MAX_HEADER_BYTES:
        raise LocalProtocolError(f"header of {len(packed)} bytes, more than {MAX_HEADER_BYTES}")
    if payload_bytes > MAX_PAYLOAD_BYTES or payload_bytes % PAGE_SIZE:
        raise LocalProtocolError(
            f"payload of {payload_bytes} bytes: whole pages, at most {MAX_PAYLOAD_PAGES}"
        )
    checksum = zlib.crc32(packed)
    if checked:
        for piece in payload:
            checksum = zlib.crc32(piece, checksum)
    prefix = PREFIX.pack(MAGIC, len(packed), payload_bytes, checksum)
    return prefix + PREFIX_CHECKSUM.pack(zlib.crc32(prefix)) + packed


def _parse_header(data: Buffer) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(
            data,
            strict_map_key=True,
            max_str_len=4096,
            max_bin_len=MAX_HEADER_BYTES,
            max_array_len=64,
            max_map_len=64,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise RemoteProtocolError(
            f"a frame's header is not msgpack: {error or type(error).__name__}"
        ) from error
    if not isinstance(header, dict):
        raise RemoteProtocolError("a frame's header is not a map")
    return header


class FrameDecoder:
    """Decodes one direction of a lane.  Raises :class:`RemoteProtocolError` for bytes that are no
    frame; the decoder cannot be used afterwards.
    """

    def __init__(self) -> None:
        self.checked = False
        """The payload is in the checksum."""
        # The checksum in the prefix of the current frame, and the checksum of what has arrived.
        self._checksums = (0, 0)
        # Prefixes, headers, and what was read with them.  The buffer grows for a larger header.
        self._small = bytearray(PREFIX_BYTES + 2 * READ_AHEAD_BYTES)
        # The unread part of _small.
        self._start = 0
        self._end = 0
        # The sizes of header and payload of the frame being read.
        self._sizes: tuple[int, int] | None = None
        self._header: dict[str, Any] | None = None
        # Two buffers take turns: a payload can be loaded while the next one is received.
        self._pages, self._other_pages = bytearray(), bytearray()
        self._pages_filled = 0

    def wanted(self) -> memoryview:
        """Return the memory for the next bytes; it is never empty."""
        if self._header is not None:
            assert self._sizes is not None
            return memoryview(self._pages)[self._pages_filled : self._sizes[1]]
        need = PREFIX_BYTES if self._sizes is None else self._sizes[0]
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + need + READ_AHEAD_BYTES > len(self._small):
            unread = self._small[self._start : self._end]
            if need + READ_AHEAD_BYTES > len(self._small):
                self._small = bytearray(need + READ_AHEAD_BYTES)
            self._small[: len(unread)] = unread
            self._start, self._end = 0, len(unread)
        missing = max(need - (self._end - self._start), 1)
        return memoryview(self._small)[self._end : self._end + max(missing, READ_AHEAD_BYTES)]

    def in_payload(self) -> bool:
        """Whether a payload is being received: the peer sends at least :meth:`wanted` bytes."""
        return self._header is not None

    def filled(self, count: int) -> None:
        """The caller has put ``count`` bytes into the memory that :meth:`wanted` returned last."""
        if self._header is not None:
            self._pages_filled += count
        else:
            self._end += count

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or ``None`` if more bytes are needed."""
        if self._sizes is None:
            if self._end - self._start < PREFIX_BYTES:
                self._check_magic()
                return None
            self._sizes = self._parse_prefix()
            self._start += PREFIX_BYTES
        header_bytes, payload_bytes = self._sizes
        if self._header is None:
            if self._end - self._start < header_bytes:
                return None
            packed = memoryview(self._small)[self._start : self._start + header_bytes]
            self._checksums = (self._checksums[0], zlib.crc32(packed))
            if not (payload_bytes and self.checked):
                self._check()
            self._header = _parse_header(packed)
            self._start += header_bytes
            if payload_bytes:
                self._begin_payload(payload_bytes)
        payload = EMPTY
        if payload_bytes:
            if self._pages_filled < payload_bytes:
                return None
            payload = memoryview(self._pages)[:payload_bytes]
            if self.checked:
                self._checksums = (self._checksums[0], zlib.crc32(payload, self._checksums[1]))
                self._check()
        frame = Frame(self._header, payload)
        self._sizes = self._header = None
        return frame

    def _begin_payload(self, payload_bytes: int) -> None:
        self._pages, self._other_pages = self._other_pages, self._pages
        if len(self._pages) < payload_bytes:
            self._pages = bytearray(payload_bytes)
        at_hand = min(payload_bytes, self._end - self._start)
        self._pages[:at_hand] = memoryview(self._small)[self._start : self._start + at_hand]
        self._start += at_hand
        self._pages_filled = at_hand

    def at_boundary(self) -> bool:
        """Whether no frame has begun: the peer may end the connection here."""
        return self._sizes is None and self._start == self._end

    def _check(self) -> None:
        expected, found = self._checksums
        if found != expected:
            raise RemoteProtocolError(
                f"a frame was damaged on its way: its checksum is {found:#010x}, not "
                f"{expected:#010x}"
            )

    def _check_magic(self) -> None:
        begun = bytes(self._small[self._start : min(self._end, self._start + len(MAGIC))])
        if begun[:1] in TLS_BEGINNINGS:
            raise RemoteProtocolError(
                "the peer speaks TLS, and this end does not: make a [tls] section in its "
                "configuration"
            )
        if not MAGIC.startswith(begun):
            raise RemoteProtocolError(
                f"not a frame of xen-postcopy (it begins with {begun!r}): see whether that is the "
                "right port"
            )

    def _parse_prefix(self) -> tuple[int, int]:
        magic, header_bytes, payload_bytes, checksum = PREFIX.unpack_from(self._small, self._start)
        if magic != MAGIC:
            self._check_magic()
        (expected,) = PREFIX_CHECKSUM.unpack_from(self._small, self._start + PREFIX.size)
        self._checksums = (
            expected,
            zlib.crc32(memoryview(self._small)[self._start : self._start + PREFIX.size]),
        )
        self._check()
        self._checksums = (checksum, 0)
        if not 0 < header_bytes <= MAX_HEADER_BYTES:
            raise RemoteProtocolError(
                f"a header of {header_bytes} bytes: 1 to {MAX_HEADER_BYTES} are allowed"
            )
        if payload_bytes > MAX_PAYLOAD_BYTES or payload_bytes % PAGE_SIZE:
            raise RemoteProtocolError(
                f"a payload of {payload_bytes} bytes: whole pages, at most {MAX_PAYLOAD_PAGES}, "
                "are allowed"
            )
        return header_bytes, payload_bytes
