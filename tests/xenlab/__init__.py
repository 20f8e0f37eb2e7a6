# SPDX-License-Identifier: GPL-2.0-or-later
"""A laboratory with a real Xen: hypervisor, dom0 and guests inside QEMU, under software emulation.

Nothing is a stub: the hypervisor is Debian's Xen 4.17, built from Debian's source package. dom0 is
Debian's kernel and userland with the toolstack as Debian ships it, and guests are made with ``xl
create``.  Only the processor is emulated, with nested page tables and without KVM, so times inside
are meaningful only in proportion to each other.

    parts.py      the parts of a machine, built once and kept in the cache
    debian.py     Debian's packages, sources and root file systems
    machine.py    boots one, runs a command in its dom0, brings back the results
    dom0/         what runs in dom0 before the command
    guest/        the guest's only program
"""
