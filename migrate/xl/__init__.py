# SPDX-License-Identifier: GPL-2.0-or-later
"""Under xl: the program that libxl starts to save and restore domains, in place of its own.

    helper.py     the program, ``xen-postcopy-xl-helper``, which starts one of the parts below
    save.py       a guest leaves: the sender daemon migrates it, and libxl does its own part
    restore.py    a guest comes: the receiver daemon takes it in, if the stream has an offer
    stock.py      libxl's own helper, which does all else
    libxl.py      the two ends of the connection to libxl
    protocol.py   the messages of this connection
    image.py      the stream that libxl passes from host to host

The program is started for each ``xl migrate``.  It therefore imports nothing but small parts of the
standard library.
"""

VARIABLE = "LIBXL_SAVE_HELPER"
"""The variable of the environment by which libxl finds another helper than its own."""
INSTALLED = "/usr/bin/xen-postcopy-xl-helper"
"""Where the package installs the program."""
WITH_HELPER = f"{VARIABLE}={INSTALLED}"
"""What precedes ``xl migrate`` in a shell."""
