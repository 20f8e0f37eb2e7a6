# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest leaves: the contents of libxl's stream, and the exchange between the sender daemon and
libxl.

The stream begins as any other.  Then it makes an *offer* in an optional record, which the stock
helper skips: the sender daemon of this host, at this address, could migrate the guest as this
session.  A receiver that accepts the offer dials the sender.  If none dials, or if the receiver
refuses, the stock helper continues with the same stream.  Otherwise the static data follow, a
*mandatory* record that names the session, and END.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
from typing import Never

from migrate.control.client import ControlClient, Json, receiver_socket, sender_socket
from migrate.errors import MigrationError
from migrate.outcomes import ENDED
from migrate.xl import image, libxl, protocol, stock
from migrate.xl.libxl import INPUT, Request, write_all


def wait_for_memory(request: Request) -> None:
    """Wait until a guest that has come here by postcopy has all its pages.  libxc would save a
    missing page as a hole.

    Ends this process if the pages cannot be expected to arrive.
    """
    path = os.environ.get("XEN_POSTCOPY_RECEIVER") or receiver_socket()
    try:
        daemon = ControlClient(path)
    except MigrationError as error:
        # A receiver that was stopped in order has removed its socket.
        if isinstance(error.__cause__, ConnectionRefusedError):
            libxl.fail(
                "the receiver daemon of this host was killed, and memory of the guest may have "
                "still to come: start the receiver again; if no guest has come to this host, "
                f"remove {path}",
                errno.EBUSY,
            )
        return  # the guest has no pager, so all of its memory is here
    try:
        daemon.send(command="await-memory", domid=request.domid)
        while (answer := daemon.answer(INPUT)) is not None:
            if answer["event"] == "result":
                return
            libxl.send(
                protocol.progress(
                    "waiting for its memory to arrive", answer["arrived"], answer["missing"]
                )
            )
    except MigrationError as error:
        if "unknown command" not in str(error):
            libxl.fail(str(error), errno.EBUSY)
        _ask_older_receiver(path)
        return
    except EOFError:
        libxl.gone()
    finally:
        daemon.close()
    libxl.fail(
        "the receiver daemon has ended, and memory of the guest may be missing: try again",
        errno.EBUSY,
    )


def _ask_older_receiver(path: str) -> None:
    """Ask a receiver of an earlier release, which is still running.  That release does not answer
    which guest lacks pages.
    """
    try:
        with ControlClient(path) as daemon:
            lines = daemon.call(command="list")["migrations"]
    except MigrationError as error:
        libxl.fail(str(error), errno.EBUSY)
    if under_way := [line["domain"] for line in lines if line["phase"] not in ENDED]:
        guests = ", ".join(under_way)
        libxl.fail(
            f"memory of a guest may have still to come ({guests}): try again when it has",
            errno.EBUSY,
        )


def save(request: Request) -> Never:
    if os.isatty(request.io_fd):
        sys.exit("xen-postcopy-xl-helper: a stream does not go to a terminal")
    try:
        daemon = ControlClient(os.environ.get("XEN_POSTCOPY_SENDER") or sender_socket())
        strategy = os.environ.get("XEN_POSTCOPY_STRATEGY")
        daemon.send(command="save", domid=request.domid, strategy=strategy, xl=os.getppid())
        offer = daemon.answer(INPUT)
        if offer is None:
            raise MigrationError("the daemon has ended")
    except MigrationError as error:
        stock.become(request, str(error))
    except EOFError:
        libxl.gone()
    if offer["event"] == "refused":
        libxl.fail(offer["message"], errno.EBUSY)
    _Saving(request, daemon, offer).run()


class _Saving:
    def __init__(self, request: Request, daemon: ControlClient, offer: Json):
        self._request = request
        self._daemon = daemon
        self._offer = offer
        self._tracked = False
        """The device model records what it writes."""

    def run(self) -> Never:
        headers = image.headers(*stock.xen_version())
        body = {key: self._offer[key] for key in ("session", "address", "token")}
        self._write(
            headers + image.record(image.REC_TYPE_POSTCOPY_OFFER, json.dumps(body).encode())
        )
        try:
            while (answer := self._daemon.answer(INPUT)) is not None:
                self._follow(answer)
            reason = "the sender daemon has ended"
        except MigrationError as error:
            reason = str(error)  # the guest continues here, also after an agreement
        except EOFError:
            libxl.gone()
        self._stop_tracking()
        libxl.fail(reason, errno.EIO)

    def _follow(self, answer: Json) -> None:
        """Carry out an answer of the daemon."""
        match answer["event"]:
            case "progress":
                if answer["pages_total"]:
                    doing = (
                        f"{answer['phase']}, round {answer['round']}"
                        if answer["round"]
                        else answer["phase"]
                    )
                    libxl.send(
                        protocol.progress(doing, answer["pages_done"], answer["pages_total"])
                    )
            case "declined":
                stock.require(answer["message"])
                stock.save_after_headers(self._request)
            case "agreed":
                self._write(self._rest())
                self._daemon.send(answer=0)
            case "log_dirty":
                self._daemon.send(answer=self._track(enable=bool(answer["enable"])))
            case "suspend":
                self._daemon.send(answer=libxl.ask(protocol.suspend()))
            case "result":
                self._stop_tracking()
                libxl.succeed()

    def _track(self, *, enable: bool) -> int:
        """Have the device model record what it writes, or stop that.  Returns libxl's answer."""
        answer = libxl.ask(protocol.switch_qemu_logdirty(self._request.domid, enable))
        self._tracked = enable and not answer
        return answer

    def _stop_tracking(self) -> None:
        """Have the device model stop recording, at the end.  An error is ignored, as the stock
        helper does.
        """
        if self._tracked:
            self._track(enable=False)

    def _rest(self) -> bytes:
        leaves, msrs = map(base64.b64decode, self._offer["cpu_policy"])
        return b"".join(
            (
                image.record(image.REC_TYPE_X86_CPUID_POLICY, leaves) if leaves else b"",
                image.record(image.REC_TYPE_X86_MSR_POLICY, msrs) if msrs else b"",
                image.record(image.REC_TYPE_STATIC_DATA_END),
                image.record(image.REC_TYPE_POSTCOPY, self._offer["session"].encode()),
                image.record(image.REC_TYPE_END),
            )
        )

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._request.io_fd, data)
        except OSError as error:
            libxl.fail(f"the migration's stream: {error.strerror}", error.errno or 0)
