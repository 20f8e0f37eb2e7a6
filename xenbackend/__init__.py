# SPDX-License-Identifier: GPL-2.0-or-later
"""The only package that depends on Xen.

``contract`` defines what a hypervisor has to offer; ``simulated`` is a hypervisor that runs on any
machine.  The paging ring (``ring``) has Xen's binary layout and is the same for all backends.  All
modules are built on ``pages`` and ``errors``.
"""
