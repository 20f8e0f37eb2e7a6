# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages between dom0 and a guest's network: requests, whose answers are compared word by
word.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tests.xenlab.dom0.devices import GUEST_ADDRESS
from tests.xenlab.dom0.guests import Guest
from tests.xenlab.dom0.waiting import WAIT_S, until

WORDS = 128
"""The words of a message."""
BYTES = WORDS * 8
PORT = 7
CONNECTION_S, DATAGRAM_S = WAIT_S, 1.0
"""How long an answer is waited for."""
PACE_S = 0.05
"""The pause between two messages."""
Words = NDArray[np.uint64]


def mix(x: Words) -> Words:
    """Return the same as ``mix`` in ``guest/pattern.h``."""
    shift = np.uint64(33)
    x = (x ^ (x >> shift)) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> shift)) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> shift)


def message(number: int, *, answer: bool) -> bytes:
    """Return a request, or the answer to a request, as ``guest/net.h`` has them."""
    words = mix(np.arange(WORDS, dtype=np.uint64) + np.uint64((2 * number + answer) * WORDS))
    words[0] = number
    return words.tobytes()


class Traffic:
    """A TCP connection to the guest, and datagrams to it.  Both are in use until :meth:`close`."""

    def __init__(self) -> None:
        self.answers = {"tcp": 0, "udp": 0}
        self.longest_s = {"tcp": 0.0, "udp": 0.0}
        self.wrong = self.lost = 0
        self.problem = ""
        """Why the connection has ended."""
        self._stopped = threading.Event()
        self._connection = socket.create_connection((GUEST_ADDRESS, PORT), CONNECTION_S)
        self._threads = [
            threading.Thread(target=self._use, args=("tcp", self._over_tcp), daemon=True),
            threading.Thread(target=self._use, args=("udp", self._over_udp), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _use(self, kind: str, exchange: Callable[[], Iterator[bytes]]) -> None:
        began = time.monotonic()
        for number, found in enumerate(exchange()):
            self.wrong += found != message(number, answer=True)
            self.longest_s[kind] = max(self.longest_s[kind], time.monotonic() - began)
            self.answers[kind] += 1
            if self._stopped.wait(PACE_S):
                return
            began = time.monotonic()

    def _over_tcp(self) -> Iterator[bytes]:
        number = 0
        try:
            while True:
                self._connection.sendall(message(number, answer=False))
                found = b""
                while len(found) < BYTES:
                    if not (more := self._connection.recv(BYTES - len(found))):
                        raise ConnectionResetError("the guest has closed the connection")
                    found += more
                yield found
                number += 1
        except OSError as error:
            if not self._stopped.is_set():
                self.problem = repr(error)

    def _over_udp(self) -> Iterator[bytes]:
        number = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.settimeout(DATAGRAM_S)
            datagrams.connect((GUEST_ADDRESS, PORT))
            while not self._stopped.is_set():
                try:
                    datagrams.send(message(number, answer=False))
                    # An answer to an earlier attempt may come late.
                    while int.from_bytes((found := datagrams.recv(BYTES))[:8], "little") != number:
                        pass
                except OSError:  # no answer, or none to the request for the guest's address
                    self.lost += 1
                    self._stopped.wait(PACE_S)
                    continue
                yield found
                number += 1

    def wait_for_answers(self, count: int = 10) -> None:
        """Wait for so many more answers over each.  Raises ``AssertionError`` if an answer was
        wrong, or if the connection has ended.
        """
        first = dict(self.answers)

        def answered() -> bool:
            return all(self.answers[kind] >= first[kind] + count for kind in first)

        until(lambda: self.problem or answered(), "the guest does not answer")
        assert (self.problem, self.wrong) == ("", 0)

    def check(self, guest: Guest) -> None:
        """Check that the guest answers, over the connection that was made first."""
        self.wait_for_answers()
        guest.wait_for_heartbeats(2)
        use = guest.wait_for_network()
        assert (use.mismatches, use.connections) == (0, 1)

    def close(self) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._connection.close()
        print(
            f"answers {self.answers}, wrong {self.wrong}, datagrams lost {self.lost}, "
            f"longest {self.longest_s} s {self.problem}"
        )
