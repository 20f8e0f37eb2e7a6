# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated Xen that runs on any machine, as a process of its own.

``host`` is that process, ``hosted`` one of its domains; ``client`` is the backend that daemons attach
with; ``guest`` describes guests; ``verify`` recomputes what a guest's memory must hold and compares.  The
native half (``native/``): ``hypercalls.c`` page operations, ``pause.c``, ``paging.c``, ``balloon.c`` and
``vcpu.c`` vCPUs and what holds them up, ``program.c`` guest programs.
"""
