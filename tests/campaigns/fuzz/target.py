# SPDX-License-Identifier: GPL-2.0-or-later
"""The target for one input; ``__main__.py`` describes it."""

from __future__ import annotations

import json
import struct
import sys
import zlib

import atheris
import msgpack

with atheris.instrument_imports(include=["migrate"]):
    from migrate.errors import RemoteProtocolError
    from migrate.protocol import frames
    from migrate.protocol import messages as m
    from migrate.protocol.messages import Lane, parse
    from migrate.protocol.session import Role, negotiate

from sender.statistics import from_peer
from tests.support.stories import DECIDED, EXAMPLES, PROTECTED, STORY, UNDER_XL, play, rejoined

STORIES = (
    STORY, DECIDED, UNDER_XL, [*STORY[:-4], *rejoined("postcopy")],
    [*UNDER_XL, *rejoined("decision")], PROTECTED,
)  # fmt: skip


def frame(header: bytes) -> bytes:
    """Return a frame with correct checksums, because a fuzzer should not have to guess these."""
    prefix = frames.PREFIX.pack(frames.MAGIC, len(header), 0, zlib.crc32(header))
    return prefix + struct.pack("!I", zlib.crc32(prefix)) + header


def decode(data: bytes) -> list[frames.Frame]:
    decoder = frames.FrameDecoder()
    found = []
    view = memoryview(data)
    while view:
        wanted = decoder.wanted()
        assert 0 < len(wanted) <= frames.MAX_PAYLOAD_BYTES
        count = min(len(wanted), len(view))
        wanted[:count] = view[:count]
        decoder.filled(count)
        view = view[count:]
        while (received := decoder.next_frame()) is not None:
            found.append(received)
    return found


def any_value(given: atheris.FuzzedDataProvider) -> object:
    match given.ConsumeIntInRange(0, 7):
        case 0:
            return given.ConsumeInt(8)
        case 1:
            return given.ConsumeUnicodeNoSurrogates(given.ConsumeIntInRange(0, 80))
        case 2:
            return bool(given.ConsumeBool())
        case 3:
            return None
        case 4:
            return [
                given.ConsumeUnicodeNoSurrogates(8) for _ in range(given.ConsumeIntInRange(0, 40))
            ]
        case 5:  # pfns
            return b"".join(
                struct.pack("<Q", given.ConsumeIntInRange(0, 2000))
                for _ in range(given.ConsumeIntInRange(0, 9))
            )
        case 6:
            return given.ConsumeIntInRange(0, 5000)
        case _:
            return given.ConsumeBytes(given.ConsumeIntInRange(0, 200))


def any_header(given: atheris.FuzzedDataProvider) -> bytes:
    """Return arbitrary bytes, or a message with some of its fields changed."""
    if not given.ConsumeIntInRange(0, 9):
        return bytes(given.ConsumeBytes(given.ConsumeIntInRange(1, 400)))
    header = EXAMPLES[given.ConsumeIntInRange(0, len(EXAMPLES) - 1)].header()
    for _ in range(given.ConsumeIntInRange(0, 2)):
        field = sorted(header)[given.ConsumeIntInRange(0, len(header) - 1)]
        if given.ConsumeIntInRange(0, 9):
            header[field] = any_value(given)
        else:
            del header[field]
            if not header:
                break
    try:
        return bytes(msgpack.packb(header))
    except OverflowError:
        return b"\x80"


def check_texts(message: m.Message) -> None:
    """Check texts of a peer, which may reach a terminal, a log and JSON."""
    for value in vars(message).values():
        for text in value if isinstance(value, tuple) else (value,):
            assert not isinstance(text, str) or (text.isprintable() and len(text) <= m.MAX_TEXT)
    if isinstance(message, m.Complete):
        try:
            json.dumps(from_peer(json.loads(message.statistics)), allow_nan=False)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return  # the receiver of the message refuses it


def one_input(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    story = STORIES[given.ConsumeIntInRange(0, len(STORIES) - 1)]
    role = Role(given.ConsumeIntInRange(0, 1))
    session = play(story[: given.ConsumeIntInRange(0, len(story))])[role]
    if given.ConsumeBool():
        try:
            decode(given.ConsumeBytes(given.remaining_bytes()))
        except RemoteProtocolError as error:
            assert str(error)
        return
    try:
        while given.remaining_bytes():
            lane = Lane.PULL if given.ConsumeBool() else Lane.PUSH
            for received in decode(frame(any_header(given))):
                message = parse(received.header, len(received.payload))
                check_texts(message)
                if isinstance(message, m.Hello):
                    try:
                        negotiate(message)
                    except Exception as error:
                        assert type(error).__name__ == "ProtocolError"
                    continue
                session.received(message, lane)
    except RemoteProtocolError as error:
        assert str(error)


if __name__ == "__main__":
    # The program that libFuzzer starts when it merges.
    atheris.Setup([f"{sys.executable} -m tests.campaigns.fuzz.target", *sys.argv[1:]], one_input)
    atheris.Fuzz()
