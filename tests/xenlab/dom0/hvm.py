# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests with a device model: their disks, their CD, and a client that watches their screen."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.xenlab.dom0.devices import image
from tests.xenlab.dom0.guests import PARTS, run
from tests.xenlab.dom0.waiting import WAIT_S, until

CD_BYTES = 2 * 2**20
CD_FACTOR = 0x9E3779B97F4A7C15
"""As in ``guest/cd.h``."""
SCREEN = 'vga = "stdvga"\nvideoram = 16\nvnc = 1\nvnclisten = "127.0.0.1"\nvncunused = 1\n'
NO_SCREEN = 'vga = "none"\nvnc = 0\n'
VERSION = b"RFB 003.008\n"
NO_SECURITY = 1


@contextlib.contextmanager
def disk_of_device_model(name: str, *, boots: bool = False) -> Iterator[str]:
    """Yield the specification of a disk that the device model serves.  ``boots``: the firmware can
    boot from the disk.
    """
    with image(name) as path:
        if boots:
            shutil.copy(PARTS / "boot.disk", path)
        yield f"format=raw,vdev=xvda,access=rw,backendtype=qdisk,target={path}"


@contextlib.contextmanager
def cd(name: str) -> Iterator[str]:
    """Yield the specification of a CD that the device model emulates."""
    path = Path(f"/tmp/{name}.iso")
    words = np.arange(CD_BYTES // 8, dtype=np.uint64) * np.uint64(CD_FACTOR)
    path.write_bytes(words.tobytes())
    try:
        yield f"format=raw,vdev=hdc,access=ro,devtype=cdrom,target={path}"
    finally:
        path.unlink()


def device_models() -> list[int]:
    """Return the processes that are device models of guests."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"-xen-domid" in words:
                found.append(int(path.parent.name))
    return found


def device_model(domid: int) -> int:
    """Return the process that is the device model of a guest."""
    return int(run("xenstore-read", f"/local/domain/{domid}/image/device-model-pid"))


class Screen:
    """A client (RFC 6143) that requests each change of a guest's screen, in a thread."""

    def __init__(self, domid: int):
        port = int(run("xenstore-read", f"/local/domain/{domid}/console/vnc-port"))
        self._socket = socket.create_connection(("127.0.0.1", port), WAIT_S)
        self._stream = self._socket.makefile("rb")
        self.updates = 0
        self.problem = ""
        self.size = self._begin()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _receive(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError("the device model has closed the connection")
        return data

    def _begin(self) -> tuple[int, int]:
        """Return the width and the height of the screen, in pixels of 32 bits."""
        assert self._receive(len(VERSION)) == VERSION
        self._socket.sendall(VERSION)
        assert NO_SECURITY in self._receive(self._receive(1)[0])
        self._socket.sendall(bytes([NO_SECURITY]))
        assert self._receive(4) == bytes(4)
        self._socket.sendall(b"\1")
        width, height = struct.unpack(">HH", self._receive(4))
        (bits,) = struct.unpack(">B15x", self._receive(16))
        assert bits == 32
        self._receive(struct.unpack(">I", self._receive(4))[0])
        self._socket.sendall(struct.pack(">BxHi", 2, 1, 0))  # rectangles without compression
        return width, height

    def _request(self, incremental: int) -> None:
        self._socket.sendall(struct.pack(">BBHHHH", 3, incremental, 0, 0, *self.size))

    def _watch(self) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            self._request(0)
            while True:
                kind = self._receive(1)[0]
                if kind:
                    self.problem = f"a message of the type {kind}"
                    return
                (rectangles,) = struct.unpack(">xH", self._receive(3))
                for _ in range(rectangles):
                    _, _, width, height, _ = struct.unpack(">HHHHi", self._receive(12))
                    self._receive(width * height * 4)
                self.updates += 1
                self._request(1)

    def wait_for_changes(self, count: int) -> None:
        """Wait until the screen has changed so many more times."""
        wanted = self.updates + count
        until(lambda: self.updates >= wanted or self.problem, "the screen does not change")
        assert not self.problem, self.problem

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)
        self._stream.close()
        self._socket.close()
