"""Under xl: the program that libxl starts to save and restore domains, in place of its own.

    helper.py     the program, ``xen-postcopy-xl-helper``
    protocol.py   what it says to libxl
    image.py      the stream that libxl passes from host to host

It starts with each ``xl migrate``, so nothing here imports more than the standard library's small parts.
"""
