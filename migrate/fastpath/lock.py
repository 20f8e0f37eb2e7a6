# SPDX-License-Identifier: GPL-2.0-or-later
"""A lock that both languages take."""

from __future__ import annotations

from types import TracebackType

from migrate.fastpath._fault import ffi, lib


class NativeLock:
    """A lock that native code takes as well.  A thread that holds it must not take it again."""

    def __init__(self) -> None:
        lock = lib.fault_lock_new()
        if lock == ffi.NULL:
            raise MemoryError
        self.native = ffi.gc(lock, lib.fault_lock_free)

    def __enter__(self) -> None:
        lib.fault_lock_take(self.native)

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        lib.fault_lock_give(self.native)

    def locked(self) -> bool:
        return bool(lib.fault_lock_is_taken(self.native))
