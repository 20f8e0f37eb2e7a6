# SPDX-License-Identifier: GPL-2.0-or-later
"""The stream that libxl passes from host to host, as far as a helper needs it.  Sans-IO.

The stream is an image header, a domain header, and records, each with type and length.  The last
record is END; what follows END is libxl's own.  Source: docs/specs/libxc-migration-stream.pandoc,
version 3 (Xen 4.17).
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

from migrate.errors import MigrationError

IMAGE_HEADER = struct.Struct(">QIIHHI")
DOMAIN_HEADER = struct.Struct("<IHHII")
RECORD_HEADER = struct.Struct("<II")
PAGE_SHIFT = 12
HEADER_BYTES = IMAGE_HEADER.size + DOMAIN_HEADER.size

MARKER = 0xFFFFFFFFFFFFFFFF
ID = 0x58454E46  # "XENF"
VERSIONS = (2, 3)
"""The versions that Xen 4.17 restores; version 2 has no static data."""

REC_TYPE_END = 0x00000000
REC_TYPE_STATIC_DATA_END = 0x00000010
REC_TYPE_X86_CPUID_POLICY = 0x00000011
REC_TYPE_X86_MSR_POLICY = 0x00000012
REC_TYPE_OPTIONAL = 0x80000000
REC_TYPE_POSTCOPY = 0x58505630
"""Our mandatory record.  A receiver without this helper fails at it, and so does not start a guest
without memory.
"""
REC_TYPE_POSTCOPY_OFFER = REC_TYPE_OPTIONAL | REC_TYPE_POSTCOPY
"""Our optional record, which a receiver without this helper skips."""
DOMAIN_TYPE_HVM = 2
STATIC = (REC_TYPE_X86_CPUID_POLICY, REC_TYPE_X86_MSR_POLICY, REC_TYPE_STATIC_DATA_END)
"""The records that may precede the record which shows whether the stream is ours."""
REC_LENGTH_MAX = 128 << 20
"""The longest record that libxc accepts (xc_sr_common.h)."""


class ImageError(Exception):
    """These bytes are no image that a helper of this version could restore."""


class RecordHeader(NamedTuple):
    type: int
    length: int

    @property
    def padded(self) -> int:
        """The number of bytes until the next record; bodies are padded to a multiple of 8."""
        return self.length + 7 & ~7

    @property
    def is_static(self) -> bool:
        return self.type in STATIC or bool(self.type & REC_TYPE_OPTIONAL)


def headers(xen_major: int, xen_minor: int) -> bytes:
    """Return the headers of the image of an HVM or PVH domain."""
    return IMAGE_HEADER.pack(MARKER, ID, VERSIONS[-1], 0, 0, 0) + DOMAIN_HEADER.pack(
        DOMAIN_TYPE_HVM, PAGE_SHIFT, 0, xen_major, xen_minor
    )


def record(kind: int, body: bytes = b"") -> bytes:
    return RECORD_HEADER.pack(kind, len(body)) + body + bytes(-len(body) % 8)


def parse_offer(body: bytes) -> dict[str, Any]:
    """Return ``session``, ``address`` (host, port) and ``token`` (hexadecimal).  Raises
    :class:`MigrationError`.
    """
    try:
        offer = json.loads(body)
        session, (host, port), token = offer["session"], offer["address"], offer["token"]
        if not (
            isinstance(session, str)
            and isinstance(host, str)
            and type(port) is int
            and bytes.fromhex(token)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MigrationError("the sender's offer is of another version of xen-postcopy") from error
    return {"session": session, "address": [host, port], "token": token}


def check_headers(data: bytes) -> None:
    """Check the first :data:`HEADER_BYTES` of a stream.  Raises :class:`ImageError`."""
    marker, magic, version, options, _reserved, _reserved2 = IMAGE_HEADER.unpack_from(data)
    if (marker, magic) != (MARKER, ID):
        raise ImageError("not an image of a Xen domain, or one of Xen 4.5 or older")
    if version not in VERSIONS or options & 1:
        raise ImageError(
            f"an image of version {version}, {'big' if options & 1 else 'little'} endian"
        )


def read_record_header(data: bytes) -> RecordHeader:
    return RecordHeader(*RECORD_HEADER.unpack(data))
