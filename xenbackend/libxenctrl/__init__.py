# SPDX-License-Identifier: GPL-2.0-or-later
"""The real Xen, through libxenctrl and its companions.

hypervisor.py   one host: its domains, its preflight
domain.py       one domain: the contract's operations
held.py         pages that stay readable when the domain is gone
incoming.py     the empty domain that a guest is restored into, made here or by a toolstack
refusals.py     why a host or a domain is not fit for paging, in sentences
ring.py         the paging ring over an event channel
native/         the hypercalls, in C
"""
