# SPDX-License-Identifier: GPL-2.0-or-later
"""The latency of a lane's link, as the kernel measures it, without the work of either program."""

from __future__ import annotations

import os
import socket
import sys

MIN_RTT = 148
"""The place of ``tcpi_min_rtt`` in ``struct tcp_info`` (linux/tcp.h): 32 bits, in microseconds."""
NOT_MEASURED = 2**32 - 1


def round_trip_s(fd: int) -> float:
    """Return the least round trip of the last minutes on a connection; 0 if it is not known."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, MIN_RTT + 4)
    except OSError:  # not TCP, or closed
        return 0.0
    least_us = int.from_bytes(info[MIN_RTT:], sys.byteorder)
    return least_us / 1e6 if least_us < NOT_MEASURED else 0.0
