# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest comes: read libxl's stream until it shows whether the daemons or the stock helper restore
the guest.

If the stream has an offer (``save.py``), it is passed to the receiver daemon at once.  The receiver
dials the sender, and checks whether this host can page the guest.  The next record shows the
result: a session that was agreed on, or an ordinary stream for the stock helper.

What is read before that result is kept for the stock helper.  If it would become longer than the
longest record of libxc, the rest is left to the stock helper, which refuses a record that is too
long.
"""

from __future__ import annotations

import errno
import os
from typing import Never

from migrate.control.client import ControlClient, Json, receiver_socket
from migrate.errors import MigrationError
from migrate.xl import image, libxl, protocol, stock
from migrate.xl.libxl import INPUT, Request, read_exactly


def restore(request: Request) -> Never:
    _Restoring(request).run()


class _Restoring:
    def __init__(self, request: Request):
        self._request = request
        self._read = bytearray()
        self._session = ""
        self._daemon: ControlClient | None = None
        self._why_not = "it made no offer that this host could have taken up"

    def _take(self, count: int) -> bytes:
        data = read_exactly(self._request.io_fd, count)
        self._read += data
        return data

    def _next(self) -> image.RecordHeader:
        return image.read_record_header(self._take(image.RECORD_HEADER.size))

    def _fits(self, record: image.RecordHeader) -> bool:
        """Whether a record can be kept beside what has been read."""
        return len(self._read) + record.padded <= image.REC_LENGTH_MAX

    def run(self) -> Never:
        try:
            image.check_headers(self._take(image.HEADER_BYTES))
            record = self._next()
            while record.is_static and self._fits(record):
                body = self._take(record.padded)[: record.length]
                if record.type == image.REC_TYPE_POSTCOPY_OFFER:
                    self._pass_offer(body)
                record = self._next()
            if record.type == image.REC_TYPE_POSTCOPY and self._fits(record):
                self._take_in(record)
        except image.ImageError:
            # The stock helper reports the error.
            stock.restore_rest(self._request, bytes(self._read), None)
        except (EOFError, OSError) as error:
            libxl.fail(f"the migration's stream: {error}", errno.EPIPE)
        self._leave(record)

    def _pass_offer(self, body: bytes) -> None:
        """Pass an offer to the receiver daemon, which tries to accept it."""
        try:
            offer = image.parse_offer(body)
            self._session = offer["session"]
            daemon = ControlClient(os.environ.get("XEN_POSTCOPY_RECEIVER") or receiver_socket())
            daemon.send(
                command="restore", domid=self._request.domid, ports=self._request.ports, **offer
            )
        except MigrationError as error:
            self._why_not = str(error)
        else:
            self._daemon = daemon

    def _leave(self, record: image.RecordHeader) -> Never:
        """Leave an ordinary stream to the stock helper.  The daemon first undoes all that it has
        done to the domain.
        """
        if os.environ.get("XEN_POSTCOPY") == "require":
            libxl.fail(
                "XEN_POSTCOPY=require, and the sender uses Xen's own live migration",
                errno.EOPNOTSUPP,
            )
        if self._daemon is not None:
            try:
                self._daemon.send(command="release")
                self._await_result(self._daemon)
            except MigrationError as error:
                self._why_not = str(error)
        if self._session:
            libxl.notice(f"{self._why_not}: using Xen's own live migration")
        stock.restore_rest(self._request, bytes(self._read), record)

    def _take_in(self, record: image.RecordHeader) -> Never:
        """Finish a restore for which the sender has agreed on a session with our daemon."""
        session = self._take(record.padded)[: record.length].decode(errors="replace")
        if self._daemon is None or session != self._session:
            libxl.fail(f"the sender wants postcopy, but {self._why_not}", errno.EOPNOTSUPP)
        if self._next().type != image.REC_TYPE_END:
            libxl.fail("the migration's stream: records after the session's", errno.EINVAL)
        libxl.ask(protocol.static_data_done(0))
        try:
            result = self._await_result(self._daemon)
        except MigrationError as error:
            libxl.fail(str(error), errno.EIO)
        libxl.send(protocol.restore_results(result["store_gfn"], result["console_gfn"]))
        libxl.succeed()

    def _await_result(self, daemon: ControlClient) -> Json:
        """Return the daemon's result.  Raises :class:`MigrationError`."""
        try:
            while (answer := daemon.answer(INPUT)) is not None:
                if answer["event"] == "result":
                    return answer
        except EOFError:
            libxl.gone()
        raise MigrationError("the receiver daemon has ended")
