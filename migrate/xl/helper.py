# SPDX-License-Identifier: GPL-2.0-or-later
"""``xen-postcopy-xl-helper``: the program that libxl starts to save or restore a domain, if
LIBXL_SAVE_HELPER names it.

The daemons do the work of a live migration.  This program exchanges libxl's messages for them, and
writes and reads what libxl's stream has to carry.  The stock helper does everything else, also a
migration that the daemons cannot do.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys

from migrate.streams import open_standard_streams
from migrate.xl import libxl, stock
from migrate.xl.libxl import Request

USAGE = """\
usage: xen-postcopy-xl-helper --save-domain IO_FD RECV_FD DOMID XCFLAGS CBFLAGS STREAM_TYPE
       xen-postcopy-xl-helper --restore-domain IO_FD SEND_BACK_FD DOMID STORE_EVTCHN STORE_DOMID
                              CONSOLE_EVTCHN CONSOLE_DOMID CBFLAGS STREAM_TYPE

libxl starts this program in place of its own libxl-save-helper when the environment of xl names it,
at both hosts:

    LIBXL_SAVE_HELPER=/usr/bin/xen-postcopy-xl-helper xl migrate GUEST HOST

Live migrations are then done by the daemons of the two hosts, by postcopy.  If that is not possible
(no daemon here or there, a host or a guest that cannot be paged), Xen's own live migration is used,
with a line that gives the reason.

If memory of a guest is still to come from another host, this program waits for the memory before
the guest is saved or migrated.

XEN_POSTCOPY=off        use the stock helper for everything, and print nothing
XEN_POSTCOPY=require    fail instead of using the stock helper for a migration
XEN_POSTCOPY_STRATEGY   hybrid, postcopy or precopy (otherwise as the sender is configured)
XEN_POSTCOPY_SENDER, XEN_POSTCOPY_RECEIVER
                        the control sockets of the local daemons
XEN_POSTCOPY_SOCKETS    the folder with both (otherwise /run/xen-postcopy)
XEN_POSTCOPY_STOCK_HELPER
                        libxl's own helper
"""


def main() -> None:
    """The entry point.  Every error ends in an answer to libxl or in one line for the user."""
    open_standard_streams()
    try:
        _help(sys.argv[1:])
    except Exception as error:
        libxl.fail(f"an error of xen-postcopy-xl-helper itself: {error!r}", errno.EIO)


def _help(arguments: list[str]) -> None:
    if arguments in (["--help"], ["-h"]):
        print(USAGE, end="")
        return
    try:
        request = Request.parse(arguments)
    except ValueError as error:
        sys.exit(f"xen-postcopy-xl-helper: {error}\n{USAGE}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end as the stock helper does; the daemon notices
    to_file = stat.S_ISREG(os.fstat(request.io_fd).st_mode)
    if request.saves:
        from migrate.xl.save import wait_for_memory

        wait_for_memory(request)
    if os.environ.get("XEN_POSTCOPY") == "off" or to_file or request.checkpointed:
        stock.become(request, None)
    if not request.saves:
        from migrate.xl.restore import restore

        restore(request)
    if not request.live:
        stock.become(request, None)
    from migrate.xl.save import save

    save(request)


if __name__ == "__main__":
    main()
