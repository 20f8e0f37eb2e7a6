# SPDX-License-Identifier: GPL-2.0-or-later
"""Under xl: the program that libxl starts to save and restore domains, in place of its own.

    helper.py     the program, ``xen-postcopy-xl-helper``: whose work is it?
    save.py       a guest leaves: the sender daemon does it, and has libxl do what is libxl's
    restore.py    a guest comes: the receiver daemon does it, if the stream says so
    stock.py      libxl's own helper, which does all else
    libxl.py      the two ends of the conversation with libxl
    protocol.py   what is said in it
    image.py      the stream that libxl passes from host to host

It starts with each ``xl migrate``, so nothing here imports more than the standard library's small parts.
"""
