# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated Xen that runs on any machine, as a process of its own.

``host`` is this process, and ``hosted`` is one of its domains.  ``client`` is the backend by which
daemons attach.  ``guest`` describes guests.  ``verify`` recomputes a guest's memory and compares.
The native half is in ``native/``: ``hypercalls.c`` has page operations; ``pause.c``, ``paging.c``,
``balloon.c`` and ``vcpu.c`` have vCPUs and what delays them; ``program.c`` has guest programs.
"""
