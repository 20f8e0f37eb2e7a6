# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated Xen that runs on any machine, as a process of its own.

``host`` is that process (domains, vCPU threads, the hypervisor's end of the paging ring); ``client`` is the
backend that daemons attach with; ``guest`` describes guests; ``verify`` recomputes what a guest's memory must
hold and compares.  The native half (``native/``): ``hypercalls.c`` page operations, ``vcpu.c`` vCPUs and ring,
``program.c`` guest programs.
"""
