# SPDX-License-Identifier: GPL-2.0-or-later
"""The real Xen, through libxenctrl and its companions.  Each line needs only lines above it.

native/         the hypercalls, in C
params.py       HVM parameters
states.py       the state of a domain, and how it ended
preflight.py    why a host or a domain is not fit for paging, in sentences
host.py         one host: its handle, its facts, its xenstored
platform.py     what a domain is created with
held.py         pages that stay readable when the domain is gone
ring.py         the paging ring over an event channel
wiring.py       how a domain is connected to xenstored and to the console
domain.py       one domain: the contract's operations
builder.py      the empty domain that a guest is restored into, made here or by a toolstack
hypervisor.py   the contract's hypervisor: finds domains and has them made
"""
