# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel measures of a lane's link, without the work of either program: its latency, and
for how long nothing has arrived.
"""

from __future__ import annotations

import math
import os
import socket
import sys

LAST_DATA_RECV, MIN_RTT = 52, 148
"""The places in ``struct tcp_info`` (linux/tcp.h) of ``tcpi_last_data_recv``, in milliseconds, and
of ``tcpi_min_rtt``, in microseconds.  Both have 32 bits.
"""
NOT_MEASURED = 2**32 - 1


def round_trip_s(fd: int) -> float:
    """Return the least round trip of the last minutes on a connection; 0 if it is not known."""
    least_us = _info(fd, MIN_RTT)
    return least_us / 1e6 if least_us is not None and least_us < NOT_MEASURED else 0.0


def silence_s(fd: int) -> float:
    """Return the time since a segment with data last arrived on a connection; infinity if it is not
    known.
    """
    last_ms = _info(fd, LAST_DATA_RECV)
    return math.inf if last_ms is None else last_ms / 1e3


def _info(fd: int, at: int) -> int | None:
    """Return a value of ``struct tcp_info``; ``None`` if there is none."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, at + 4)
    except OSError:  # not TCP, or closed
        return None
    return int.from_bytes(info[at:], sys.byteorder)
