# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast the destination takes pages in.  Sans-IO; time is an argument.

The time that sending takes is no measure of this rate: the buffers of both sockets accept several
MiB at once, and the destination loads the pages later.  The sender therefore sends barriers between
batches, and the destination confirms a barrier when it has loaded what was sent before.  What lies
between two barriers is a *chunk*.

The link and the destination are busy with a chunk from its beginning to its confirmation.  If the
chunk before it is confirmed after this beginning, they are busy with this chunk from then on.  So
the pauses of a bandwidth cap do not count.  The cap does not apply while a guest is suspended.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass


@dataclass
class _Chunk:
    began: float
    size: int = 0


class Intake:
    """The rate over some chunks, of which two may be unconfirmed.  Several threads may use it."""

    def __init__(self) -> None:
        self._filling: _Chunk | None = None
        self._unconfirmed: deque[_Chunk] = deque()
        self._free_at = 0.0
        self._size = 0
        self._seconds = 0.0
        self._lock = threading.Lock()

    def begin(self, now: float) -> None:
        """Note that a batch is about to be read and sent."""
        with self._lock:
            self._filling = self._filling or _Chunk(now)

    def sent(self, size: int) -> bool:
        """Note that ``size`` bytes of contents were sent.  Returns whether :meth:`end` is due,
        because no barrier is open.
        """
        with self._lock:
            assert self._filling is not None
            self._filling.size += size
            return not self._unconfirmed

    def end(self) -> bool:
        """End the chunk; a barrier must follow.  Returns false if there is no chunk."""
        with self._lock:
            if self._filling is None:
                return False
            self._unconfirmed.append(self._filling)
            self._filling = None
            return True

    def passed(self, now: float) -> None:
        """Note that the destination has confirmed the barrier after the oldest chunk."""
        with self._lock:
            chunk = self._unconfirmed.popleft()
            self._seconds += now - max(chunk.began, self._free_at)
            self._size += chunk.size
            self._free_at = now

    @property
    def bytes_per_s(self) -> float:
        """The rate over the confirmed chunks; 0 if it is unknown."""
        with self._lock:
            return self._size / self._seconds if self._seconds > 0 else 0.0
