# SPDX-License-Identifier: GPL-2.0-or-later
"""The only place that knows Xen.

``contract`` says what a hypervisor has to offer; ``simulated`` is one that runs on any machine.
The paging ring (``ring``) is the same for all: Xen's binary layout.  ``pages`` and ``errors`` are what
all of them stand on.
"""
