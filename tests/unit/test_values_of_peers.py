# SPDX-License-Identifier: GPL-2.0-or-later
"""What a peer sends for the real Xen: each value of a wrong type or range is refused (invariant
7).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

from xenbackend.errors import GuestOptionError, XenError
from xenbackend.libxenctrl.params import CONTEXT_PARAMS, HVM_PARAM_STORE_EVTCHN
from xenbackend.libxenctrl.platform import PLATFORM_FORMAT, Platform
from xenbackend.simulated.guest import GuestSpec

WRONG: tuple[Any, ...] = (
    None, -1, 1.5, 1 << 63, (1 << 64) - 1, "text", b"bytes", [], [1, 2], {}, {1: 2}, {"a": []},
    msgpack.ExtType(5, b"x"),
)  # fmt: skip
PLATFORM: list[Any] = [PLATFORM_FORMAT, True, 1, 2, bytes(16), 0xFF000, b"leaves", b"msrs"]
CONTEXT: list[Any] = [
    "xen-hvm-context 1", {CONTEXT_PARAMS[0]: (1 << 64) - 1}, [1, (1 << 64) - 1, 3, 4], b"r",
]  # fmt: skip
Allowed = tuple[tuple[tuple[int, ...], Any], ...]
"""Replacements that are right at their places."""


def with_one_changed(whole: Any, allowed: Allowed) -> Iterator[Any]:
    """Yield the value with each part, at any depth, replaced by each wrong one, or left out, or
    there twice.
    """

    def changed(part: Any, at: tuple[int, ...]) -> Iterator[Any]:
        for wrong in WRONG:
            if (at, wrong) not in allowed:
                yield wrong
        if isinstance(part, list):
            for index, inner in enumerate(part):
                for other in changed(inner, (*at, index)):
                    yield [*part[:index], other, *part[index + 1 :]]
                yield [*part[:index], *part[index + 1 :]]
                yield [*part[:index], inner, *part[index:]]

    yield from changed(whole, ())


def refused(unpack: Callable[[bytes], object], value: Any) -> None:
    with pytest.raises(XenError) as caught:
        unpack(msgpack.packb(value))
    assert caught.value.errno == errno.EINVAL, value


def test_a_platform_has_each_value_in_its_type_and_range() -> None:
    assert Platform.unpack(msgpack.packb(PLATFORM)) == Platform(*PLATFORM[1:])
    allowed: Allowed = (((6,), b"bytes"), ((7,), b"bytes"))
    for value in with_one_changed(PLATFORM, allowed):
        refused(Platform.unpack, value)
    for at, wrong in ((1, 1), (2, True), (2, 1 << 32), (3, 1 << 32), (4, bytes(15)), (5, 1 << 52)):
        refused(Platform.unpack, [*PLATFORM[:at], wrong, *PLATFORM[at + 1 :]])


def test_a_context_has_each_value_in_its_type_and_range() -> None:
    pytest.importorskip("xenbackend.libxenctrl._xen", reason="libxen-dev was not there to build it")
    from xenbackend.libxenctrl.context import HvmContext

    whole = HvmContext.unpack(msgpack.packb(CONTEXT))
    assert HvmContext.unpack(whole.pack()).params == whole.params == CONTEXT[1]
    allowed: Allowed = (
        ((1,), {}),
        ((1,), {1: 2}),
        ((2, 1), 1 << 63),
        ((2, 1), (1 << 64) - 1),
        ((3,), b"bytes"),
    )
    for value in with_one_changed(CONTEXT, allowed):
        refused(HvmContext.unpack, value)
    form, _params, tsc, records = CONTEXT
    index = CONTEXT_PARAMS[0]
    for params in (
        [index], {index: -1}, {index: True}, {index: 1.0}, {index: "1"}, {index: None},
        {index: [1]}, {True: 1}, {float(index): 1}, {str(index): 1}, {HVM_PARAM_STORE_EVTCHN: 1},
    ):  # fmt: skip
        refused(HvmContext.unpack, [form, params, tsc, records])
    for at in (0, 2, 3):
        refused(HvmContext.unpack, [form, {}, [*tsc[:at], 1 << 32, *tsc[at + 1 :]], records])


def test_a_simulated_guest_has_each_value_in_its_type() -> None:
    whole = msgpack.unpackb(GuestSpec("g", 1 << 20).to_bytes())
    for key in whole:
        for wrong in WRONG:
            try:
                GuestSpec.from_bytes(msgpack.packb({**whole, key: wrong}))
            except GuestOptionError:
                continue
            assert type(wrong) is type(whole[key]) or wrong is None or whole[key] is None
