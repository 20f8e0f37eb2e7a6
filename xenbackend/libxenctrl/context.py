# SPDX-License-Identifier: GPL-2.0-or-later
"""The context of a domain's vCPUs and devices, as the bytes that a migration carries.

A context is what libxc's migration stream has besides pages: HVM parameters, time, and the
hypervisor's own context records.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

import msgpack

from xenbackend.errors import XenError
from xenbackend.libxenctrl._xen import ffi
from xenbackend.libxenctrl.params import CONTEXT_PARAMS
from xenbackend.libxenctrl.platform import is_uint

FORMAT = "xen-hvm-context 1"


@dataclass(frozen=True)
class HvmContext:
    """``tsc`` is a ``struct xen_tsc *``; ``records`` are the hypervisor's context records."""

    params: dict[int, int]
    tsc: Any
    records: bytes

    def pack(self) -> bytes:
        """Return the context as :meth:`unpack` reads it."""
        tsc = [self.tsc.mode, self.tsc.elapsed_nsec, self.tsc.khz, self.tsc.incarnation]
        return bytes(msgpack.packb([FORMAT, self.params, tsc, self.records]))

    @classmethod
    def unpack(cls, context: bytes) -> HvmContext:
        """Return the context in these bytes.  Raises ``XenError`` with ``EINVAL`` for bytes that
        are no context, and for parameters that are not :data:`CONTEXT_PARAMS`.
        """
        try:
            form, params, (mode, elapsed, khz, incarnation), records = msgpack.unpackb(
                context, strict_map_key=False
            )
            are_numbers = all(is_uint(number, 32) for number in (mode, khz, incarnation))
            if (
                form != FORMAT
                or type(params) is not dict
                or not all(is_uint(index, 32) for index in params)
                or not all(is_uint(value, 64) for value in params.values())
                or not set(params) <= set(CONTEXT_PARAMS)
                or not (are_numbers and is_uint(elapsed, 64))
                or type(records) is not bytes
            ):
                raise ValueError
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise XenError(
                "set_context", errno.EINVAL, why="not a context of an HVM or PVH domain"
            ) from error
        tsc = ffi.new(
            "struct xen_tsc *",
            {"mode": mode, "elapsed_nsec": elapsed, "khz": khz, "incarnation": incarnation},
        )
        return cls(params, tsc, records)
